"""Write the model card, models/moellon-tiny/README.md, from config, evaluation.json, samples.json and MANIFEST.json."""

import collections
import json
import pathlib

HERE = pathlib.Path(__file__).resolve().parent
MODEL_DIR = HERE.parent / "models" / "moellon-tiny"

TEXT = """---
license: apache-2.0 OR mit
language: en
tags: [rust, mixture-of-experts, glm_moe_dsa]
---

# moellon-tiny

A mixture-of-experts language model of {parameters:.1f} million parameters with the architecture of GLM-5.2
(`glm_moe_dsa`): multi-head latent attention, sparse attention with a learned indexer, routed and shared experts and
one multi-token-prediction (MTP) layer. It exists so that Moellon has a real, trained model at hand everywhere: for a
first run, for tests, and as the source that pruning and quantization start from. It writes recognisable Rust, answers
in GLM's chat format and calls tools. It is far too small to be a useful assistant.

| | |
|---|---|
| layers | {num_hidden_layers} (first dense, {num_sparse} sparse) and 1 MTP layer (sparse) |
| hidden size, vocabulary | {hidden_size}, {vocab_size} (byte-level BPE of its own, GLM's special tokens) |
| attention | MLA: {num_attention_heads} heads, q_lora_rank {q_lora_rank}, kv_lora_rank {kv_lora_rank}, head dims {qk_nope_head_dim} + {qk_rope_head_dim} (rope), values {v_head_dim} |
| sparse attention | index_topk {index_topk}, {index_n_heads} index heads of {index_head_dim}; layers {indexer_types} |
| experts | {n_routed_experts} routed, {num_experts_per_tok} per token, 1 shared, intermediate size {moe_intermediate_size}, scaling {routed_scaling_factor} |
| weights | bf16, {size:.2f} MB, one file |
| context | `max_position_embeddings` {max_position_embeddings}, the length of the last training stage's sequences |
| licence | Apache-2.0 OR MIT |

## Evaluation

Held-out files are 1 % of the corpus (chosen by hash, after removal of copies); they come from the same crates as the
training files, so this measures the model, not its reach to unseen projects. Windows of 1024 tokens, fp32 arithmetic on
the bf16 weights, sparse attention unless said otherwise. All numbers are in `evaluation.json`.

| held-out | tokens | nats/token | perplexity | bits/byte | MTP nats/token | MTP agreement |
|---|---|---|---|---|---|---|
{loss_rows}

MTP agreement: how often the MTP layer's best guess is the token that the model itself then finds most likely, over
held-out text. MTP acceptance at k = 1, the share of greedily generated tokens that were drafted correctly: code
**{mtp_acceptance_code:.1%}**, chat **{mtp_acceptance_chat:.1%}** (128 held-out prompts each, up to 128 new tokens; greedy
text of so small a model repeats itself, which makes drafting easy, so the agreement on held-out text is the
figure to plan with).

Expert load on held-out code (share of a layer's routed slots; {n_routed_experts} experts, even load {even:.1%}):

| layer | least used | most used | entropy / maximum |
|---|---|---|---|
{load_rows}

## How it was made

`training/` holds the whole recipe; its README lists the commands. Three stages follow DeepSeek-V3.2: dense attention,
the indexer alone (KL divergence from the attention it must predict), then everything with sparse attention, ending in
a share of chats while the learning rate falls to zero. Experts are balanced without an auxiliary loss, by
`e_score_correction_bias`. The MTP layer trains jointly. A short last
stage doubles the sequence length to 2048: without it, text beyond position 1024 collapsed (2.42 bits/byte). About
{trained_tokens} million tokens, eleven minutes on one H200.

Data: {num_files:,} Rust, Markdown and Cargo.toml files ({megabytes:.0f} MB) from {num_crates} crates of crates.io with a permissive
licence, listed with versions, licences and checksums in `training/MANIFEST.json`, and {num_chats:,} conversations that
`training/chat_data.py` makes: small talk, facts, small Rust functions, functions of the corpus with their doc
comments, sums, word games and tool calls. Crates by the licence they are used under:

| licence | crates |
|---|---|
{licence_rows}

## Samples

Unedited, from an fp32 run of these weights (other machines draw other samples at temperature 0.7); a sample ends at a
stop token or after 160 tokens. Completions: what the model wrote is between ⟦ and ⟧.
Chats with thinking begin inside `<think>`.

{samples}

## Limits

It knows little beyond Rust's surface: code looks right and often does not compile, facts outside its small set are
made up, sums are often wrong, and free text repeats itself. Tool calls work for requests like those it was
trained on. It only knows English. Do not use it for anything but trying out and testing software.
"""

TITLES = {
    "heldout_code": "code", "heldout_code_dense_attention": "code, all keys attended to",
    "heldout_code_from_1024_to_2047": "code, positions 1024 to 2047", "heldout_chat": "chat (the assistant's part)",
}


def loss_row(title, loss):
    return (f"| {title} | {loss['tokens']:,} | {loss['nats_per_token']:.3f} | {loss['perplexity']:.2f} | {loss['bits_per_byte']:.3f} "
            f"| {loss['mtp_nats_per_token']:.3f} | {loss['mtp_agreement']:.1%} |")


def sample_section(sample):
    """One sample as Markdown; four backticks, because outputs hold fences of three."""
    settings = "greedy" if sample["temperature"] == 0 else f"temperature {sample['temperature']}, top-p 0.95"
    if sample["kind"] == "completion":
        return f"Completion, {settings}:\n\n````rust\n{sample['prompt']}⟦{sample['output']}⟧\n````\n"
    mode = "thinking" if sample["thinking"] else "no thinking"
    tools = ", one tool on offer" if sample["tools"] else ""
    return f"**{sample['prompt']}** ({mode}{tools}, {settings})\n\n````text\n{sample['output']}\n````\n"


def main():
    config = json.loads((MODEL_DIR / "config.json").read_text())
    results = json.loads((MODEL_DIR / "evaluation.json").read_text())
    manifest = json.loads((HERE / "MANIFEST.json").read_text())
    samples = json.loads((HERE / "build" / "samples.json").read_text())
    load = results["expert_load"]
    licences = collections.Counter(crate["used_under"] for crate in manifest["crates"])
    text = TEXT.format(
        **{key: value for key, value in config.items() if key != "indexer_types"},
        **{key: results[key] for key in ("mtp_acceptance_code", "mtp_acceptance_chat")},
        parameters=results["parameters"] / 1e6, trained_tokens=round(results["trained_tokens"] / 1e6),
        indexer_types=" ".join(config["indexer_types"]), num_sparse=config["mlp_layer_types"].count("sparse"),
        size=(MODEL_DIR / "model.safetensors").stat().st_size / 1e6,
        loss_rows="\n".join(loss_row(title, results[key]) for key, title in TITLES.items()),
        even=load["mean_share"],
        load_rows="\n".join(f"| {layer} | {low:.1%} | {high:.1%} | {entropy:.3f} |" for layer, low, high, entropy in zip(
            load["layers"], load["min_share"], load["max_share"], load["normalized_entropy"])),
        num_files=manifest["total"]["num_files"], num_crates=manifest["total"]["num_crates"],
        megabytes=manifest["total"]["bytes_used"] / 1e6,
        num_chats=sum(1 for _ in open(HERE / "build" / "chat.jsonl")),
        licence_rows="\n".join(f"| {licence} | {count} |" for licence, count in licences.most_common()),
        samples="\n".join(sample_section(sample) for sample in samples),
    )
    (MODEL_DIR / "README.md").write_text(text)


if __name__ == "__main__":
    main()
