"""Train the embedded target. Resumable: run the same command again and it goes on where it stopped.

    python experiments/embedded_pair/train_target.py --out runs/target --minutes 100

The learning rate follows the share of the time (or token) budget that is spent, so an interrupted or slowed run
still ends with its decay.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import data
import numpy as np
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.train import checkpoint, provenance
from specdec.train.data import Rows, Sampler

MUON_LR, ADAMW_LR = 5e-3, 3e-3
WARMUP, DECAY = 0.02, 0.35  # shares of the budget


def target_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=data.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    return [
        torch.optim.Muon(hidden, lr=MUON_LR, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(progress: float) -> float:
    """Warm-up, plateau, linear decay to 2 %."""
    if progress < WARMUP:
        return max(0.05, progress / WARMUP)
    if progress > 1 - DECAY:
        return max(0.02, (1 - progress) / DECAY)
    return 1.0


def set_rates(opts: list[torch.optim.Optimizer], base: list[list[float]], share: float) -> None:
    """Every group's learning rate becomes `share` of its own base rate."""
    for opt, rates in zip(opts, base, strict=True):
        for group, lr in zip(opt.param_groups, rates, strict=True):
            group["lr"] = lr * share


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, held_out: Rows, count: int = 64) -> float:
    """Nats per token, on rows spread over all that there are."""
    model.eval()
    index = np.unique(np.linspace(0, len(held_out) - 1, count).astype(int))
    total = 0.0
    for chunk in np.array_split(index, max(1, len(index) // 8)):
        batch, _ = held_out.take(chunk).tensors()
        with torch.autocast("cpu", torch.bfloat16):
            total += float(model(input_ids=batch, labels=batch).loss) * len(chunk)
    model.train()
    return total / len(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--tokens", type=float, default=math.inf, help="stop after this many tokens, if sooner")
    parser.add_argument("--length", type=int, default=256, help="window; doubled for the last --long share")
    parser.add_argument("--long", type=float, default=0.2, help="share of the budget trained at twice the window")
    parser.add_argument("--batch", type=int, default=16, help="windows per forward")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--init", type=Path, help="start from this folder's weights, such as an earlier run's model")
    parser.add_argument("--rate", type=float, default=1.0, help="scales the learning rates; less than 1 with --init")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    tokenizer = data.train_tokenizer()
    tokenizer.save_pretrained(args.out / "model")
    text = {length: data.rows(tokenizer, length) for length in (args.length, 2 * args.length)}
    accelerator = Accelerator(mixed_precision="bf16")
    model = LlamaForCausalLM(target_config())
    if args.init:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).state_dict())
    num_tokens = text[args.length].train.tokens_RL.size
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {num_tokens:,} tokens", flush=True)
    opts = optimizers(model)
    base = [[g["lr"] for g in opt.param_groups] for opt in opts]
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "length": args.length, "epoch": 0, "at": 0}
    identity = {"data": text[args.length].digest, "length": args.length, "batch": args.batch, "seed": args.seed}
    store, found = checkpoint.Store(args.out, accelerator), checkpoint.latest(args.out)
    if found is not None:
        checkpoint.check_identity(found, identity)
        state = store.read(found, model, opts)[0]["state"]
        print("resumed", state, flush=True)

    def sampler() -> Sampler:
        made = Sampler(len(text[state["length"]].train), args.seed + (state["length"] != args.length))
        made.restore(state["epoch"], state["at"])
        return made

    order = sampler()
    trained = torch.compile(model) if args.compile else model

    def save() -> None:
        state.update(epoch=order.epoch, at=order.at)
        store.write(state["step"], {"identity": identity, "state": state}, model, opts, None)
        model.save_pretrained(args.out / "model")
        provenance.write(args.out / "model", {"kind": "target", **identity, **state})

    model.train()
    last_save, last_eval = time.time(), time.time()
    while True:
        started = time.time()
        progress = max(state["seconds"] / 60 / args.minutes, state["tokens"] / args.tokens)
        if progress >= 1:
            break
        set_rates(opts, base, args.rate * rate(progress))
        if progress > 1 - args.long and state["length"] == args.length:
            state.update(length=2 * args.length, epoch=0, at=0)
            order = sampler()
        loss_sum = 0.0
        for _ in range(args.accumulate):
            index = order.draw(args.batch * args.length // state["length"])
            batch, _ = text[state["length"]].train.take(index).tensors()
            with accelerator.autocast():
                loss = trained(input_ids=batch, labels=batch).loss
            accelerator.backward(loss / args.accumulate)
            loss_sum += float(loss.detach()) / args.accumulate
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        state["step"] += 1
        state["tokens"] += args.batch * args.accumulate * args.length
        state["seconds"] += time.time() - started
        rate_now = args.batch * args.accumulate * args.length / (time.time() - started)
        if state["step"] % 5 == 0:
            print(
                f"{state['step']:5d} {state['tokens'] / 1e6:7.2f}M loss {loss_sum:.4f} {rate_now:6.0f} tok/s "
                f"{progress:6.1%}",
                flush=True,
            )
        if time.time() - last_eval > 600:
            print(f"held-out {held_out_loss(model, text[2 * args.length].held_out):.4f}", flush=True)
            last_eval = time.time()
        if time.time() - last_save > 300:
            save()
            last_save = time.time()
    state["held_out_loss"] = held_out_loss(model, text[2 * args.length].held_out)
    save()
    print("done", json.dumps(state), flush=True)


if __name__ == "__main__":
    main()
