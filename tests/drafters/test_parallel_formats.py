"""DFlash folders, written here in each published layout, against a plain recomputation; and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_dflash
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from specdec.drafters import ParallelDrafter
from torch import Tensor

from specdec import loading
from specdec.drafter import BuildContext
from specdec.errors import DrafterWarning, IncompatiblePairError, InputError, UnsupportedModelError
from specdec.formats import dflash as files
from specdec.formats.dflash_check import check_convention
from specdec.loading import load_tokenizer
from specdec.models.dflash_text import DFlashNetwork

TOKENS = [3, 5, 7, 3, 50, 7, 3, 5, 9, 11, 2, 60]
MASK, BLOCK = 63, 5
LAYERS = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": tiny_dflash.THETA,
    "max_position_embeddings": 256,
    "vocab_size": tiny_models.VOCAB,
    "attention_bias": False,
}


def target() -> Any:
    return tiny_models.tiny("llama", num_hidden_layers=3, layer_types=None)


def weights(num_ids: int = 2, seed: int = 0, **more: Tensor) -> dict[str, Tensor]:
    """Random tensors under the published names, float64."""
    generator = torch.Generator().manual_seed(seed)

    def made(*size: int) -> Tensor:
        return 0.4 * torch.randn(*size, generator=generator, dtype=torch.float64)

    found = {"fc.weight": made(16, 16 * num_ids), "hidden_norm.weight": 1 + made(16), "norm.weight": 1 + made(16)}
    for i in range(2):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        found |= {f"{attention}{k}_proj.weight": made(32 if k == "q" else 16, 16) for k in "qkv"}
        found |= {f"{attention}{k}_norm.weight": 1 + made(8) for k in "qk"}
        found |= {f"{attention}o_proj.weight": made(16, 32), f"{mlp}down_proj.weight": made(16, 24)}
        found |= {f"{mlp}{k}_proj.weight": made(24, 16) for k in ("gate", "up")}
        found |= {f"layers.{i}.{k}_layernorm.weight": 1 + made(16) for k in ("input", "post_attention")}
    return found | more


def z_lab(folder: Path, ids: tuple[int, ...] = (0, 2), inside: bool = False, **changes: Any) -> Path:
    own: dict[str, Any] = {"mask_token_id": MASK, "target_layer_ids": list(ids)}
    config = {**LAYERS, "architectures": ["DFlashDraftModel"], "num_target_layers": 3, "dflash_config": own}
    (own if inside else config)["block_size"] = BLOCK
    return write(folder, {**config, **changes}, weights(len(ids)))


def speculators(folder: Path, ids: tuple[int, ...] = (1, 3), more: dict[str, Tensor] | None = None, **changes: Any):
    config = {
        "speculators_model_type": "dflash",
        "architectures": ["DFlashSpeculator"],
        "transformer_layer_config": dict(LAYERS),
        "draft_vocab_size": tiny_models.VOCAB,
        "block_size": BLOCK,
        "aux_hidden_state_layer_ids": list(ids),
        "mask_token_id": MASK,
        "speculators_config": {"algorithm": "dflash"},
    }
    config["transformer_layer_config"].update(changes.pop("layers", {}))
    return write(folder, {**config, **changes}, weights(len(ids), **(more or {})))


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@torch.no_grad()
def both(
    model: Any, folder: Path, ids: tuple[int, ...], mask: Tensor | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    """Logits of the library and of the plain recomputation; `ids`: of `hidden_states`."""
    made = loading.resolve_drafter(str(folder), BuildContext(model))
    assert isinstance(made, ParallelDrafter)
    states = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    read = [states[i][0, :-1] for i in made.hidden]
    text = made.network.open()
    for first, last in ((0, 4), (4, 5), (5, len(TOKENS) - 1)):
        text.append(torch.cat(read, -1)[first:last])
    found = text.logits(TOKENS[-1], made.network.num_positions)
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    table = model.get_input_embeddings().weight
    head = how.pop("head", model.get_output_embeddings().weight)
    plain = tiny_dflash.says(
        tensors,
        [states[i][0, :-1] for i in ids],
        TOKENS[-1],
        table,
        head,
        table[MASK] if mask is None else mask,
        block=BLOCK,
        **how,
    )
    return found, plain


def close(pair: tuple[Tensor, Tensor]) -> bool:
    assert pair[0].shape == pair[1].shape
    return bool((pair[0] - pair[1]).abs().max() <= 1e-9)


@pytest.mark.parametrize("inside", [False, True])
def test_z_lab(tmp_path: Path, inside: bool) -> None:
    folder = z_lab(tmp_path, inside=inside)
    assert close(both(target(), folder, (1, 3)))


def test_the_comparison_sees_another_layer_and_another_mask(tmp_path: Path) -> None:
    """Negative controls: layers off by one, a block that is causal, another mask vector."""
    folder, model = z_lab(tmp_path), target()
    assert not close(both(model, folder, (0, 2)))
    assert not close(both(model, folder, (1, 3), causal=(True, True)))
    assert not close(both(model, folder, (1, 3), mask=torch.zeros(16, dtype=torch.float64)))


def test_z_lab_pickled_and_sharded(tmp_path: Path) -> None:
    folder, model = z_lab(tmp_path / "a"), target()
    expected = both(model, folder, (1, 3))[1]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(_logits(model, folder), _logits(model, z_lab(tmp_path / "b")))
    (folder / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (_logits(model, folder) - expected).abs().max() <= 1e-9


def _logits(model: Any, folder: Path) -> Tensor:
    return both_of(DFlashNetwork(model, files.read(folder)[0]), model)


@torch.no_grad()
def both_of(network: DFlashNetwork, model: Any) -> Tensor:
    states = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    text = network.open()
    text.append(torch.cat([states[i][0, :-1] for i in network.hidden], -1))
    return text.logits(TOKENS[-1], network.num_positions)


def test_a_mask_embedding_beside_the_weights(tmp_path: Path) -> None:
    vector = torch.randn(16, dtype=torch.float64)
    folder = z_lab(tmp_path)
    torch.save(vector, folder / "mask_embedding.pt")
    assert close(both(target(), folder, (1, 3), mask=vector))


def test_z_lab_scales_and_caps(tmp_path: Path) -> None:
    own = {"mask_token_id": MASK, "target_layer_ids": [0, 2], "input_embedding_scale": 1.5, "output_multiplier": 0.5}
    folder = z_lab(tmp_path, dflash_config={**own, "final_logit_softcapping": 3.0})
    model = target()
    table = model.get_input_embeddings().weight
    found, _ = both(model, folder, (1, 3))
    with torch.no_grad():
        states = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
        plain = tiny_dflash.says(
            weights(),
            [states[i][0, :-1] for i in (1, 3)],
            TOKENS[-1],
            1.5 * table,
            model.get_output_embeddings().weight,
            1.5 * table[MASK],
            block=BLOCK,
        )
    assert (found - 3.0 * torch.tanh(0.5 * plain / 3.0)).abs().max() <= 1e-9


def test_speculators(tmp_path: Path) -> None:
    model, folder = target(), speculators(tmp_path)
    assert close(both(model, folder, (1, 3)))
    assert not close(both(model, folder, (2, 3)))


def test_speculators_from_the_anchor(tmp_path: Path) -> None:
    folder = speculators(tmp_path, sample_from_anchor=True)
    assert close(both(target(), folder, (1, 3), from_anchor=True))


SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True}


@pytest.mark.parametrize("free", [False, True])
def test_speculators_sliding_layers(tmp_path: Path, free: bool) -> None:
    folder = speculators(tmp_path, layers=SLIDING, sliding_window_non_causal=free)
    how = {"windows": (0, 4), "causal": (False, not free)}
    assert close(both(target(), folder, (1, 3), **how))
    assert not close(both(target(), folder, (1, 3), windows=(0, 5), causal=(False, not free)))
    assert not close(both(target(), folder, (1, 3), windows=(0, 4), causal=(False, free)))


def test_speculators_draft_vocabulary(tmp_path: Path) -> None:
    ids = torch.tensor([2, 5, 6, 30, 63])
    head = torch.randn(5, 16, dtype=torch.float64)
    more = {
        "lm_head.weight": head,
        "d2t": ids - torch.arange(5),
        "t2d": torch.zeros(64, dtype=torch.bool).index_fill(0, ids, True),
        "embed_tokens.weight": torch.zeros(64, 16),  # a copy that some files carry; the target's is taken
    }
    model, folder = target(), speculators(tmp_path, more=more, draft_vocab_size=5)
    assert close(both(model, folder, (1, 3), head=head))
    assert DFlashNetwork(model, files.read(folder)[0]).ids_R.tolist() == ids.tolist()


# ---------------------------------------------------------------- what is refused


def _broken(folder: Path, change: str) -> Path:
    z_lab(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    own = config["dflash_config"]
    if change == "lacks a tensor":
        del tensors["fc.weight"]
    elif change == "holds another":
        tensors["layers.0.attention_conv.base_kernel"] = torch.zeros(2, 3, 16)
    elif change == "wrong shape":
        tensors["layers.1.self_attn.q_proj.weight"] = torch.zeros(8, 16)
    elif change == "no mask":
        del own["mask_token_id"]
    elif change == "domino":
        own["projector_type"] = "domino"
    elif change == "block of one":
        config["block_size"] = 1
    elif change == "ids are no list":
        own["target_layer_ids"] = "1,2"
    elif change == "a negative width":
        config["hidden_size"] = -16
    elif change == "another family":
        config["model_type"] = "llama"
    elif change == "uneven heads":
        config["num_attention_heads"] = 3
    elif change == "dynamic positions":
        config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    elif change == "a recurrent layer":
        config["layer_types"] = ["full_attention", "linear_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    if change == "damaged":
        (folder / "model.safetensors").write_bytes(b"not a file of tensors")
    if change == "no weights":
        (folder / "model.safetensors").unlink()
    if change == "no json":
        (folder / "config.json").write_text("{")
    return folder


REFUSED = {
    "lacks a tensor": "lack 1 tensors",
    "holds another": "also hold 1 tensors",
    "wrong shape": r"q_proj.weight has shape \[8, 16\]",
    "no mask": "mask_embedding",
    "domino": "projector",
    "block of one": "block_size",
    "ids are no list": "target_layer_ids",
    "a negative width": "hidden_size",
    "another family": "'llama'",
    "uneven heads": "groups",
    "dynamic positions": "'dynamic'",
    "a recurrent layer": "linear_attention",
    "damaged": "cannot read",
    "no weights": "no weights",
    "no json": "config.json",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused(tmp_path: Path, change: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[change]):
        files.read(_broken(tmp_path, change))


def test_another_targets_draft_is_refused(tmp_path: Path) -> None:
    def opened(folder: Path, model: Any) -> None:
        DFlashNetwork(model, files.read(folder)[0])

    with pytest.raises(IncompatiblePairError, match="wide"):
        opened(z_lab(tmp_path / "width"), tiny_models.tiny("llama", hidden_size=32, num_hidden_layers=3))
    with pytest.raises(IncompatiblePairError, match="3 layers, and this one has 2"):
        opened(z_lab(tmp_path / "depth"), tiny_models.tiny("llama"))
    with pytest.raises(IncompatiblePairError, match="hidden state 4"):
        opened(z_lab(tmp_path / "ids", (0, 3)), target())
    own = {"mask_token_id": 64, "target_layer_ids": [0, 2]}
    with pytest.raises(IncompatiblePairError, match="mask token 64"):
        opened(z_lab(tmp_path / "mask", dflash_config=own), target())
    more = {"lm_head.weight": torch.zeros(3, 16), "d2t": torch.tensor([0, 0, 90])}
    with pytest.raises(IncompatiblePairError, match="d2t"):
        opened(speculators(tmp_path / "d2t", more=more, draft_vocab_size=3), target())


def test_options_and_missing_folders(tmp_path: Path) -> None:
    context = BuildContext(target(), source=str(z_lab(tmp_path)))
    with pytest.raises(InputError, match="'layers'"):
        ParallelDrafter.build(context, layers=3)
    with pytest.raises(InputError, match="layer_ids is one of"):
        ParallelDrafter.build(context, layer_ids="inputs")
    for source in (None, "org/name"):
        with pytest.raises(InputError, match="folder of DFlash weights"):
            ParallelDrafter.build(BuildContext(target(), source=source))
    assert not files.is_dflash({"architectures": ["LlamaForCausalLM"]})
    assert not files.is_dflash({"speculators_model_type": "eagle3"})


# ---------------------------------------------------------------- the convention, tried on a text


class Letters:
    """A tokenizer of 60 ids by character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}


def test_a_draft_that_reads_the_wrong_layers_is_told_apart(tmp_path: Path) -> None:
    from specdec.formats.dflash_check import _TOKENS, PROBE

    model = tiny_models.tiny("gpt-neox", num_hidden_layers=3)
    text = Letters()(PROBE)["input_ids"][:_TOKENS]
    learned = tiny_dflash.fitted(model, text, steps=150, layer_ids=(1, 2), mask_token_id=MASK)
    files.write_speculators(tmp_path, learned, 64, {"name_or_path": "", "architectures": []})
    context = BuildContext(model, Letters(), source=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = ParallelDrafter.build(context)
    assert right.hidden == (1, 2)
    with pytest.warns(DrafterWarning, match=r"read as 'outputs'.* accepted .*layer_ids='hidden_states'"):
        wrong = ParallelDrafter.build(context, layer_ids="outputs")
    assert wrong.hidden == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ParallelDrafter.build(context, layer_ids="outputs", check=False)
        assert check_convention(model, None, learned, "outputs") == {}


# ---------------------------------------------------------------- writing


def test_written_layouts_read_back(tmp_path: Path) -> None:
    for name, folder in (("z", z_lab(tmp_path / "z")), ("s", speculators(tmp_path / "s", layers=SLIDING))):
        model, _ = files.read(folder)
        outs = [tmp_path / f"{name}-{i}" for i in range(2)]
        if name == "z":
            files.write(outs[0], model, 64, torch.float64)
        else:
            files.write_speculators(outs[0], model, 64, {"name_or_path": "t", "architectures": []}, torch.float64)
        files.write_speculators(outs[1], model, 64, {"name_or_path": "t", "architectures": []}, torch.float64)
        for out in outs:
            copy, _ = files.read(out)
            assert copy.config.layer_ids == model.config.layer_ids == (1, 3)
            assert torch.equal(_logits(target(), out), _logits(target(), folder))


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(16), z_lab(tmp_path / "mask") / "mask_embedding.pt")
    with pytest.raises(InputError, match="--mask-token"):
        files.write_speculators(tmp_path / "out", files.read(tmp_path / "mask")[0], 64, {})
    more = {"lm_head.weight": torch.zeros(3, 16), "d2t": torch.zeros(3, dtype=torch.int64)}
    small, _ = files.read(speculators(tmp_path / "d2t", more=more, draft_vocab_size=3))
    with pytest.raises(InputError, match="draft vocabulary"):
        files.write(tmp_path / "out", small, 64)


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    """`transformers` makes an empty one for some kinds of model, which would look like another tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 64}))
    assert load_tokenizer(tmp_path) is None
