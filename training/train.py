"""Train moellon-tiny: dense attention first, then the indexer alone, then everything with sparse attention.

The three stages are those of DeepSeek-V3.2. The indexer always learns from its own loss only (the KL divergence
from the attention that it must predict); the rest learns from the next-token loss and the MTP loss.
A second call, with --extend, continues from the exported checkpoint on longer sequences.
usage: train.py [--scale 1.0] [--extend] [--out build/model.pt]
"""

import argparse
import dataclasses
import pathlib
import time

import torch
import torch.nn.functional as F

from data import Sampler, load_tokens, segments
from export import MODEL_DIR, export, load_model
from model import Config, DecoderLayer, Model
from optimizer import Muon, split_parameters

HERE = pathlib.Path(__file__).resolve().parent
SEED = 1234
TOKENS_PER_STEP = 65536
MUON_RATE, MUON_DECAY = 0.02, 0.02
EMBED_RATE, INDEXER_RATE = 4e-3, 2e-3
ROUTER_BIAS_RATE = 1e-3
LOG_EVERY = 50


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    mode: str  # of the model's attention
    steps: int
    length: int  # of a training sequence
    chat_share: float
    mtp_weight: float
    rate: tuple  # learning-rate scale at the stage's start and end
    warmup_steps: int = 0
    corpus: str = "corpus_train"  # token stream


STAGES = [
    Stage("dense", "dense", 5600, 512, 0.1, 0.3, (1.0, 1.0), warmup_steps=150),
    Stage("indexer warm-up", "warmup", 100, 1024, 0.1, 0.0, (1.0, 1.0)),
    Stage("sparse", "sparse", 1000, 1024, 0.2, 0.3, (1.0, 0.5)),
    Stage("chat", "sparse", 1150, 1024, 0.4, 0.2, (0.5, 0.0)),
]
# With --extend, from the exported checkpoint: twice the length, on long files of which half keep line ends apart.
EXTEND_STAGES = [Stage("extend", "sparse", 170, 2048, 0.35, 0.2, (0.25, 0.0), warmup_steps=10, corpus="long_train")]


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
            if step < stage.warmup_steps:
                scale *= (step + 1) / stage.warmup_steps
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
            if step % LOG_EVERY == 0 or step == stage.steps - 1:
                loads = torch.stack(output.loads)
                log(f"{stage.name} {step}/{stage.steps} loss {loss.item():.4f} mtp {mtp_loss.item():.4f} "
                    f"indexer {output.indexer_loss.item():.4f} load max/mean {(loads.amax(1) / loads.mean(1)).max().item():.2f} "
                    f"tokens {total_tokens / 1e6:.0f}M {time.time() - started:.0f}s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the steps of every stage")
    parser.add_argument("--extend", action="store_true", help="continue from the exported checkpoint with longer sequences")
    parser.add_argument("--out", default=str(HERE / "build" / "model.pt"))
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    model = load_model(MODEL_DIR, "cuda").train() if options.extend else Model(Config.load(HERE / "config.json")).cuda()
    DecoderLayer.forward = torch.compile(DecoderLayer.forward, dynamic=False)
    generator = torch.Generator("cuda").manual_seed(SEED)
    stages = EXTEND_STAGES if options.extend else STAGES
    stages = [dataclasses.replace(stage, steps=max(2, round(stage.steps * options.scale))) for stage in stages]
    sampler = Sampler(load_tokens(stages[0].corpus).cuda(), load_tokens("chat_train").cuda(), generator)
    train(model, sampler, stages, lambda text: print(text, flush=True))
    torch.save(model.state_dict(), options.out)
    num_tokens = TOKENS_PER_STEP * sum(stage.steps for stage in stages)
    print(f"{export(model.state_dict()):,} parameters, {num_tokens:,} tokens, "
          f"{torch.cuda.max_memory_allocated() / 1e9:.0f} GB of GPU memory")


if __name__ == "__main__":
    main()
