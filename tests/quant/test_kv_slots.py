"""What stands in the slots after rewinds, commits of branches, forks and growth: what a fresh prefill writes."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

import specdec
from specdec import cli
from specdec.cli import options
from specdec.kernels import ops
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.quant.kv import KV_CACHES, bytes_per_token, kv_format
from specdec.runtime.backend import Backend
from specdec.runtime.cache import SlotLayer
from specdec.runtime.choose import open_backend
from specdec.runtime.session import Session
from specdec.tree import TokenTree

native = pytest.mark.skipif(not ops.available(), reason="no native kernels")
BACKENDS = [
    pytest.param("eager", torch.float64, id="eager"),
    pytest.param("compiled", torch.bfloat16, id="compiled", marks=native),
]


def stored(backend: Any, length: int) -> list[Tensor]:
    """Codes and scales of the first slots, layer after layer."""
    if hasattr(backend, "cache"):
        return [buffer[0, :, :length] for layer in backend.cache.layers for buffer in layer.buffers]
    slots, found = backend._slots, []
    for layer in range(slots.num_layers()):
        for name in ("keys", "values", "key_scales", "value_scales"):
            found.append(getattr(slots, name)(layer)[:, :length])
    return found


def walk(backend: Backend, seed: int, turns: int = 60) -> Session:
    """A text as speculation writes it: trees of which one path stays, rewinds, forks, growth over a bucket."""
    choose = random.Random(seed)
    session = Session(backend.fork(0))
    session.append([choose.randrange(60) for _ in range(100)])
    for turn in range(turns):
        parents = [choose.randrange(-1, i) for i in range(choose.randrange(1, 9))]
        tree = TokenTree.of([choose.randrange(60) for _ in parents], parents)
        session.forward(tree)
        path = [choose.randrange(len(parents))]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        path = path[: choose.randrange(len(path) + 1)]
        session.commit(path, [*(int(tree.tokens[node]) for node in path), choose.randrange(60)])
        if turn % 7 == 3:
            session.rewind(len(session.tokens) - choose.randrange(6))
        if turn % 11 == 5:
            session = session.fork()
    return session


def check(session: Session, backend: Backend) -> None:
    """The slots and the next logits are those of a session that has seen the same text and nothing else."""
    session.drop_tree()
    mine = session.forward().logits
    fresh = Session(backend.fork(0))
    fresh.append(list(session.tokens))
    its = fresh.forward().logits
    length = len(session.tokens)
    assert length > 128  # over the first bucket
    for a, b in zip(stored(session.backend, length), stored(fresh.backend, length), strict=True):
        assert torch.equal(a, b)
    tolerance = 0 if backend.numerics == "invariant" else 1e-9
    torch.testing.assert_close(mine, its, rtol=0, atol=tolerance)


def target(dtype: torch.dtype, kind: str = "gemma3") -> Any:
    return tiny_models.tiny(kind, dtype=dtype, head_dim=32)


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_many_rewinds_leave_what_a_fresh_prefill_writes(backend: str, dtype: torch.dtype, name: str) -> None:
    opened = open_backend(target(dtype), backend, kv_cache=name)
    check(walk(opened, seed=1), opened)


def forgets_scales(gather: Callable[..., None]) -> Callable[..., None]:
    def broken(self: Any, slots: Sequence[int], start: int) -> None:
        held = [t for t in stored(self, 256) if t.shape[-1] < 8]
        kept = [t.clone() for t in held]
        gather(self, slots, start)
        for t, old in zip(held, kept, strict=True):
            t.copy_(old)

    return broken


def rounds_again(gather: Callable[..., None]) -> Callable[..., None]:
    """Unpacks what it moves, and packs it anew by way of the other format's grid. (By its own it would hardly show.)"""

    def broken(self: Any, slots: Sequence[int], start: int) -> None:
        gather(self, slots, start)
        format, other = kv_format(self.kv_cache), kv_format("int8" if self.kv_cache == "mxfp8" else "mxfp8")
        buffers = [t[:, start : start + len(slots)] for t in stored(self, 256)]
        # Of a layer: keys, values, and their scales.
        for at in range(0, len(buffers), 4):
            for codes, scales in ((buffers[at], buffers[at + 2]), (buffers[at + 1], buffers[at + 3])):
                rows = other.unpack(*other.pack(format.unpack(codes, scales, torch.float32)), torch.float32)
                for part, again in zip((codes, scales), format.pack(rows), strict=True):
                    part.copy_(again)

    return broken


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize("breaks", [forgets_scales, rounds_again])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_broken_commit_is_caught(
    backend: str, dtype: torch.dtype, breaks: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_backend(target(dtype), backend, kv_cache=name)
    with torch.inference_mode():
        monkeypatch.setattr(type(opened), "gather", breaks(type(opened).gather))
        session = walk(opened, seed=1)
    with pytest.raises(AssertionError):
        check(session, opened)


@native
@pytest.mark.parametrize("name", KV_CACHES)
def test_both_backends_store_the_same_codes(name: str) -> None:
    model = target(torch.float64)
    sessions = [walk(open_backend(model, backend, kv_cache=name), seed=2) for backend in ("eager", "compiled")]
    assert sessions[0].tokens == sessions[1].tokens
    length = sessions[0].num_cached
    first, second = (stored(session.backend, length) for session in sessions)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert sessions[0].backend.num_bytes == sessions[1].backend.num_bytes
    rows = [session.forward(TokenTree.chain([1, 2])).logits for session in sessions]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-9)


def test_a_commit_moves_bytes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_backend(target(torch.float64), "eager", kv_cache="mxfp8")
    session = Session(opened.fork(0))
    session.append(list(range(20)))
    session.forward(TokenTree.of([1, 2, 3], [-1, -1, 1]))
    before = [t.clone() for t in stored(session.backend, 23)]
    monkeypatch.setattr(SlotLayer, "_stored", None)  # no row is rounded
    session.commit((1, 2), [2, 3, 4])
    for now, old in zip(stored(session.backend, 22), before, strict=True):
        assert torch.equal(now, old[:, [*range(20), 21, 22]])


# ------------------------------------------------------------------ quality, and what is shown


@pytest.mark.parametrize(("name", "most"), [("int8", 0.0005), ("mxfp8", 0.01)])
def test_logits_move_little(name: str, most: float) -> None:
    """Mean divergence from full precision on a page of code, in nats per token."""
    model = load_model(EMBEDDED / "target", device="cpu")
    ids = load_tokenizer(EMBEDDED / "target")(Path(specdec.__file__).read_text(encoding="utf-8"))["input_ids"][:256]

    def rows(kv_cache: str | None) -> Tensor:
        session = Session(open_backend(model, "eager", kv_cache=kv_cache).fork(0))
        session.append(ids[:1])
        return session.forward(TokenTree.chain(ids[1:])).logits.log_softmax(-1)

    exact, rounded = rows(None), rows(name)
    divergence = (exact.exp() * (exact - rounded)).sum(-1).mean()
    assert 0 < divergence < most
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("name", [None, *KV_CACHES])
@pytest.mark.parametrize("kind", [a for a in tiny_models.ARCHITECTURES if a not in ("gpt2", "phi", "gpt-neox")])
def test_configurations_tell_the_bytes_that_backends_measure(kind: str, name: str | None) -> None:
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = tiny_models.tiny(kind, dtype=torch.float32, attention=attention, head_dim=32)
    want = open_backend(model, "eager", kv_cache=name).bytes_per_token
    assert bytes_per_token(model.config, torch.float32, name) == want


@pytest.mark.parametrize("kind", ["gpt2", "phi", "gpt-neox"])
def test_configurations_without_a_head_size(kind: str) -> None:
    model = tiny_models.tiny(kind, dtype=torch.float32)
    want = open_backend(model, "eager", kv_cache="int8").bytes_per_token
    assert bytes_per_token(model.config, torch.float32, "int8") == want
    with pytest.raises(specdec.errors.UnsupportedModelError, match=r"heads of size 4, and mxfp8 stores blocks of 32"):
        bytes_per_token(model.config, torch.float32, "mxfp8")


def test_info_shows_bytes_per_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, row in ((None, 4 * 64), ("int8", 68), ("mxfp8", 66)):
        file = tmp_path / f"{name}.json"
        assert cli.main(["info", "--json", str(file), *(("--kv-cache", name) if name else ())]) == 0
        report = json.loads(file.read_text())
        assert report["kv_cache"] == name
        assert report["models"]["embedded target"]["kv_bytes_per_token"] == 18 * 2 * 2 * row
        assert f"{18 * 2 * 2 * row} B" in capsys.readouterr().out
    assert cli.main(["info", "--kv-cache", "int9"]) != 0
    assert "there are: int8, mxfp8" in capsys.readouterr().err


def test_the_command_line_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(specdec, "load", lambda *names, **options: seen.append(options["kv_cache"]))
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    options.add_method_options(parser)
    threads = torch.get_num_threads()
    for given in ([], ["--kv-cache", "mxfp8"]):
        options.build_decoder(parser.parse_args(given))
    torch.set_num_threads(threads)
    assert seen == [None, "mxfp8"]
