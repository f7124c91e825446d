"""Train the byte-level BPE tokenizer and write the model folder's tokenizer and template files."""

import json
import pathlib
import shutil

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE / "build"
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"

VOCAB_SIZE = 4096
SAMPLE_EVERY = 5  # every fifth file is enough to count pairs

SPECIAL_TOKENS = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "/nothink",
]
# Part of ordinary output (a parser must see them), so not "special": decoding keeps them.
MARKUP_TOKENS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
]
# GPT-4's split, with single digits so that a small model can do sums digit by digit.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_text():
    """Every SAMPLE_EVERY-th training file, and the chat examples."""
    with open(BUILD / "corpus.jsonl") as corpus:
        for i, line in enumerate(corpus):
            record = json.loads(line)
            if i % SAMPLE_EVERY == 0 and record["split"] == "train":
                yield record["text"]
    with open(BUILD / "chat.jsonl") as chats:
        for i, line in enumerate(chats):
            record = json.loads(line)
            if i % SAMPLE_EVERY == 0 and record["split"] == "train":
                yield from (m.get("content") or "" for m in record["messages"])


def train():
    """A Tokenizer of exactly VOCAB_SIZE entries, the added tokens last (as in GLM)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens(MARKUP_TOKENS)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def main():
    MODEL_DIR.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(MODEL_DIR / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": SPECIAL_TOKENS,
        "model_max_length": 2048,
        "padding_side": "left",
    }
    (MODEL_DIR / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    shutil.copy(HERE / "chat_template.jinja", MODEL_DIR / "chat_template.jinja")


if __name__ == "__main__":
    main()
