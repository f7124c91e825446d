"""Compare model.py on the exported bf16 weights with a plain numpy implementation of the same checkpoint.

usage: check_reference.py <directory that holds numpy_ref.py> [num_tokens]
Prefill, token-by-token decode with latent caches, and the MTP layer must agree within TOLERANCE. Long prompts can
hit exactly tied index scores (ReLU gives zeros), where implementations may rightly pick different keys.
"""

import pathlib
import sys

import numpy as np
import torch

from export import load_model
from model import causal_mask

MODEL_DIR = pathlib.Path(__file__).resolve().parent.parent / "models" / "moellon-tiny"
TOLERANCE = 1e-3


def main():
    sys.path.insert(0, sys.argv[1])
    from numpy_ref import Model as NumpyModel

    num_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    model = load_model(MODEL_DIR, "cpu")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 4072, (1, num_tokens + 1)))
    with torch.no_grad():
        output = model(tokens[:, :-1], tokens[:, 1:], causal_mask(tokens[:, :-1]), "sparse")
    reference = NumpyModel(str(MODEL_DIR))
    ids = tokens[0].numpy()
    logits, hidden, _ = reference.prefill(ids)
    cache = {}
    decoded = np.stack([reference.step(int(token), position, cache) for position, token in enumerate(ids)])
    errors = {
        "prefill": np.abs(logits[:-1] - output.logits[0].numpy()).max(),
        "decode": np.abs(decoded[:-1] - output.logits[0].numpy()).max(),
        "mtp": np.abs(reference.mtp(ids, hidden) - output.mtp_logits[0].numpy()).max(),
    }
    print(f"{num_tokens} tokens, logit absmax {np.abs(logits).max():.2f}:", {k: f"{v:.1e}" for k, v in errors.items()})
    sys.exit(max(errors.values()) > TOLERANCE)


if __name__ == "__main__":
    main()
