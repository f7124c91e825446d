"""Write and read the weights as a Hugging Face checkpoint: bf16, one tensor per expert, F32 router bias."""

import json
import pathlib
import re
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

from model import Config, Model

HERE = pathlib.Path(__file__).resolve().parent
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"


def checkpoint_tensors(state):
    """The model's state dict under the checkpoint's names."""
    tensors = {}
    for name, value in state.items():
        name = name if name.startswith("lm_head") else f"model.{name}"
        stacked = re.fullmatch(r"(.*\.mlp)\.experts_(gate|up|down)_proj", name)
        if stacked:
            for expert, weight in enumerate(value):
                tensors[f"{stacked[1]}.experts.{expert}.{stacked[2]}_proj.weight"] = weight.bfloat16().contiguous()
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = value.float().contiguous()
        else:
            tensors[name] = value.bfloat16().contiguous()
    return tensors


def export(state, model_dir=MODEL_DIR):
    """Write model.safetensors, config.json and generation_config.json; return the number of parameters."""
    tensors = checkpoint_tensors(state)
    model_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(HERE / "config.json", model_dir / "config.json")
    config = json.loads((HERE / "config.json").read_text())
    generation = {
        "do_sample": True, "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"],
        "temperature": 0.7, "top_p": 0.95,
    }
    (model_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return sum(t.numel() for name, t in tensors.items() if not name.endswith("e_score_correction_bias"))


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


if __name__ == "__main__":
    print(f"{export(torch.load(sys.argv[1], map_location='cpu', weights_only=True)):,} parameters")
