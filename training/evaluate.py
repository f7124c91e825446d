"""Evaluate the exported checkpoint: held-out loss, MTP acceptance and expert load.

Writes models/moellon-tiny/evaluation.json.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from data import document_mask, load_tokens, segments
from export import load_model
from sample import generate
from train import EXTEND_STAGES, STAGES, TOKENS_PER_STEP

HERE = pathlib.Path(__file__).resolve().parent
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"
WINDOW = 1024
ACCEPTANCE_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 128, 128, 128


@torch.no_grad()
def heldout_loss(model, tokens, bytes_per_token, mode, window=WINDOW, skip=0):
    """Mean losses over the positions from `skip` on of all windows of a token stream, and tokens per expert.

    mtp_agreement: how often the MTP layer's best guess of a token is the one the model itself then makes.
    """
    count = (len(tokens) - 2) // window
    totals = dict.fromkeys(("nats", "mtp_nats", "agree", "tokens", "mtp_tokens", "bytes"), 0.0)
    loads = 0
    for start in range(0, count, 16):
        rows = torch.stack([tokens[i * window : i * window + window + 2] for i in range(start, min(start + 16, count))]).long()
        allowed, weight, mtp_weight = segments(rows)
        output = model(rows[:, :-2], rows[:, 1:-1], allowed, mode)
        weight, mtp_weight = (weight == 1).float(), (mtp_weight == 1).float()
        weight[:, :skip] = 0
        mtp_weight[:, :skip] = 0
        agree = output.mtp_logits.argmax(-1)[:, :-1] == output.logits.argmax(-1)[:, 1:]
        mtp_weight[:, -1] = 0
        totals["agree"] += (agree * mtp_weight[:, :-1]).sum().item()
        losses = F.cross_entropy(output.logits.float().flatten(0, 1), rows[:, 1:-1].flatten(), reduction="none")
        mtp_losses = F.cross_entropy(output.mtp_logits.float().flatten(0, 1), rows[:, 2:].flatten(), reduction="none")
        totals["nats"] += (losses * weight.flatten()).sum().item()
        totals["mtp_nats"] += (mtp_losses * mtp_weight.flatten()).sum().item()
        totals["tokens"] += weight.sum().item()
        totals["mtp_tokens"] += mtp_weight.sum().item()
        totals["bytes"] += (bytes_per_token[rows[:, 1:-1]] * weight).sum().item()
        loads = loads + torch.stack(output.loads)
    nats = totals["nats"] / totals["tokens"]
    return {
        "tokens": int(totals["tokens"]), "nats_per_token": nats, "perplexity": math.exp(nats),
        "bits_per_byte": totals["nats"] / math.log(2) / totals["bytes"],
        "mtp_nats_per_token": totals["mtp_nats"] / totals["mtp_tokens"],
        "mtp_agreement": totals["agree"] / totals["mtp_tokens"],
    }, loads


@torch.no_grad()
def mtp_acceptance(model, prompts, stops):
    """The share of greedily generated tokens that the MTP layer drafts correctly, up to the first stop token."""
    length = prompts.shape[1]
    rows = generate(model, prompts, NEW_TOKENS)
    output = model(rows[:, :-1], rows[:, 1:], document_mask(rows[:, :-1]), "sparse")
    drafts = output.mtp_logits.argmax(-1)[:, length - 2 : -1]  # row i drafts token i + 2
    generated = rows[:, length:]
    stopped = torch.isin(generated, stops).long().cumsum(1)
    live = (stopped - torch.isin(generated, stops).long()) == 0
    return ((drafts == generated) & live).sum().item() / live.sum().item()


def chat_prompts(tokens, assistant, count, length):
    """Held-out chat contexts that end in an assistant turn's start, all cut to their last `length` tokens."""
    starts = [i for i in (tokens == assistant).nonzero().flatten().tolist() if i + 3 > length]
    step = max(1, len(starts) // count)
    return torch.stack([tokens[i + 3 - length : i + 3] for i in starts[::step][:count]]).long()


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    model = load_model(MODEL_DIR, device)
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    config = json.loads((MODEL_DIR / "config.json").read_text())
    stops = config["eos_token_id"]
    added = set(tokenizer.get_added_tokens_decoder())
    bytes_per_token = torch.tensor(
        [0 if i in added else len(tokenizer.id_to_token(i)) for i in range(config["vocab_size"])], device=device
    )
    corpus, chat = (load_tokens(f"{name}_heldout").to(device) for name in ("corpus", "chat"))

    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_tokens": TOKENS_PER_STEP * sum(stage.steps for stage in STAGES + EXTEND_STAGES if stage.mode != "warmup"),
    }
    results["heldout_code"], loads = heldout_loss(model, corpus, bytes_per_token, "sparse")
    results["heldout_code_dense_attention"], _ = heldout_loss(model, corpus, bytes_per_token, "dense")
    results["heldout_code_from_1024_to_2047"], _ = heldout_loss(model, corpus, bytes_per_token, "sparse", 2 * WINDOW, WINDOW)
    results["heldout_chat"], _ = heldout_loss(model, chat, bytes_per_token, "sparse")
    step = len(corpus) // (ACCEPTANCE_PROMPTS + 1)
    code_prompts = torch.stack([corpus[i * step : i * step + PROMPT_TOKENS] for i in range(ACCEPTANCE_PROMPTS)]).long()
    stop_ids = torch.tensor(stops, device=device)
    assistant = tokenizer.token_to_id("<|assistant|>")
    results["mtp_acceptance_code"] = mtp_acceptance(model, code_prompts, stop_ids)
    results["mtp_acceptance_chat"] = mtp_acceptance(model, chat_prompts(chat, assistant, ACCEPTANCE_PROMPTS, 96), stop_ids)
    share = (loads / loads.sum(-1, keepdim=True)).cpu().numpy()
    results["expert_load"] = {
        "layers": [*(f"{i}" for i, kind in enumerate(config["mlp_layer_types"]) if kind == "sparse"), "mtp"],
        "mean_share": 1 / share.shape[1], "min_share": share.min(1).round(4).tolist(),
        "max_share": share.max(1).round(4).tolist(),
        "normalized_entropy": (-(share * np.log(share.clip(1e-9))).sum(1) / math.log(share.shape[1])).round(4).tolist(),
        "share": share.round(4).tolist(),
    }

    (MODEL_DIR / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    json.dump({k: v for k, v in results.items() if k != "expert_load"}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
