"""Delegates of ExecuTorch by name: what is missing is said; what compiles without hardware is refused to run here."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch

from specdec.errors import InputError
from specdec.export.delegates import DELEGATES, check_runtime, partitioners
from specdec.export.executorch import ExecutorchOptions

BARE = {"prefill_len": 1, "k": (0,), "max_seq_len": 16, "max_nodes": 0}


def test_only_some_delegates_take_graphs_with_slots() -> None:
    assert {name for name, delegate in DELEGATES.items() if delegate.owns} == {"xnnpack", "portable"}
    for name in DELEGATES:
        assert ExecutorchOptions(delegate=name, kv="host").delegate == name
    for kv in ("graph", "both"):
        with pytest.raises(InputError, match=r"vulkan delegate takes no graphs .*--kv host"):
            ExecutorchOptions(delegate="vulkan", kv=kv)
    with pytest.raises(
        InputError, match="delegate is one of xnnpack, portable, vulkan, coreml, openvino, qnn, not 'gpu'"
    ):
        ExecutorchOptions(delegate="gpu")
    with pytest.raises(InputError, match="kv is one of graph, host, both"):
        ExecutorchOptions(kv="device")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    with pytest.raises(InputError, match=r"qnn delegate cannot compile here.*QNN_SDK_ROOT.*--backend qnn"):
        partitioners("qnn")
    assert partitioners("portable") == []
    tiny_artifacts.needs_executorch()
    for name, package in (("openvino", "openvino"), ("coreml", "coremltools")):
        monkeypatch.setitem(sys.modules, package, None)  # not installed, whatever is
        for module in [m for m in sys.modules if m.startswith(f"executorch.backends.{name}")]:
            monkeypatch.delitem(sys.modules, module)
        with pytest.raises(InputError, match=f"{name} delegate cannot compile here, it lacks .*pip install {package}"):
            partitioners(name)


def test_a_runtime_without_the_delegate_is_refused_by_name() -> None:
    check_runtime("xnnpack", ["XnnpackBackend", "QnnBackend"], "artefact")
    check_runtime("portable", [], "artefact")
    with pytest.raises(InputError, match=r"artefact was compiled for VulkanBackend.*\(it has XnnpackBackend\)"):
        check_runtime("vulkan", ["XnnpackBackend"], "artefact")


def _tiny() -> Any:
    return tiny_models.tiny("llama", dtype=torch.float32, num_hidden_layers=1)


@pytest.mark.parametrize("name", ["vulkan", "coreml"])
def test_what_compiles_without_hardware_compiles_and_is_refused_here(name: str) -> None:
    """The whole graph goes to the delegate."""
    folder = tiny_artifacts.export(_tiny(), ExecutorchOptions(delegate=name, kv="host", **BARE))
    from specdec.export.artifact import ArtifactModel
    from specdec.runtime.backends.executorch import ExecutorchBackend

    model = ArtifactModel.open(folder)
    found = model.manifest.about["coverage"]["host_step_1"]
    assert found["delegates"] == 1
    assert found["delegated"] > 10 * found["outside"]
    with pytest.raises(InputError, match=f"was compiled for {DELEGATES[name].runtime}, which .* does not have"):
        ExecutorchBackend.open(model)
