"""Tokenize the corpus and the chats into build/tokens/: xz-compressed uint16 arrays.

corpus_train, corpus_heldout, chat_train, chat_heldout; every document or conversation ends in <|endoftext|>.
"""

import json
import lzma
import pathlib
import random

import jinja2
import numpy as np
from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE / "build"
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"

SEED = 7
FILL_IN_THE_MIDDLE_SHARE = 0.05


def load_template():
    """The chat template as a function of messages, as transformers would render it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=True: json.dumps(value, ensure_ascii=ensure_ascii)
    template = environment.from_string((MODEL_DIR / "chat_template.jinja").read_text())
    return lambda messages, **options: template.render(messages=messages, **options)


def fill_in_the_middle(rng, text):
    """The text cut at two places and reordered: prefix, suffix, middle."""
    start, end = sorted(rng.sample(range(len(text)), 2))
    end = min(end, start + 400)
    return f"<|code_prefix|>{text[:start]}<|code_suffix|>{text[end:]}<|code_middle|>{text[start:end]}"


def corpus_documents():
    """(split, text) of every corpus file, in a shuffled order."""
    rng = random.Random(SEED)
    records = [json.loads(line) for line in open(BUILD / "corpus.jsonl")]
    rng.shuffle(records)
    for record in records:
        text = record["text"]
        if record["split"] == "train" and len(text) < 3000 and rng.random() < 4 * FILL_IN_THE_MIDDLE_SHARE:
            text = fill_in_the_middle(rng, text)
        yield record["split"], text


def chat_documents():
    """(split, text) of every conversation."""
    render = load_template()
    for line in open(BUILD / "chat.jsonl"):
        example = json.loads(line)
        yield example["split"], render(example["messages"], tools=example.get("tools"), enable_thinking=example["thinking"])


def encode(name, documents, tokenizer):
    """Write <name>_train and <name>_heldout."""
    end = tokenizer.token_to_id("<|endoftext|>")
    streams, batch = {"train": [], "heldout": []}, []

    def flush():
        encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        for (split, _), encoding in zip(batch, encodings):
            streams[split].append(np.array(encoding.ids + [end], dtype=np.uint16))
        batch.clear()

    for document in documents:
        batch.append(document)
        if len(batch) == 1000:
            flush()
    flush()
    for split, arrays in streams.items():
        tokens = np.concatenate(arrays)
        with lzma.open(BUILD / "tokens" / f"{name}_{split}.u16.xz", "wb", preset=1) as out:
            out.write(tokens.tobytes())
        print(f"{name}_{split}: {len(tokens):,} tokens in {len(arrays):,} documents", flush=True)


def main():
    (BUILD / "tokens").mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    encode("chat", chat_documents(), tokenizer)
    encode("corpus", corpus_documents(), tokenizer)


if __name__ == "__main__":
    main()
