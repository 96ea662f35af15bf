"""The training loop: one for all kinds of drafters, on one device or on several processes through accelerate.

The target runs without gradients, once a batch; the drafter's gradients are averaged over processes by one reduction of
a step, so a kind may call its module as often, and in whichever parts, as it likes.

Learning rate, evaluations and the end of the run follow the share of the budget (steps, minutes, whichever is spent
sooner) that is used. With a budget of steps alone, the same seed gives the same weights, interrupted or not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.train import checkpoint, provenance
from specdec.train.data import Rows, Sampler, TrainingData
from specdec.train.objective import Acceptance, Batch, Losses, Objective
from specdec.train.processes import process_group
from specdec.train.progress import Progress, StopSignal
from specdec.train.settings import Report, Settings, State, build_optimizers, fast_precision, rate

# What the target says of held-out rows is kept between evaluations, if it fits in so much memory.
_KEPT_BYTES = 512 << 20


@torch.no_grad()
def look(target: Any, tokens_BL: Tensor, mask_BL: Tensor, hidden: tuple[int, ...] = ()) -> Batch:
    """What the target says about rows, in one forward."""
    out = target(input_ids=tokens_BL, use_cache=False, output_hidden_states=bool(hidden))
    logits = out.logits if out.logits.dtype == torch.float64 else out.logits.float()
    states = out.hidden_states or ()
    if hidden and not 0 <= min(hidden) <= max(hidden) < len(states):
        raise InputError(f"the target has hidden states 0 to {len(states) - 1}; {sorted(hidden)} were asked for")
    return Batch(tokens_BL, mask_BL, logits, {i: states[i] for i in hidden})


class _Run:
    """One call of `train`."""

    def __init__(self, objective: Objective, data: TrainingData, settings: Settings, progress: Progress):
        self.objective, self.data, self.progress = objective, data, progress
        target = objective.target
        self.device = next(target.parameters()).device
        if settings.precision == "auto":
            settings = replace(settings, precision=fast_precision(self.device))
        self.settings = settings
        self.accelerator = process_group(self.device)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if target.training:
            raise InputError("the target is in training mode, where it is not itself; call target.eval() first")
        torch.manual_seed(settings.seed)
        objective.begin(data.train.tokens_RL)
        self.module = objective.module.to(self.device)
        # Other chance in each process; weights are the first one's.
        torch.manual_seed(settings.seed + 1 + self.rank)
        self._average([p.data for p in self.module.parameters()])
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(self.module, settings)
        self.sampler = Sampler(len(data.train), settings.seed)
        self.state = State()
        self.best: checkpoint.Weights | None = None
        self.kept: list[Batch] | None = None
        self.store = checkpoint.Store(settings.out, self.accelerator)
        self.identity = {
            "kind": objective.kind,
            "options": json.loads(json.dumps(dict(objective.values), default=str)),
            "target": provenance.fingerprint(target),
            "data": data.digest,
            "processes": self.world,
            **settings.identity(),
        }

    # ------------------------------------------------------------ checkpoints

    def resume(self) -> None:
        """Go on from the output folder's checkpoint, if there is one; `InputError` if it belongs to another run."""
        if not self.settings.resume:
            self.store.clear()
            return
        path = checkpoint.latest(self.settings.out)
        if path is None:
            return
        checkpoint.check_identity(path, self.identity)
        state, self.best = self.store.read(path, self.module, self.optimizers)
        self.state = State(**state["state"])
        self.sampler.restore(self.state.epoch, self.state.at)
        self.progress.say(f"going on at step {self.state.step}")

    def keep(self) -> None:
        self.state.epoch, self.state.at = self.sampler.epoch, self.sampler.at
        content = {"identity": self.identity, "state": asdict(self.state)}
        self.store.write(self.state.step, content, self.module, self.optimizers, self.best)

    # ------------------------------------------------------------ steps

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their mean over the processes."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        flat = self.accelerator.reduce(flat, reduction="mean")
        for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    def batch_of(self, rows: Rows, training: bool = False) -> Batch:
        tokens_BL, mask_BL = (tensor.to(self.device) for tensor in rows.tensors())
        if training:
            with torch.no_grad():
                tokens_BL, mask_BL = self.objective.replace(tokens_BL, mask_BL)
        with self.autocast():
            return look(self.objective.target, tokens_BL, mask_BL, self.objective.hidden)

    def step(self, share: float) -> Losses:
        settings = self.settings
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate(share, settings.warmup)
        for _ in range(settings.accumulate):
            index = self.sampler.draw(settings.batch * self.world)[self.rank :: self.world]
            batch = self.batch_of(self.data.train.take(index), training=True)
            with self.autocast():
                losses = self.objective.loss(batch)
            (losses.loss / settings.accumulate).backward()
            self.state.tokens += batch.tokens_BL.numel() * self.world
        if self.world > 1:
            for parameter in self.parameters:
                if parameter.grad is None:  # not used here, perhaps in another process
                    parameter.grad = torch.zeros_like(parameter)
            self._average([p.grad for p in self.parameters if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        if not bool(norm.isfinite()):
            raise InputError(
                f"the gradient of step {self.state.step + 1} is not finite; lower --lr, or use --precision fp32. "
                "The last checkpoint is kept"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return losses

    # ------------------------------------------------------------ held-out text

    def held_out(self) -> list[Rows]:
        """The rows to judge by, spread over all there are, in batches."""
        rows, batch = self.data.held_out, self.settings.batch
        count = min(len(rows), self.settings.evaluation_rows)
        index = torch.linspace(0, len(rows) - 1, count).round().long().unique().numpy()
        return [rows.take(index[i : i + batch]) for i in range(0, len(index), batch)]

    @torch.no_grad()
    def acceptance(self) -> Acceptance:
        self.module.eval()
        found = Acceptance()
        found.reached = torch.zeros(2, self.objective.depth + 1, dtype=torch.float64)
        fresh: list[Batch] = []
        num_bytes = 0
        for batch in self.kept or (self.batch_of(rows) for rows in self.held_out()[self.rank :: self.world]):
            with self.autocast():
                found.add(*self.objective.judge(batch))
            if self.kept is None:
                num_bytes += batch.logits_BLV.nbytes + sum(states.nbytes for states in batch.hidden.values())
                fresh = [*fresh, batch] if num_bytes <= _KEPT_BYTES else []
        if self.kept is None and num_bytes <= _KEPT_BYTES:
            self.kept = fresh
        if self.world > 1:
            sums = found.sums(self.objective.measures).to(self.device)
            found.restore(self.accelerator.reduce(sums, reduction="sum").cpu(), self.objective.measures)
        self.module.train()
        return found

    def evaluate(self) -> None:
        found, state = self.acceptance(), self.state
        row: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1)}
        for temperature in (1, 0):
            row[f"expected_length_t{temperature}"] = found.expected_length(temperature)
            row[f"alpha_t{temperature}"] = found.by_position(temperature)
        row.update(found.means())
        state.curve.append(row)
        key = f"expected_length_t{self.settings.judged_at}"
        if not self.objective.settled:
            self.best = None
        elif self.best is None or row[key] > state.curve[state.best][key]:
            state.best, state.stale = len(state.curve) - 1, 0
            self.best = checkpoint.snapshot(self.module)
        else:
            state.stale += 1
        self.progress.held_out(row, self.objective.described(row), self.best is not None and state.stale == 0)

    # ------------------------------------------------------------ the loop

    def share(self) -> float:
        """Of the budget, spent. The first process's clock counts."""
        settings, state = self.settings, self.state
        by_step = state.step / settings.steps if settings.steps else 0.0
        by_time = state.seconds / 60 / settings.minutes if settings.minutes else 0.0
        return max(by_step, by_time)

    def agree(self, share: float, asked: bool) -> tuple[float, bool]:
        """The first process's share, and whether any process was asked to stop."""
        if self.world == 1:
            return share, asked
        mine = torch.tensor([share if self.rank == 0 else 0.0, float(asked)], dtype=torch.float64, device=self.device)
        both = self.accelerator.reduce(mine, reduction="sum").tolist()
        return both[0], both[1] > 0

    def loop(self) -> None:
        settings, state = self.settings, self.state
        self.module.train()
        if not state.curve:
            self.evaluate()
            self.objective.advance(0.0)
        started, saved_at = time.monotonic() - state.seconds, time.monotonic()
        share = self.share()
        with StopSignal() as signal:
            while state.ended is None:
                losses = self.step(share)
                state.seconds = time.monotonic() - started
                share, asked = self.agree(self.share(), signal.is_set)
                self.objective.advance(share)
                self.progress.step(share, state, losses)
                if int(min(share, 1.0) * settings.evaluations + 1e-9) > state.evaluated:
                    state.evaluated = int(min(share, 1.0) * settings.evaluations + 1e-9)
                    self.evaluate()
                    state.seconds = time.monotonic() - started
                if share >= 1:
                    state.ended = "steps" if settings.steps and state.step >= settings.steps else "minutes"
                elif settings.patience and state.stale >= settings.patience:
                    state.ended = "stale"
                due = self.agree(0.0, time.monotonic() - saved_at > 60 * settings.checkpoint_minutes)[1]
                if due or asked or state.ended is not None:
                    self.keep()
                    saved_at = time.monotonic()
                if asked and state.ended is None:
                    self.progress.say(f"stopped at step {state.step}; the same command goes on from here")
                    raise KeyboardInterrupt

    def finish(self) -> Report:
        """The best weights, in the drafter's own format, and where they came from."""
        state, settings = self.state, self.settings
        assert self.best is not None
        self.module.load_state_dict(self.best)
        self.module.eval()
        row = state.curve[state.best]
        if self.accelerator.is_main_process:
            aside = settings.out / "saving.partial"
            aside.mkdir(parents=True, exist_ok=True)
            self.objective.save(aside)
            if self.objective.tokenizer is not None:
                self.objective.tokenizer.save_pretrained(aside)
            for file in sorted(aside.iterdir()):
                file.replace(settings.out / file.name)
            aside.rmdir()
            provenance.write(settings.out, self.record(row))
        self.accelerator.wait_for_everyone()
        return Report(
            settings.out,
            self.objective.kind,
            state.step,
            state.tokens,
            state.seconds,
            str(state.ended),
            state.curve,
            row,
        )

    def record(self, best: Mapping[str, Any]) -> dict[str, Any]:
        state = self.state
        return {
            **self.identity,
            "data": {"digest": self.data.digest, **self.data.source},
            "num_train_rows": len(self.data.train),
            "num_held_out_rows": len(self.data.held_out),
            "row_length": self.data.train.length,
            "num_trained_parameters": sum(p.numel() for p in self.parameters),
            "tokens_seen": state.tokens,
            "steps_done": state.step,
            "wall_seconds": round(state.seconds, 1),
            "ended": state.ended,
            "best": dict(best),
            "held_out_curve": state.curve,
        }


def train(objective: Objective, data: TrainingData, settings: Settings, progress: Progress | None = None) -> Report:
    """Train until the budget is spent or held-out acceptance stays where it is; go on where an earlier run stopped.

    Raises `InputError` if `settings.out` holds a run with other options, and `KeyboardInterrupt` after a signal, when
    the checkpoint is written.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    progress = progress or Progress(None)
    run = _Run(objective, data, settings, progress)
    run.resume()
    with progress:
        run.loop()
        return run.finish()
