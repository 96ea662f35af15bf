"""Export a model to a folder, and open such a folder in place of the model."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

import specdec
from specdec.errors import UnsupportedModelError
from specdec.export import folder as folders
from specdec.export.code import code_hash
from specdec.export.exporter import EXPORTERS, Stored, Tell, exporter
from specdec.export.manifest import FILE, ArtifactError, Manifest, key_of, listed
from specdec.export.options import Options
from specdec.export.step import StaticStep
from specdec.quant.linear import num_parameters
from specdec.vocabulary import output_size

EMBEDDINGS = "embeddings.safetensors"
#: The text that a recipe's method looked at, by its tokens: with it the same weights can be made again.
CALIBRATION = "calibration.safetensors"


class ArtifactModel(nn.Module):
    """What stands for the model of an artefact wherever one is wanted: its configurations, and no weights.

    `specdec_backend` says what runs it; `specdec.load(folder)` and `ModelDrafter(ArtifactModel.open(folder))` do.
    """

    input_width = 0
    device = torch.device("cpu")

    def __init__(self, folder: Path, manifest: Manifest, config: Any, generation_config: Any):
        super().__init__()
        self.folder, self.manifest = folder, manifest
        self.specdec_backend = manifest.backend
        self.config, self.generation_config = config, generation_config
        self.runtime_options: dict[str, Any] = {}
        self.eval()

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> ArtifactModel:
        """`options` go to the backend that will run it.

        Raises `ArtifactError`, naming the field, for a folder that is not what its manifest says.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        config = AutoConfig.from_pretrained(str(folder))
        try:
            generation = GenerationConfig.from_pretrained(str(folder))
        except OSError:  # the model had none
            generation = GenerationConfig.from_model_config(config)
        model = cls(folder, manifest, config, generation)
        model.runtime_options = options
        return model

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.manifest.model["dtype"])
        return dtype

    @property
    def exported_parameters(self) -> int:
        return int(self.manifest.model["parameters"])

    @property
    def _shared(self) -> dict[str, torch.Tensor]:
        """Embeddings and output head, which come along where the graphs give hidden states."""
        path = self.folder / EMBEDDINGS
        return load_file(path) if EMBEDDINGS in self.manifest.files else {}

    def get_input_embeddings(self) -> nn.Module:
        """Of drafters that read hidden states, and tokens as the target does."""
        shared = self._shared
        if "input" not in shared:
            raise UnsupportedModelError(
                f"{self.folder} holds no embeddings, which this drafter shares with its target: they come along with "
                "hidden states, specdec export --hidden I,I"
            )
        table: nn.Module = nn.Embedding.from_pretrained(shared["input"])
        return table

    def get_output_embeddings(self) -> nn.Module:
        """A head that has no weights where nobody can need them but to know how many tokens there are."""
        shared = self._shared
        size, width = int(self.manifest.model["vocab_size"]), int(self.manifest.model["hidden_size"])
        with torch.device("meta"):
            head = nn.Linear(width, size, bias="output_bias" in shared)
        if shared:
            weight = shared.get("output", shared["input"])  # tied ones are stored once
            head.weight = nn.Parameter(weight, requires_grad=False)
        if head.bias is not None:
            head.bias = nn.Parameter(shared["output_bias"], requires_grad=False)
        return head

    def forward(self, *args: object, **kwargs: object) -> Any:
        raise UnsupportedModelError(
            f"{self.folder} holds graphs of fixed shape and no weights; decode with it, or load the original model"
        )


def model_hash(model: Any) -> str:
    """Of the configuration and every weight, by name: the same hash means the same logits."""
    digest = hashlib.sha256()
    # Where it came from, and what saving adds: nothing that logits depend on.
    left_out = ("_name_or_path", "transformers_version", "architectures", "dtype")
    config = {k: v for k, v in model.config.to_dict().items() if k not in left_out}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def contract_of(model: Any, step: StaticStep, options: Options, stored: Stored | None = None) -> dict[str, Any]:
    """All that a program of this model and these options depends on, as plain data.

    `stored`: how the weights were rounded before; `model` is what they were.
    """
    versions = exporter(options.backend).versions()
    config = model.config.get_text_config(decoder=True)
    return {
        "backend": options.backend,
        "options": options.as_dict(),
        "model": {
            "class": type(model).__name__,
            "sha256": model_hash(model),
            "parameters": num_parameters(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocab_size": output_size(model),
            "hidden_size": int(config.hidden_size),
            "attention_kinds": list(step.kinds),
            "sliding_window": getattr(config, "sliding_window", None),
            "slots": [[shape.heads, shape.key_size, shape.value_size] for shape in step.shapes],
            **({} if stored is None else {"stored": stored.facts}),
        },
        "versions": {
            **versions,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "specdec": specdec.__version__,
            "export_code": code_hash(EXPORTERS[options.backend].partition(":")[0]),
        },
    }


def export(
    model: Any,
    options: Options,
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    calibration_BT: Tensor | None = None,
    tell: Tell = lambda _: None,
) -> Path:
    """Write a model as an artefact of the backend whose options are given. Returns its folder: `out`, or kept by key.

    The same model with the same options and versions is exported once: later calls find it. Nothing is there under its
    name until all of it is. Minutes for a dozen layers; `tell` hears of each stage.

    `calibration_BT`: tokens of text, for recipes whose method looks at activations (`recipes.needs_text`).

    Lossless: yes; greedy texts are those of the model but for ties within float32 rounding. With a recipe they are
    those of the rounded model, plain and speculative alike.
    Raises `InputError` for options that do not fit, `UnsupportedModelError` for models that cannot be exported.
    """
    made_by = exporter(options.backend)
    made_by.check(model, options)
    if out is not None:
        folders.check_free(Path(out))
    made_by.versions()  # refuses before anything is spent
    stored = made_by.store(model, options, calibration_BT)
    step = made_by.step(model if stored is None else stored.model, options)
    contract = contract_of(model, step, options, stored)
    kept = folders.artifacts_folder() / key_of(contract)
    if not _is_whole(kept):
        beside = {} if stored is None else {"stored_bytes": stored.num_bytes}
        looked_at = calibration_BT if stored is not None and stored.facts.get("calibration") else None
        _write(kept, model, tokenizer, step, options, contract, tell, beside, looked_at)
    else:
        tell("found among those made before")
    if out is None:
        return kept
    folders.duplicate(kept, Path(out))
    return Path(out)


def _is_whole(folder: Path) -> bool:
    """Whether an earlier export can be used; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        Manifest.read(folder)
    except ArtifactError:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        return False
    return True


def _embeddings(model: Any) -> dict[str, torch.Tensor]:
    """What drafters borrow of their target."""
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    found = {"input": weight.detach().contiguous()}
    if head.weight is not weight:
        found["output"] = head.weight.detach().contiguous()
    if getattr(head, "bias", None) is not None:
        found["output_bias"] = head.bias.detach().contiguous()
    return found


def _write(
    target: Path,
    model: Any,
    tokenizer: Any,
    step: StaticStep,
    options: Options,
    contract: dict[str, Any],
    tell: Tell,
    sizes: dict[str, int],
    calibration_BT: Tensor | None,
) -> None:
    started, made_by = time.perf_counter(), exporter(options.backend)
    with folders.aside(target) as made:
        about = made_by.lower(step, options, contract, made, tell)
        program_bytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        model.config.save_pretrained(made)
        if model.can_generate():
            model.generation_config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        if options.hidden:
            save_file(_embeddings(model), made / EMBEDDINGS)
        if calibration_BT is not None:
            save_file({"tokens": calibration_BT.to(torch.int32).contiguous()}, made / CALIBRATION)
        files = listed(made)
        sizes |= {
            "program_bytes": program_bytes,
            "weight_bytes": sum(p.nbytes for p in model.parameters()),
            "slot_bytes": step.bytes_per_token * (options.num_slots + 1),
        }
        about |= {
            "sizes": sizes,
            "total_seconds": round(time.perf_counter() - started, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        Manifest(contract, files, about).write(made)  # last: a folder without one is nothing
        assert (made / FILE).is_file()
