"""Distil the embedded draft from the embedded target. Resumable like the target's training.

    python experiments/embedded_pair/distill_draft.py --target runs/target/model --out runs/draft --minutes 15

Forward KL from the target's next-token distribution, on the target's own continuations (greedy and sampled, since
those are the texts that it will draft) and on the training text.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import data
import numpy as np
import torch
from accelerate import Accelerator
from train_target import Batches, llama, optimizers, rate, set_rates
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import specdec

PROMPT, CONTINUATION = 64, 192


def draft_config() -> LlamaConfig:
    return llama(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )


def project_embeddings(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    """Start the draft's embedding from the target's, on its strongest directions: a draft this small learns the
    layers in the time at hand, not four thousand vectors."""
    full = target.get_input_embeddings().weight.detach().float()
    directions = torch.linalg.svd(full - full.mean(0), full_matrices=False).Vh[: draft.config.hidden_size]
    small = full @ directions.T
    with torch.no_grad():
        draft.get_input_embeddings().weight.copy_(small * (0.02 / small.std()))


def continuations(target: LlamaForCausalLM, tokens: np.ndarray, count: int, batch: int, seed: int) -> np.ndarray:
    """`[count, PROMPT + CONTINUATION]`: the target's own texts, half greedy, half sampled at temperature 0.8."""
    rng = np.random.default_rng(seed)
    decoder = specdec.SpeculativeDecoder(copy.deepcopy(target).to(torch.bfloat16), prefix_cache=0)
    decoder.warmup()
    starts = rng.integers(0, len(tokens) - PROMPT, count)
    rows, started = [], time.time()
    for at in range(0, count, batch):
        prompts = [tokens[s : s + PROMPT].tolist() for s in starts[at : at + batch]]
        made = decoder.generate_plain(
            prompts,
            max_new_tokens=CONTINUATION,
            temperature=0.8 if (at // batch) % 2 else 0.0,
            seed=list(range(at, at + len(prompts))),
            eos_token_id=(),
            max_rows=batch,
        )
        rows.append(np.array([text.prompt + text.tokens for text in made], dtype=np.int32))
        print(f"self-generated {at + len(prompts)}/{count}, {time.time() - started:.0f} s", flush=True)
    return np.concatenate(rows)


@torch.no_grad()
def greedy_agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokens: np.ndarray, count: int = 32) -> float:
    """Share of positions of the target's greedy continuations of held-out prompts where the draft's argmax agrees."""
    starts = np.linspace(0, len(tokens) - PROMPT - 1, count).astype(int)
    prompts = torch.from_numpy(np.stack([tokens[s : s + PROMPT] for s in starts]).astype(np.int64))
    text = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=128, min_new_tokens=128, do_sample=False
    )
    agree = draft(text).logits.argmax(-1)[:, PROMPT - 1 : -1] == text[:, PROMPT:]
    return float(agree.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--self-generate", type=int, default=2048, help="continuations of the target to train on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--init", type=Path, help="start from this draft's weights instead of the target's embedding")
    parser.add_argument("--rate", type=float, default=1.0, help="scales the learning rates; less than 1 with --init")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    accelerator = Accelerator(mixed_precision="bf16")
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    train, held = data.encode_split(tokenizer, False), data.encode_split(tokenizer, True)

    cached = args.out / "continuations.npy"
    if not cached.exists():
        np.save(cached, continuations(target, train, args.self_generate, 128, args.seed))
    own = Batches(np.load(cached).reshape(-1), PROMPT + CONTINUATION, args.seed, aligned=True)
    text = Batches(train, PROMPT + CONTINUATION, args.seed + 7)

    draft = LlamaForCausalLM(draft_config())
    if args.init:
        draft.load_state_dict(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).state_dict())
    else:
        project_embeddings(draft, target)
    print(f"{sum(p.numel() for p in draft.parameters()):,} parameters", flush=True)
    opts = optimizers(draft)
    base = [[g["lr"] for g in opt.param_groups] for opt in opts]
    state = {"step": 0, "tokens": 0, "seconds": 0.0}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        draft.load_state_dict(saved["model"])
        for opt, value in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(value)
        state = saved["state"]
        own.restore(*state["own"])
        text.restore(*state["text"])

    def save() -> None:
        state.update(own=[own.epoch, own.at], text=[text.epoch, text.at])
        torch.save(
            {"model": draft.state_dict(), "opts": [o.state_dict() for o in opts], "state": dict(state)},
            checkpoint.with_suffix(".tmp"),
        )
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        draft.save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")
        (args.out / "state.json").write_text(json.dumps(state))

    compiled_target, compiled_draft = torch.compile(target), torch.compile(draft)
    last_save, compiled = time.time(), False
    while state["seconds"] < args.minutes * 60:
        started = time.time()
        set_rates(opts, base, args.rate * rate(state["seconds"] / 60 / args.minutes))
        batch = torch.cat((own.draw(args.batch // 2), text.draw(args.batch - args.batch // 2)))
        with torch.no_grad(), accelerator.autocast():
            p = compiled_target(batch).logits.float().softmax(-1)
        with accelerator.autocast():
            log_q = compiled_draft(batch).logits.float().log_softmax(-1)
        loss = -(p * log_q).sum(-1).mean()  # forward KL up to the target's entropy
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        state["step"] += 1
        state["tokens"] += batch.numel()
        if compiled:
            state["seconds"] += time.time() - started
        compiled = True  # the first step compiles, and is not charged to the schedule
        if state["step"] % 20 == 0:
            with torch.no_grad():
                overlap = torch.minimum(p, log_q.exp()).sum(-1).mean()
            print(
                f"{state['step']:5d} loss {float(loss):.4f} overlap {float(overlap):.3f} "
                f"{batch.numel() / (time.time() - started):.0f} tok/s {state['seconds'] / 60:.1f} min",
                flush=True,
            )
        if time.time() - last_save > 180:
            save()
            last_save = time.time()
    draft.eval()
    state["greedy_agreement"] = greedy_agreement(target, draft, held)
    save()
    print("done", json.dumps(state), flush=True)


if __name__ == "__main__":
    main()
