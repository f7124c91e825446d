"""Sample completions and chats from the exported checkpoint into build/samples.json, for the model card."""

import json
import pathlib

import torch
from tokenizers import Tokenizer

from data import document_mask
from encode_data import load_template
from export import load_model

HERE = pathlib.Path(__file__).resolve().parent
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"
SEED = 0
NEW_TOKENS = 160

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
    ("What is ownership in Rust?", False, None), ("What is 17 + 25?", True, None),
    ("What is the weather in Paris?", False, [WEATHER_TOOL]), ("What is the weather in Paris?", True, [WEATHER_TOOL]),
]



@torch.no_grad()
def generate(model, prompts, num_tokens, temperature=0.0, stops=()):
    """Continue prompts [B,T] by num_tokens, or until every row's newest token is a stop; without a cache."""
    generator = torch.Generator(prompts.device).manual_seed(SEED)
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
        if stops and all(token in stops for token in chosen.flatten().tolist()):
            break
    return prompts


def sample(model, tokenizer, text, temperature, stops, num_tokens=NEW_TOKENS):
    """The continuation of a text, cut at the first stop token."""
    device = next(model.parameters()).device
    prompt = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids], device=device)
    ids = generate(model, prompt, num_tokens, temperature, stops)[0, prompt.shape[1]:].tolist()
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return tokenizer.decode(ids[:end], skip_special_tokens=False), end is not None


def main():
    model = load_model(MODEL_DIR, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    stops = json.loads((MODEL_DIR / "config.json").read_text())["eos_token_id"]
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
    (HERE / "build" / "samples.json").write_text(json.dumps(samples, indent=1) + "\n")
    for item in samples:
        print(f"\n=== {item['kind']} T={item['temperature']} {item['prompt']!r} thinking={item.get('thinking')} stopped={item.get('stopped')}\n{item['output']}")


if __name__ == "__main__":
    main()
