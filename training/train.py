"""Train moellon-tiny: dense attention first, then the indexer alone, then everything with sparse attention.

The three stages are those of DeepSeek-V3.2. The indexer always learns from its own loss only (the KL divergence
from the attention that it must predict); the rest learns from the next-token loss and the MTP loss.
usage: train.py [--scale 1.0] [--out build/model.pt]
"""

import argparse
import dataclasses
import pathlib
import time

import torch
import torch.nn.functional as F

from data import Sampler, load_tokens, segments
from export import export
from model import Config, DecoderLayer, Model
from optimizer import Muon, split_parameters

HERE = pathlib.Path(__file__).resolve().parent
SEED = 1234
TOKENS_PER_STEP = 65536
WARMUP_STEPS = 150
MUON_RATE, MUON_DECAY = 0.02, 0.02
EMBED_RATE, INDEXER_RATE = 4e-3, 2e-3
ROUTER_BIAS_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    mode: str  # of the model's attention
    steps: int
    length: int  # of a training sequence
    chat_share: float
    mtp_weight: float
    rate: tuple  # learning-rate scale at the stage's start and end


STAGES = [
    Stage("dense", "dense", 6000, 512, 0.08, 0.3, (1.0, 1.0)),
    Stage("indexer warm-up", "warmup", 150, 1024, 0.08, 0.0, (1.0, 1.0)),
    Stage("sparse", "sparse", 1500, 1024, 0.15, 0.3, (1.0, 0.4)),
    Stage("chat", "sparse", 1000, 1024, 0.45, 0.15, (0.4, 0.0)),
]


def weighted_loss(logits, targets, weight):
    """Mean cross entropy of logits [B,T,vocab_size] under weights [B,T]."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum()


def balance_experts(model, loads):
    """Move each expert's choice bias a step towards the mean load (noaux_tc: no auxiliary loss)."""
    sparse = [layer.mlp.gate for layer in model.layers if hasattr(layer.mlp, "gate")]
    for gate, load in zip(sparse, loads):
        gate.e_score_correction_bias += ROUTER_BIAS_RATE * (load.mean() - load).sign()


def train(model, sampler, stages, log):
    """Run the stages in order."""
    matrices, rest, indexer = split_parameters(model)
    muon = Muon(matrices, MUON_RATE, MUON_DECAY)
    adam = torch.optim.AdamW(rest, lr=EMBED_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    adam_indexer = torch.optim.AdamW(indexer, lr=INDEXER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    loss_fn = torch.compile(weighted_loss, dynamic=False)
    started, total_tokens = time.time(), 0
    for stage in stages:
        for step in range(stage.steps):
            rows = sampler.batch(TOKENS_PER_STEP // stage.length, stage.length, stage.chat_share)
            allowed, weight, mtp_weight = segments(rows)
            first, last = stage.rate
            scale = first + (last - first) * step / stage.steps
            if stage is stages[0]:
                scale *= min(1.0, (step + 1) / WARMUP_STEPS)
            with torch.autocast("cuda", torch.bfloat16):
                output = model(rows[:, :-2], rows[:, 1:-1], allowed, stage.mode)
            loss, mtp_loss = output.indexer_loss, output.indexer_loss
            if stage.mode != "warmup":
                loss = loss_fn(output.logits, rows[:, 1:-1], weight)
                mtp_loss = loss_fn(output.mtp_logits, rows[:, 2:], mtp_weight)
                (loss + stage.mtp_weight * mtp_loss + output.indexer_loss).backward()
                for group in adam.param_groups:
                    group["lr"] = EMBED_RATE * scale
                torch.nn.utils.clip_grad_norm_(rest, 1.0)
                muon.step(scale)
                adam.step()
                balance_experts(model, [load.detach() for load in output.loads])
            else:
                output.indexer_loss.backward()
            if stage.mode != "dense":
                for group in adam_indexer.param_groups:
                    group["lr"] = INDEXER_RATE * scale
                adam_indexer.step()
            model.zero_grad(set_to_none=True)
            total_tokens += TOKENS_PER_STEP
            if step % 100 == 0 or step == stage.steps - 1:
                loads = torch.stack(output.loads)
                log(f"{stage.name} {step}/{stage.steps} loss {loss.item():.4f} mtp {mtp_loss.item():.4f} "
                    f"indexer {output.indexer_loss.item():.4f} load max/mean {(loads.amax(1) / loads.mean(1)).max().item():.2f} "
                    f"tokens {total_tokens / 1e6:.0f}M {time.time() - started:.0f}s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the steps of every stage")
    parser.add_argument("--out", default=str(HERE / "build" / "model.pt"))
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    model = Model(Config.load(HERE / "config.json")).cuda()
    DecoderLayer.forward = torch.compile(DecoderLayer.forward, dynamic=False)
    generator = torch.Generator("cuda").manual_seed(SEED)
    sampler = Sampler(load_tokens("corpus_train").cuda(), load_tokens("chat_train").cuda(), generator)
    stages = [dataclasses.replace(stage, steps=max(2, round(stage.steps * options.scale))) for stage in STAGES]
    train(model, sampler, stages, lambda text: print(text, flush=True))
    torch.save(model.state_dict(), options.out)
    print(f"{export(model.state_dict()):,} parameters")


if __name__ == "__main__":
    main()
