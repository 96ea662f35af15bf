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

MUON_LR, ADAMW_LR = 5e-3, 3e-3
WARMUP, DECAY = 0.02, 0.35  # shares of the budget


def llama(**shape: int) -> LlamaConfig:
    """What target and draft have in common, and a shape."""
    return LlamaConfig(
        vocab_size=data.VOCAB_SIZE,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **shape,
    )


def target_config() -> LlamaConfig:
    return llama(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=2,
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


class Batches:
    """Random windows, drawn without replacement within a pass; the state is (pass, position)."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int, aligned: bool = False):
        self.tokens, self.length, self.seed, self.aligned = tokens, length, seed, aligned
        self.epoch, self.at = 0, 0
        self._shuffle()

    def _shuffle(self) -> None:
        rng = np.random.default_rng((self.seed, self.epoch))
        offset = 0 if self.aligned else int(rng.integers(self.length))
        starts = np.arange(offset, len(self.tokens) - self.length + 1, self.length)
        self.order = rng.permutation(starts)

    def restore(self, epoch: int, at: int) -> None:
        self.epoch, self.at = epoch, at
        self._shuffle()

    def draw(self, size: int) -> torch.Tensor:
        if self.at + size > len(self.order):
            self.restore(self.epoch + 1, 0)
        rows = [self.tokens[s : s + self.length] for s in self.order[self.at : self.at + size]]
        self.at += size
        return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: np.ndarray, length: int = 512, windows: int = 64) -> float:
    model.eval()
    starts = np.linspace(0, len(tokens) - length - 1, windows).astype(int)
    total = 0.0
    for chunk in np.array_split(starts, max(1, windows // 8)):
        batch = torch.from_numpy(np.stack([tokens[s : s + length] for s in chunk]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            total += float(model(input_ids=batch, labels=batch).loss) * len(chunk)
    model.train()
    return total / windows


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
    train, held = data.encode_split(tokenizer, False), data.encode_split(tokenizer, True)
    accelerator = Accelerator(mixed_precision="bf16")
    model = LlamaForCausalLM(target_config())
    if args.init:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).state_dict())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} tokens", flush=True)
    opts = optimizers(model)
    batches = Batches(train, args.length, args.seed)
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "digest": data.digest(train)}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, value in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(value)
        state = saved["state"]
        batches = Batches(train, state["length"], args.seed + (state["length"] != args.length))
        batches.restore(state["epoch"], state["at"])
        print("resumed", state, flush=True)
    model = accelerator.prepare_model(model)
    if args.compile:
        model = torch.compile(model)
    base = [[g["lr"] for g in opt.param_groups] for opt in optimizers(accelerator.unwrap_model(model))]

    def save() -> None:
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        state.update(epoch=batches.epoch, at=batches.at, length=batches.length)
        payload = {"model": bare.state_dict(), "opts": [o.state_dict() for o in opts], "state": dict(state)}
        torch.save(payload, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        bare.save_pretrained(args.out / "model")
        (args.out / "state.json").write_text(json.dumps(state))

    model.train()
    last_save, last_eval = time.time(), time.time()
    while True:
        started = time.time()
        progress = max(state["seconds"] / 60 / args.minutes, state["tokens"] / args.tokens)
        if progress >= 1:
            break
        set_rates(opts, base, args.rate * rate(progress))
        if progress > 1 - args.long and batches.length == args.length:
            batches = Batches(train, 2 * args.length, args.seed + 1)
        loss_sum = 0.0
        for _ in range(args.accumulate):
            batch = batches.draw(args.batch * args.length // batches.length).to(accelerator.device)
            with accelerator.autocast():
                loss = model(input_ids=batch, labels=batch).loss
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
            print(f"held-out {held_out_loss(model, held):.4f}", flush=True)
            last_eval = time.time()
        if time.time() - last_save > 300:
            save()
            last_save = time.time()
    state["held_out_loss"] = held_out_loss(model, held)
    save()
    print("done", json.dumps(state), flush=True)


if __name__ == "__main__":
    main()
