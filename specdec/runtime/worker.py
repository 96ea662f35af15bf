"""Compile a step in another process, so that decoding goes on meanwhile.

The worker builds the model from its configuration, without weights: the graph holds none.
"""

from __future__ import annotations

import atexit
import importlib
import json
import subprocess
import sys
import tempfile

import torch

from specdec.dtypes import dtype_name
from specdec.kernels import ops
from specdec.quant.hf import empty_model
from specdec.runtime import graph
from specdec.runtime.native import NativeModel
from specdec.vocabulary import cut_head, output_size


class Worker:
    """One compilation under way. `finished` polls; `failure` is the reason in one line, or None."""

    def __init__(self, model: NativeModel):
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (outlives this)
        inner = model.model
        order = {
            "module": type(inner).__module__,
            "name": type(inner).__qualname__,
            "config": inner.config.to_dict(),
            "dtype": dtype_name(inner.dtype),
            "hidden": model.hidden,
            "head_rows": output_size(inner),
            "dtypes": {name: dtype_name(tensor.dtype) for name, tensor in graph.tensors(model).items()},
            "fingerprint": graph.fingerprint(model),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "specdec.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order, default=str))
        self._process.stdin.close()
        atexit.register(self._process.kill)

    @property
    def finished(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> None:
        self._process.wait()

    @property
    def failure(self) -> str | None:
        if not self._process.returncode:
            return None
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"the compiling process ended with code {self._process.returncode}"


def main() -> None:
    from transformers.initialization import no_init_weights

    order = json.load(sys.stdin)
    if order["module"].partition(".")[0] not in ("transformers", "specdec"):
        raise SystemExit(f"{order['name']} is not a model of transformers: compile it with decoder.warmup()")
    kind = getattr(importlib.import_module(order["module"]), order["name"])
    config = kind.config_class.from_dict(order["config"])
    with no_init_weights():  # buffers have their values: small ones are written into the code
        empty = empty_model(kind, config, getattr(torch, order["dtype"]))
    if order["head_rows"] != output_size(empty):  # of a draft vocabulary
        empty = cut_head(empty, torch.arange(order["head_rows"]))
    model = NativeModel(empty, order["hidden"])
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        # A model that was converted after loading has its buffers in other dtypes than its class makes them.
        parent, _, leaf = name.rpartition(".")
        wanted = getattr(torch, order["dtypes"].get(name, dtype_name(buffer.dtype)))
        model.get_submodule(parent).register_buffer(leaf, buffer.to(wanted))
    if graph.fingerprint(model) != order["fingerprint"]:
        raise SystemExit("the model was changed after loading: compile it with decoder.warmup()")
    graph.compile(model, ops.steps().handle())


if __name__ == "__main__":
    main()
