"""Muon for the matrices of the layers, AdamW for everything else."""

import torch

MOMENTUM = 0.95


@torch.compile(dynamic=False)
def orthogonalize(matrices):
    """Newton-Schulz iteration towards the nearest orthogonal matrices; matrices [N,rows,columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon:
    """Momentum, orthogonalized per matrix (a stack of experts is a batch of matrices)."""

    def __init__(self, parameters, learning_rate, weight_decay):
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.groups = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
        self.momentum = {p: torch.zeros_like(p) for p in parameters}

    @torch.no_grad()
    def step(self, scale):
        """One update at learning_rate * scale."""
        rate = self.learning_rate * scale
        for (rows, columns), parameters in self.groups.items():
            updates = []
            for p in parameters:
                self.momentum[p].lerp_(p.grad, 1 - MOMENTUM)
                updates.append(p.grad.lerp(self.momentum[p], MOMENTUM).reshape(-1, rows, columns))
            update = orthogonalize(torch.cat(updates)) * max(1.0, rows / columns) ** 0.5
            for p, part in zip(parameters, update.split([len(u) for u in updates])):
                p.mul_(1 - rate * self.weight_decay).add_(part.reshape(p.shape).to(p.dtype), alpha=-rate)


def split_parameters(model):
    """(matrices for Muon, the rest for AdamW, the indexers' parameters)."""
    matrices, rest, indexer = [], [], []
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            indexer.append(parameter)
        elif parameter.ndim >= 2 and name.startswith("layers.") and not name.endswith("mlp.gate.weight"):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return matrices, rest, indexer
