"""Tokenize the corpus and the chats into build/tokens/: xz-compressed uint16 arrays.

corpus_train, corpus_heldout, chat_train, chat_heldout and long_train; every document ends in <|endoftext|>.
long_train holds long files again. Half of them are split so that a line end never joins the punctuation before it:
a prompt that ends in "{" is tokenized that way, while running text has "{\\n" as one token.
"""

import json
import lzma
import pathlib
import random

import jinja2
import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE / "build"
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"

SEED = 7
FILL_IN_THE_MIDDLE_SHARE = 0.05
LONG_FILE_CHARS = 5000
LONG_FILE_SHARE = 0.35  # of the long files, for long_train


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


def long_documents(keep_line_ends_apart):
    """("train", text) of a share of the long training files; the two halves of the share are disjoint."""
    rng = random.Random(SEED + 1)
    for line in open(BUILD / "corpus.jsonl"):
        record = json.loads(line)
        draw = rng.random()
        apart = draw < LONG_FILE_SHARE / 2
        if record["split"] == "train" and len(record["text"]) > LONG_FILE_CHARS and draw < LONG_FILE_SHARE and apart == keep_line_ends_apart:
            yield "train", record["text"]


def line_end_splitter(path):
    """The tokenizer, with line ends kept apart from punctuation before they can merge."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\r\n]+"), "isolated"), tokenizer.pre_tokenizer,
    ])
    return tokenizer


def chat_documents():
    """(split, text) of every conversation."""
    render = load_template()
    for line in open(BUILD / "chat.jsonl"):
        example = json.loads(line)
        yield example["split"], render(example["messages"], tools=example.get("tools"), enable_thinking=example["thinking"],
                                       reasoning_effort=example["reasoning_effort"])


def encode(documents, tokenizer):
    """{"train": tokens, "heldout": tokens} of (split, text) pairs, each a uint16 array."""
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
    return {split: np.concatenate(arrays) for split, arrays in streams.items() if arrays}


def save(name, tokens):
    """Write build/tokens/<name>.u16.xz."""
    with lzma.open(BUILD / "tokens" / f"{name}.u16.xz", "wb", preset=1) as out:
        out.write(tokens.tobytes())
    print(f"{name}: {len(tokens):,} tokens", flush=True)


def main():
    (BUILD / "tokens").mkdir(exist_ok=True)
    path = str(MODEL_DIR / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    for name, documents in (("chat", chat_documents()), ("corpus", corpus_documents())):
        for split, tokens in encode(documents, tokenizer).items():
            save(f"{name}_{split}", tokens)
    joined = encode(long_documents(keep_line_ends_apart=False), tokenizer)["train"]
    apart = encode(long_documents(keep_line_ends_apart=True), line_end_splitter(path))["train"]
    save("long_train", np.concatenate([joined, apart]))


if __name__ == "__main__":
    main()
