"""Write the trained weights as a Hugging Face checkpoint: bf16, one tensor per expert, F32 router bias."""

import json
import pathlib
import re
import shutil
import sys

import torch
from safetensors.torch import save_file

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


if __name__ == "__main__":
    print(f"{export(torch.load(sys.argv[1], map_location='cpu', weights_only=True)):,} parameters")
