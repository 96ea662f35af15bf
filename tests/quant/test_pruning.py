"""Pruning: Wanda against an oracle written out by hand (and torchao's), what is left alone, masks while training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction

import pytest
import tiny_models
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant import PackedLinear, parse
from specdec.quant.masks import Masks, cubic_sparsity
from specdec.quant.pruning import Pattern, magnitude, prunable, wanda
from specdec.quant.sparse import Sparse

ARCHITECTURES = {
    "llama": {},
    "llama-tied": {},
    "qwen2-sliding": {},
    "gpt2": {},  # weights transposed, masks by position
    "gemma3": {},  # layers of two kinds, with masks and positions of their own
    "gpt-neox": {},  # attention and MLP beside each other
    "phi": {},
}


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows_of(module: nn.Module) -> torch.Tensor:
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


def inner(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers but the head, written out."""
    kinds = (nn.Linear, Conv1D)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n not in ("lm_head", "embed_out")}


def lowest(scores: list[float], count: int) -> set[int]:
    """Of equal scores the last."""
    return set(sorted(range(len(scores)), key=lambda k: (scores[k], -k))[:count])


def inputs(model: nn.Module, layers: dict[str, nn.Module], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer is given."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, module in layers.items()
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def slow_wanda(model: nn.Module, ids: torch.Tensor, drop: Callable[[list[float]], set[int]]) -> nn.Module:
    """A full forward of the whole text for each block, on the model as it is by then; scores one at a time."""
    model = copy.deepcopy(model)
    blocks = sorted({name.split(".")[2] for name in inner(model)}, key=int)
    for block in blocks:
        layers = {name: module for name, module in inner(model).items() if name.split(".")[2] == block}
        seen = inputs(model, layers, ids)
        for name, module in layers.items():
            norms = seen[name].flatten(0, -2).norm(dim=0).tolist()
            weight = rows_of(module)
            for row in weight:
                scores = [abs(w) * norm for w, norm in zip(row.tolist(), norms, strict=True)]
                for k in drop(scores):
                    row[k] = 0
    return model


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: rows_of(module) == 0 for name, module in inner(model).items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------- Wanda


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("sparsity", [0.6, "2:4"])
def test_wanda_is_the_oracle(name, sparsity):
    model, ids = tiny_models.tiny(name), tokens()

    def drop(scores):
        if sparsity == 0.6:
            return lowest(scores, int(len(scores) * 0.6))
        return {start + k for start in range(0, len(scores), 4) for k in lowest(scores[start : start + 4], 2)}

    before = copy.deepcopy(model)
    pruned = wanda(model, ids, sparsity)
    assert same(pruned, slow_wanda(model, ids, drop))
    assert same(model, before)
    # Not what the first pass over the unpruned model would have said.
    assert not same(pruned, magnitude(model, sparsity))


def test_later_blocks_see_what_pruned_ones_give():
    """Scores from the model as it was would choose other weights."""
    model, ids = tiny_models.tiny("llama"), tokens()
    pruned = wanda(model, ids, 0.6)
    early = wanda(model, ids, 0.6, skip=[r"layers\.0\."])
    first, second = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert not zeros(early)[first].any()
    assert not torch.equal(zeros(early)[second], zeros(pruned)[second])


def test_rows_of_text_add_up():
    model = tiny_models.tiny("llama")
    together = wanda(model, tokens(4, 8), 0.5)
    alone = wanda(model, tokens(4, 8)[:1], 0.5)
    again = wanda(model, tokens(4, 8)[[3, 1, 0, 2]], 0.5)
    assert same(together, again)
    assert not same(together, alone)


def test_wanda_beats_magnitude_where_some_channels_are_large():
    """Two input channels of each attention are 30 times as loud as the others, as they are in large models."""
    model, ids = tiny_models.tiny("llama", hidden_size=64), tokens(4, 32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[5, 40]] *= 30
    errors = {}
    target = model.model.layers[0].self_attn.q_proj
    x = inputs(model, {"q_proj": target}, ids)["q_proj"]
    for way, pruned in (("magnitude", magnitude(model, 0.5)), ("wanda", wanda(model, ids, 0.5))):
        with torch.no_grad():
            error = pruned.model.layers[0].self_attn.q_proj(x) - target(x)
            errors[way] = float(error.norm() / target(x).norm())
    assert errors["wanda"] < 0.5 * errors["magnitude"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("outputs", "options", "sparsity"),
    [(24, {"semi_structured_block_size": 4}, "2:4"), (1, {"sparsity_level": 0.75}, 0.75)],
)
def test_wanda_is_torchaos(outputs, options, sparsity):
    """Without groups torchao compares within a whole layer, so that has one output. It multiplies by squared norms,
    and is shown inputs whose squared norms are the norms.
    """
    try:
        from torchao.sparsity import WandaSparsifier
    except ImportError as error:  # newer versions have it no more
        pytest.skip(f"torchao without its sparsifier: {error}")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 64, generator=generator) * torch.randn(64, generator=generator).exp()
    model = nn.Sequential(nn.Linear(64, outputs, bias=False))
    weight = model[0].weight.detach().clone()
    sparsifier = WandaSparsifier(**options)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    model(x / x.norm(dim=0).sqrt())
    sparsifier.step()
    sparsifier.squash_mask()
    kept = Pattern.of(sparsity).keep(weight.abs() * x.norm(dim=0))
    assert torch.equal(model[0].weight.detach() != 0, kept)
    assert not torch.equal(Pattern.of(sparsity).keep(weight.abs()), kept)


# ---------------------------------------------------------------- magnitude, and what is left alone


@pytest.mark.parametrize("sparsity", [0.29, 0.8, "2:4", "1:8", "sparse-60", "sparse-2x4"])
def test_magnitude_drops_the_smallest_of_each_row(sparsity):
    model = tiny_models.tiny("gpt2", n_embd=32)
    pruned = magnitude(model, sparsity)
    for name, module in inner(model).items():
        weight, K = rows_of(module), rows_of(module).shape[1]
        left, group = {"2:4": (2, 4), "sparse-2x4": (2, 4), "1:8": (1, 8)}.get(sparsity, (0, K))
        share = Fraction(60, 100) if sparsity == "sparse-60" else Fraction(str(sparsity)) if left == 0 else 0
        drop = group - left if left else int(K * share)
        expected = weight.clone()
        for row in expected:
            for start in range(0, K, group):
                part = row[start : start + group]
                for k in lowest(part.abs().tolist(), drop):
                    part[k] = 0
        found = rows_of(pruned.get_submodule(name))
        assert torch.equal(found, expected)
        assert not torch.signbit(found[found == 0]).any()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("way", [magnitude, lambda model, s: wanda(model, tokens(), s)])
def test_embeddings_norms_biases_and_the_head_stay(name, way):
    model = tiny_models.tiny(name)
    pruned = way(model, 0.7)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, pruned.state_dict()[key])}
    assert changed == {f"{layer}.weight" for layer in inner(model)}
    # A copy shares nothing with the model: either may be trained.
    ours = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in ours for p in pruned.parameters())


def test_in_place_and_progress():
    model, ids = tiny_models.tiny("llama"), tokens()
    expected = wanda(model, ids, 0.5)
    model.model.layers[1].mlp.train()
    told: list[tuple[int, int, str]] = []
    assert wanda(model, ids, 0.5, in_place=True, progress=lambda *what: told.append(what)) is model
    assert same(model, expected)
    assert sorted(name for _, _, name in told) == sorted(inner(model))
    assert [(done, total) for done, total, _ in told] == [(i + 1, 14) for i in range(14)]
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[0].training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    told.clear()
    assert magnitude(model, 0.6, in_place=True, progress=lambda *what: told.append(what)) is model
    assert len(told) == 14


def test_wanda_looks_without_dropout():
    model, ids = tiny_models.tiny("gpt2"), tokens()
    expected = wanda(model, ids, 0.5)
    assert model.config.resid_pdrop > 0
    assert same(wanda(model.train(), ids, 0.5), expected)
    assert model.training


def test_the_sparse_format_stores_what_wanda_left():
    """Though other weights are larger."""
    model = tiny_models.tiny("llama", hidden_size=32, intermediate_size=64, head_dim=16, dtype=torch.bfloat16)
    for name in ("sparse-60", "sparse-2x4"):
        pruned = wanda(model, tokens(), name)
        for layer, module in inner(pruned).items():
            packed = PackedLinear.of(module.weight, None, parse(name))
            assert torch.equal(packed.weight_in(torch.bfloat16), module.weight), layer


def test_skipped_layers_stay():
    model = tiny_models.tiny("llama")
    left = prunable(model, skip=["down_proj$", r"layers\.0\.self_attn"])
    assert len(left) == 14 - 2 - 4
    pruned = magnitude(model, 0.5, skip=["down_proj$"])
    assert {name.rpartition(".")[2] for name, found in zeros(pruned).items() if not found.any()} == {"down_proj"}
    with pytest.raises(InputError, match=r"'upp_proj' matches no layer"):
        magnitude(model, 0.5, skip=["upp_proj"])
    with pytest.raises(InputError, match="not a regular"):
        magnitude(model, 0.5, skip=["("])
    with pytest.raises(InputError, match="that is not skipped"):
        magnitude(model, 0.5, skip=["."])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "sparsity", [1.0, 1, -0.1, 80, True, None, "4:2", "2:2", "0:4", "2:4096", "a:4", "²:4", "mxfp4"]
)
def test_patterns_that_are_none(sparsity):
    with pytest.raises(InputError, match="pattern"):
        Pattern.of(sparsity)


def test_patterns():
    assert Pattern.of(0.29).keep(torch.rand(1, 100)).sum() == 71  # 0.29 * 100 is 28.999...
    assert Pattern.of(0).keep(torch.zeros(2, 8)).all()
    assert Pattern.of(Sparse(None)) == Pattern.of("2:4") == Pattern.of("sparse-2x4")
    assert Pattern.of(Sparse(60)) == Pattern.of(0.6) == Pattern.of(Pattern.of("sparse-60"))
    for percent in range(10, 96):
        assert Pattern.of(percent / 100).keep(torch.rand(1, 416)).sum() == Sparse(percent).stored(416)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.zeros(2, 8), "integers"),
        (torch.zeros(8, dtype=torch.int64), "rows, tokens"),
        (torch.zeros(0, 8, dtype=torch.int64), "needs calibration text"),
        (torch.full((1, 8), tiny_models.VOCAB), "vocabulary"),
        (torch.full((1, 8), -1), "vocabulary"),
        (torch.zeros(1, tiny_models.CONTEXT + 1, dtype=torch.int64), "256 tokens"),
    ],
)
def test_text_that_the_model_cannot_read(ids, match):
    with pytest.raises(InputError, match=match):
        wanda(tiny_models.tiny("llama"), ids, 0.5)


@pytest.mark.parametrize("way", [magnitude, lambda model, s, **o: wanda(model, tokens(), s, **o)])
def test_models_that_cannot_be_pruned(way):
    model = tiny_models.tiny("llama")
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj \[16, 24\] cannot be pruned 4:16"):
        way(model, "4:16", in_place=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = before.model.layers[1].mlp.up_proj.weight[3, 2] = torch.inf
    with pytest.raises(InputError, match=r"1 weights of model\.layers\.1\.mlp\.up_proj are NaN"):
        way(model, 0.5, in_place=True)
    assert same(model, before)  # refused before anything was changed
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts\.\w+ is a stack of matrices.*skip="):
        way(tiny_models.tiny("mixtral"), 0.5)
    packed = tiny_models.tiny("llama", hidden_size=32)
    layer = packed.model.layers[0].mlp
    layer.up_proj = PackedLinear.of(layer.up_proj.weight, None, parse("sparse"))
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        way(packed, 0.5)


def test_experts_can_be_left_as_they_are():
    model = tiny_models.tiny("mixtral")
    pruned = magnitude(model, 0.5, skip=["experts"])
    assert all(found.float().mean() == 0.5 for found in zeros(pruned).values())
    experts = {name: p for name, p in model.named_parameters() if "experts" in name}
    assert experts
    assert all(torch.equal(dict(pruned.named_parameters())[name], p) for name, p in experts.items())


def test_a_model_without_a_list_of_layers_is_pruned_by_magnitude_alone():
    model = tiny_models.tiny("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="by magnitude"):
        wanda(model, tokens(), 0.5)
    assert zeros(magnitude(model, 0.5))["model.layers.0.mlp.up_proj"].float().mean() == 0.5


# ---------------------------------------------------------------- while training


def test_the_cubic_schedule():
    course = [cubic_sparsity(step, 100, 0.8, begin=20, initial=0.1) for step in range(0, 140)]
    assert course[:21] == [0.1] * 21
    assert course[100:] == [0.8] * 40
    assert course == sorted(course)
    assert course[60] == pytest.approx(0.8 - 0.7 * 0.5**3)
    assert cubic_sparsity(0.25, 0.5, 0.9) == pytest.approx(0.9 * (1 - 0.5**3))  # shares of a run
    early, late = course[40] - course[20], course[100] - course[80]
    assert early > 0.5 * 0.7 > 0.02 > late


@pytest.mark.parametrize("bad", [{"final": 1.0}, {"final": 0.05}, {"end": 5}, {"initial": -0.1}])
def test_schedules_that_are_none(bad):
    with pytest.raises(InputError, match="from one share to a larger one"):
        cubic_sparsity(7, **{"end": 10, "begin": 5, "initial": 0.1, "final": 0.8, **bad})


def train(model, masks, steps, gradients=False):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        loss = model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss
        loss.backward()
        if gradients:
            masks.apply_to_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if masks is not None and not gradients:
            masks.apply()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masks_keep_zeros_through_training(name):
    model = wanda(tiny_models.tiny(name), tokens(), 0.6).train()
    expected, before = zeros(model), copy.deepcopy(model)
    masks = Masks.of(model)
    assert all(
        share == pytest.approx(expected[layer].double().mean().item()) for layer, share in masks.sparsity.items()
    )
    train(model, masks, 3)
    found = zeros(model)
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
    assert all(
        not torch.equal(rows_of(a), rows_of(b))
        for a, b in zip(inner(model).values(), inner(before).values(), strict=True)
    )
    again = Masks.of(model)
    assert again.sparsity == masks.sparsity
    train(model, None, 1)  # the negative control: without masks most zeros are lost
    assert all(found.float().mean() < 0.2 for found in zeros(model).values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masked_gradients_hold_only_what_can_move(name):
    """Square weights that are stored transposed, too."""
    model = magnitude(tiny_models.tiny(name), 0.6).train()
    masks, expected = Masks.of(model), zeros(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert any((module.weight.grad != 0).all() for module in inner(model).values())
    masks.apply_to_gradients()
    for layer, module in inner(model).items():
        gradient = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
        assert torch.equal(gradient == 0, expected[layer])


def test_pruning_in_steps_never_brings_a_weight_back():
    model = tiny_models.tiny("llama").train()
    masks = Masks.of(model)
    assert set(masks.sparsity.values()) == {0.0}
    gone = zeros(model)
    for step in range(1, 5):
        masks.prune(cubic_sparsity(step, 4, 0.75))
        now = zeros(model)
        assert all((now[layer] | ~gone[layer]).all() for layer in gone)
        assert all(share == pytest.approx(int(K * s) / K) for layer, share in masks.sparsity.items()
                   for K, s in [(gone[layer].shape[1], Fraction(str(cubic_sparsity(step, 4, 0.75))))])  # fmt: skip
        gone = now
        train(model, masks, 1)
    assert all(found.float().mean() == 0.75 for found in zeros(model).values())
    with torch.no_grad():
        for module in inner(model).values():
            module.weight.fill_(9.0)  # large where weights were dropped as well
    masks.prune(0.75)
    assert set(masks.sparsity.values()) == {0.75}  # what was dropped takes no other's place
    masks.prune("1:8")
    now = zeros(model)
    assert all((now[layer] | ~gone[layer]).all() for layer in gone)
