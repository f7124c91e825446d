"""Evaluate the exported checkpoint: held-out loss, MTP acceptance, expert load, and samples.

Writes models/moellon-tiny/evaluation.json (the numbers) and build/samples.json (the texts of the model card).
"""

import json
import math
import pathlib
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from data import document_mask, load_tokens, segments
from encode_data import load_template
from model import Config, Model

HERE = pathlib.Path(__file__).resolve().parent
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"
WINDOW = 1024
MAX_WINDOWS = 512
ACCEPTANCE_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 128, 128, 128

COMPLETIONS = [
    "fn main() {",
    "pub struct Matrix {\n    rows: usize,\n    cols: usize,\n    data: Vec<f32>,\n}\n\nimpl Matrix {\n    pub fn new(",
    "/// Returns the number of words in `text`.\npub fn count_words(",
    "use std::collections::HashMap;\n\n",
]
WEATHER_TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the current weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Name of the city"}}, "required": ["city"]},
}}
CHATS = [
    ("Hello!", False, None), ("Hello!", True, None),
    ("Write a Rust function that checks whether a number is prime.", False, None),
    ("Write a Rust function that returns the sum of the even numbers in a slice.", True, None),
    ("What is ownership in Rust?", False, None),
    ("What is the weather in Paris?", False, [WEATHER_TOOL]), ("What is the weather in Paris?", True, [WEATHER_TOOL]),
]


def load_model(model_dir, device):
    """The exported checkpoint as a fp32 Model."""
    state, experts = {}, {}
    for name, value in load_file(model_dir / "model.safetensors").items():
        name = name.removeprefix("model.")
        match = re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            experts.setdefault(f"{match[1]}.experts_{match[3]}_proj", {})[int(match[2])] = value.float()
        else:
            state[name] = value.float()
    state |= {name: torch.stack([rows[i] for i in range(len(rows))]) for name, rows in experts.items()}
    model = Model(Config.load(model_dir / "config.json"))
    model.load_state_dict(state)
    return model.eval().to(device)


@torch.no_grad()
def heldout_loss(model, tokens, bytes_per_token, mode):
    """Mean loss over windows of a token stream: nats per token, bits per byte, MTP loss, MTP agreement, loads."""
    count = min((len(tokens) - 2) // WINDOW, MAX_WINDOWS)
    totals = dict.fromkeys(("nats", "mtp_nats", "tokens", "mtp_tokens", "bytes"), 0.0)
    loads = 0
    for start in range(0, count, 16):
        rows = torch.stack([tokens[i * WINDOW : i * WINDOW + WINDOW + 2] for i in range(start, min(start + 16, count))]).long()
        allowed, weight, mtp_weight = segments(rows)
        output = model(rows[:, :-2], rows[:, 1:-1], allowed, mode)
        weight, mtp_weight = (weight == 1).float(), (mtp_weight == 1).float()
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
    }, loads


@torch.no_grad()
def generate(model, prompts, num_tokens, temperature=0.0, seed=0):
    """Continue prompts [B,T] by num_tokens, without a cache."""
    generator = torch.Generator(prompts.device).manual_seed(seed)
    for _ in range(num_tokens):
        logits = model(prompts, None, document_mask(prompts), "sparse").logits[:, -1].float()
        if temperature > 0:
            probs = (logits / temperature).softmax(-1)
            ordered, ids = probs.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered > 0.95] = 0
            chosen = ids.gather(-1, torch.multinomial(ordered, 1, generator=generator))
        else:
            chosen = logits.argmax(-1, keepdim=True)
        prompts = torch.cat([prompts, chosen], 1)
    return prompts


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


def sample(model, tokenizer, text, temperature, stops, num_tokens=160):
    """The continuation of a text, cut at the first stop token."""
    device = next(model.parameters()).device
    prompt = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids], device=device)
    ids = generate(model, prompt, num_tokens, temperature)[0, prompt.shape[1]:].tolist()
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return tokenizer.decode(ids[:end], skip_special_tokens=False), end is not None


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

    results = {"parameters": sum(p.numel() for p in model.parameters())}
    results["heldout_code"], loads = heldout_loss(model, corpus, bytes_per_token, "sparse")
    results["heldout_code_dense_attention"], _ = heldout_loss(model, corpus, bytes_per_token, "dense")
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
        "normalized_entropy": (-(share * np.log(share)).sum(1) / math.log(share.shape[1])).round(4).tolist(),
        "share": share.round(4).tolist(),
    }

    render, samples = load_template(), []
    for temperature in (0.0, 0.7):
        for text in COMPLETIONS:
            continuation, _ = sample(model, tokenizer, text, temperature, stops)
            samples.append({"kind": "completion", "temperature": temperature, "prompt": text, "output": continuation})
        for question, thinking, tools in CHATS:
            text = render([{"role": "user", "content": question}], tools=tools, enable_thinking=thinking, add_generation_prompt=True)
            answer, stopped = sample(model, tokenizer, text, temperature, stops)
            samples.append({"kind": "chat", "temperature": temperature, "prompt": question, "thinking": thinking,
                            "tools": tools is not None, "output": answer, "stopped": stopped})
    (MODEL_DIR / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "build" / "samples.json").write_text(json.dumps(samples, indent=1) + "\n")
    json.dump({k: v for k, v in results.items() if k != "expert_load"}, sys.stdout, indent=1)
    for item in samples:
        print(f"\n=== {item['kind']} T={item['temperature']} {item['prompt']!r} thinking={item.get('thinking')} stopped={item.get('stopped')}\n{item['output']}")


if __name__ == "__main__":
    main()
