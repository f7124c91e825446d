"""Trains two tiny tokenizers and writes what Hugging Face's `tokenizers` makes of some texts.

    pip install tokenizers && python make_tokenizer_fixtures.py

Output, all committed: fixtures/byte_level.json (GPT-2 style BPE over bytes, with GLM-like special tokens),
fixtures/byte_fallback.json (sentencepiece style BPE: `▁` for spaces, `<0xXX>` for unknown characters),
fixtures/tokenizer_config.json and fixtures/tokenizer_goldens.json.
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent / "fixtures"

TEXT = """
The mason builds a wall of rubble stone once the house has come down. Stone by stone the wall grows, and the wall
stands. A model of many experts asks only a few of them for each token; the others rest. The router chooses, the
experts answer, and the answer is a sum of what they said. What is written here is only meant to train a tokenizer.
def add(left, right):
    return left + right
{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}
Größe, façade, naïve, señor, Übermut, 東京, 你好世界, こんにちは, привет мир, שלום, مرحبا, 👍🏽 👩‍👩‍👧 🇨🇭
1234567890 3.14159 100% (a) [b] {c} <d> "e" 'f' -- ... !? #tag @name $9 & * ^ ~ ` | \\ /
""".strip().split("\n")

SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<｜tool▁sep｜>"]

TEXTS = [
    "", " ", "  two  spaces ", "The wall stands.", "\n\n\tdef add(left, right):\n    return left + right\n",
    "Größe façade 東京 你好世界 こんにちは", "👍🏽 👩‍👩‍👧 🇨🇭 🤷‍♂️ 𝕏", "unseen: ẞ ꙮ ﷽ \u0000\u007f\u0085\u2028", "e\u0301 versus é",
    "<|user|>Hello<|assistant|><think></think>Hi", "[gMASK]<sop><|system|>x<|user|> y <|assistant|>",
    "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Zürich</arg_value></tool_call>", "<|user|", "a<|user|>b<|use", "<｜tool▁sep｜> ▁ ▁▁",
    "1234567890 3.14159", "\r\n \r\n", "x" * 50, "\ufffd\ufeff",
]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(
            Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
            behavior="isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return tokenizer


def byte_fallback():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    # The bytes are ordinary tokens of the model: only the three specials stay added.
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(saved))


def goldens(tokenizer):
    size = tokenizer.get_vocab_size()
    encodes = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in TEXTS]
    for case in encodes:
        case["decoded"] = tokenizer.decode(case["ids"], skip_special_tokens=False)
        case["decoded_skipping"] = tokenizer.decode(case["ids"], skip_special_tokens=True)
    # Sequences that no text gives: every token alone and a walk through the vocabulary.
    odd = [[id] for id in range(size)] + [[(7 * step * step + 11 * step + start) % size for step in range(12)] for start in range(40)]
    decodes = [{"ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)} for ids in odd]
    return {"vocab_size": size, "encodes": encodes, "decodes": decodes}


def main():
    HERE.mkdir(exist_ok=True)
    results = {}
    for name, tokenizer in [("byte_level", byte_level()), ("byte_fallback", byte_fallback())]:
        saved = json.loads(tokenizer.to_str())
        (HERE / f"{name}.json").write_text(json.dumps(saved, ensure_ascii=False) + "\n", encoding="utf-8")
        results[name] = goldens(tokenizer)
    (HERE / "tokenizer_goldens.json").write_text(json.dumps(results, ensure_ascii=False) + "\n", encoding="utf-8")
    config = {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": {"content": "<|endoftext|>", "special": True},
        "pad_token": "<|endoftext|>",
        "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}],
        "model_max_length": 131072,
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


main()
