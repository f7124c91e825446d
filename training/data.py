"""Token streams for training: loading, random windows, and which positions may see and teach what."""

import functools
import json
import lzma
import pathlib

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"

FILE_START_SHARE = 0.2  # of a batch's rows
PROMPT_WEIGHT = 0.1  # loss weight of chat tokens that the model does not write itself


@functools.cache
def token_id(name):
    """The id of an added token."""
    added = json.loads((MODEL_DIR / "tokenizer.json").read_text())["added_tokens"]
    return next(token["id"] for token in added if token["content"] == name)


def load_tokens(name):
    """build/tokens/<name>.u16.xz as an int16 tensor (ids are below 32768)."""
    with lzma.open(HERE / "build" / "tokens" / f"{name}.u16.xz") as stream:
        return torch.from_numpy(np.frombuffer(stream.read(), np.int16).copy())


def document_ids(rows):
    """rows [B,T] -> [B,T]: which document of the row a token belongs to; <|endoftext|> ends one."""
    ends = (rows == token_id("<|endoftext|>")).long()
    return ends.cumsum(1) - ends


def document_mask(rows):
    """rows [B,T] -> [B,T,T] bool: earlier positions of the same document."""
    length = rows.shape[1]
    document = document_ids(rows)
    causal = torch.ones(length, length, dtype=torch.bool, device=rows.device).tril()
    return (document[:, :, None] == document[:, None, :]) & causal


def segments(rows):
    """rows [B,T+2] -> allowed [B,T,T] bool, weight [B,T] of target i+1 and mtp_weight [B,T] of target i+2.

    Weight 1: text of the corpus and what the assistant writes, up to the token that ends its turn.
    PROMPT_WEIGHT: the rest of a chat. 0: the first token of the next document.
    """
    document = document_ids(rows)
    turns = torch.tensor([token_id(f"<|{role}|>") for role in ("system", "user", "observation")], device=rows.device)
    assistant, start = token_id("<|assistant|>"), token_id("[gMASK]")
    opens_prompt = torch.isin(rows, turns) | (rows == start)
    event = opens_prompt | (rows == assistant) | (rows == token_id("<|endoftext|>"))
    index = torch.arange(rows.shape[1], device=rows.device)
    last_event = torch.where(event, index, -1).cummax(1).values
    in_prompt = opens_prompt.gather(1, last_event.clamp_min(0)) & (last_event >= 0)
    weight = torch.where(in_prompt, PROMPT_WEIGHT, 1.0)  # of the token that follows
    same_document = (document[:, :-1] == document[:, 1:])
    next_weight = weight[:, :-1] * same_document  # [B,T+1], of token i+1 at i
    mtp_weight = next_weight[:, 1:] * same_document[:, :-1]
    return document_mask(rows[:, :-2]), next_weight[:, :-1], mtp_weight


class Sampler:
    """Random windows: at conversation starts in the chats; anywhere, or at the start of a file, in the corpus."""

    def __init__(self, corpus, chat, generator):
        self.corpus, self.chat, self.generator = corpus, chat, generator
        self.chat_starts = (chat == token_id("[gMASK]")).nonzero().flatten()
        self.file_starts = (corpus == token_id("<|endoftext|>")).nonzero().flatten() + 1

    def batch(self, batch_size, length, chat_share):
        """[batch_size, length + 2] int64; the first rows are chat."""
        num_chat = round(batch_size * chat_share)
        num_files = round(batch_size * FILE_START_SHARE)
        starts = torch.cat([
            self.chat_starts[self.random(len(self.chat_starts), num_chat)].clamp_max(len(self.chat) - length - 2),
            self.file_starts[self.random(len(self.file_starts), num_files)].clamp_max(len(self.corpus) - length - 2),
            self.random(len(self.corpus) - length - 2, batch_size - num_chat - num_files),
        ])
        windows = starts[:, None] + torch.arange(length + 2, device=starts.device)
        return torch.cat([self.chat[windows[:num_chat]], self.corpus[windows[num_chat:]]]).long()

    def random(self, limit, count):
        """`count` integers below `limit`."""
        return torch.randint(limit, (count,), generator=self.generator, device=self.corpus.device)
