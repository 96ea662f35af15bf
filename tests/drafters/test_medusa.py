"""Medusa heads: every layout against a plain recomputation, what is refused, what is proposed, and their training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from specdec.drafters import MedusaDrafter
from torch import Tensor
from transformers import LogitsProcessor

import specdec
from specdec import loading
from specdec.drafter import BuildContext
from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.formats import medusa as layouts
from specdec.formats.medusa_heads import HeadShape, MedusaHeads
from specdec.generation import Stream
from specdec.policy import Fixed
from specdec.train.data import Rows, TrainingData
from specdec.train.medusa import MedusaObjective
from specdec.train.objective import Batch, create
from specdec.train.settings import Settings
from specdec.train.trainer import look, train
from specdec.tree_policy import DynamicTree, StaticTree

HIDDEN, VOCAB, HEADS, LAYERS = 16, tiny_models.VOCAB, 3, 2
IDS = [5, 63, 0, 17, 4, 3, 7, 30, 41, 9, 2, 1]  # in no order: a map is no offset, and need not rise
PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


def numbers(*size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Plain:
    """Heads as matrices, and what they say, in numpy: nothing of the library takes part."""

    def __init__(self, num_layers: int = LAYERS, rows: int = VOCAB, bias: bool = True):
        self.blocks = [
            [
                (numbers(HIDDEN, HIDDEN, seed=100 * k + i), numbers(HIDDEN, seed=100 * k + i + 50) if bias else None)
                for i in range(num_layers)
            ]
            for k in range(HEADS)
        ]
        self.projections = [numbers(rows, HIDDEN, seed=1000 + k) for k in range(HEADS)]

    def logits(self, k: int, state: Tensor, shared: bool = False) -> np.ndarray:
        h = state.numpy().astype(np.float64)
        for weight, bias in self.blocks[k]:
            x = weight.numpy() @ h + (bias.numpy() if bias is not None else 0.0)
            h = h + x / (1.0 + np.exp(-x))
        return self.projections[0 if shared else k].numpy() @ h


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def original(plain: Plain, prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for k, block in enumerate(plain.blocks):
        for i, (weight, bias) in enumerate(block):
            tensors[f"{prefix}{k}.{i}.linear.weight"] = weight
            if bias is not None:
                tensors[f"{prefix}{k}.{i}.linear.bias"] = bias
        tensors[f"{prefix}{k}.{len(block)}.weight"] = plain.projections[k]
    return tensors


# As published: the configuration says two heads, the file holds all of them.
ORIGINAL = {"medusa_num_heads": 2, "medusa_num_layers": LAYERS, "base_model_name_or_path": "org/target"}


def write_pt(folder: Path) -> Plain:
    plain = Plain()
    torch.save(original(plain), write_config(folder, **ORIGINAL) / "medusa_lm_head.pt")
    return plain


def write_tgi(folder: Path) -> Plain:
    plain = Plain(num_layers=1)
    save_file(original(plain), write_config(folder, **ORIGINAL) / "medusa_lm_head.safetensors")
    return plain


def write_inside_model(folder: Path) -> Plain:
    plain = Plain()
    heads = original(plain, "medusa_head.")
    first = {name: heads[name] for name in list(heads)[:4]}
    body = {"model.embed_tokens.weight": numbers(VOCAB, HIDDEN, seed=1), "lm_head.weight": numbers(8, 8, seed=2)}
    write_config(folder, model_type="llama", num_attention_heads=4, vocab_size=VOCAB, hidden_size=HIDDEN, **ORIGINAL)
    save_file({**body, **first}, folder / "model-00001-of-00002.safetensors")
    save_file({n: t for n, t in heads.items() if n not in first}, folder / "model-00002-of-00002.safetensors")
    return plain


def vllm_blocks(plain: Plain, prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for k, block in enumerate(plain.blocks):
        for i, (weight, bias) in enumerate(block):
            tensors[f"{prefix}blocks.{k}.layers.{i}.weight"] = weight
            if bias is not None:
                tensors[f"{prefix}blocks.{k}.layers.{i}.bias"] = bias
    return tensors


def vllm_config(folder: Path, **config: Any) -> Path:
    base = {"model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": HIDDEN, "vocab_size": VOCAB}
    return write_config(folder, **{**base, "num_heads": HEADS, "num_hidden_layers": LAYERS, **config})


def write_vllm(folder: Path) -> Plain:
    plain = Plain(bias=False)
    tensors = vllm_blocks(plain, "medusa_heads.")
    tensors.update({f"medusa_heads.lm_heads.{k}.weight": w for k, w in enumerate(plain.projections)})
    save_file(tensors, vllm_config(folder) / "model.safetensors")
    return plain


def write_vllm_map(folder: Path) -> Plain:
    """Whole projections beside a map, which vLLM cuts when it reads them."""
    plain = Plain()
    tensors = {**vllm_blocks(plain), "token_map": torch.tensor(IDS)}
    tensors.update({f"lm_heads.{k}.weight": w for k, w in enumerate(plain.projections)})
    save_file(tensors, vllm_config(folder, truncated_vocab_size=len(IDS)) / "model.safetensors")
    plain.projections = [w[IDS] for w in plain.projections]
    return plain


def write_vllm_one_head(folder: Path) -> Plain:
    plain = Plain(rows=len(IDS))
    tensors = {**vllm_blocks(plain), "token_map": torch.tensor(IDS), "lm_heads.0.weight": plain.projections[0]}
    save_file(
        tensors,
        vllm_config(folder, truncated_vocab_size=len(IDS), original_lm_head=True, logit_scale=0.5)
        / "model.safetensors",
    )
    plain.projections = [plain.projections[0] * 0.5] * HEADS
    return plain


def write_own(folder: Path) -> Plain:
    plain = Plain(rows=len(IDS))
    tensors = {name.replace(".layers.", "."): t for name, t in vllm_blocks(plain).items()}
    tensors.update({f"projections.{k}.weight": w for k, w in enumerate(plain.projections)})
    write_config(
        folder, specdec_drafter="medusa", hidden_size=HIDDEN, vocab_size=VOCAB, projection="own", num_heads=HEADS
    )
    save_file({**tensors, "d2t_absolute": torch.tensor(IDS)}, folder / "model.safetensors")
    return plain


LAYOUTS: dict[str, Callable[[Path], Plain]] = {
    "pt": write_pt,
    "tgi": write_tgi,
    "inside a model": write_inside_model,
    "vllm": write_vllm,
    "vllm, map": write_vllm_map,
    "vllm, one head": write_vllm_one_head,
    "own": write_own,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_what_its_matrices_say(layout: str, tmp_path: Path) -> None:
    plain = LAYOUTS[layout](tmp_path / "heads")
    heads = layouts.read(tmp_path / "heads")
    assert heads.shape.num_heads == HEADS
    assert heads.shape.num_layers == len(plain.blocks[0])
    mapped = heads.d2t_absolute
    assert (None if mapped is None else mapped.tolist()) == (IDS if len(plain.projections[0]) < VOCAB else None)
    state = numbers(HIDDEN, seed=9)
    for k in range(HEADS):
        np.testing.assert_allclose(heads(k, state[None])[0].numpy(), plain.logits(k, state), rtol=0, atol=1e-9)
        other = plain.logits((k + 1) % HEADS, state)
        assert np.abs(heads(k, state[None])[0].numpy() - other).max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_are_recognised(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "specdec_drafter" in config or MedusaDrafter.recognises(config, tmp_path)
    model = tiny_models.tiny("llama")
    drafter = loading.resolve_drafter(str(tmp_path), BuildContext(model, dtype=model.dtype))
    assert isinstance(drafter, MedusaDrafter)


def test_other_folders_are_not_recognised(tmp_path: Path) -> None:
    assert not MedusaDrafter.recognises({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, tmp_path)


# ---------------------------------------------------------------- what is proposed


def first_round(model: Any, drafter: MedusaDrafter, policy: Any) -> Any:
    """The proposal of the first round after `PROMPT`."""
    made = specdec.SpeculativeDecoder(model, drafter=drafter, policy=policy, backend="eager")
    task = made.prepare(PROMPT, max_new_tokens=20, temperature=0.0, strict=True)
    inner, seen = task.drafter.inner, []
    propose = inner.propose

    def spy(*arguments: Any) -> Any:
        seen.append(propose(*arguments))
        return seen[-1]

    inner.propose = spy
    for _ in Stream(task):
        break
    return seen[0]


def last_hidden(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]


@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_draft_from_the_state_before_the_root(layout: str, backend: str | None, tmp_path: Path) -> None:
    plain = LAYOUTS[layout](tmp_path / "heads")
    model = tiny_models.tiny("llama")
    drafter = MedusaDrafter(model, layouts.read(tmp_path / "heads"), backend)
    chain = first_round(model, drafter, Fixed(10)).tree
    ids = IDS if len(plain.projections[0]) < VOCAB else range(VOCAB)
    states = last_hidden(model, PROMPT)
    right, shifted = ([ids[int(plain.logits(k, states[at]).argmax())] for k in range(HEADS)] for at in (-2, -1))
    assert chain.tokens.tolist() == right  # as many as there are heads, however deep the plan
    assert right != shifted
    assert right != [ids[int(plain.logits(k, states[-2]).argmax())] for k in (1, 2, 0)]


def test_every_node_of_a_level_gets_the_same_children(tmp_path: Path) -> None:
    plain = write_tgi(tmp_path)
    model = tiny_models.tiny("llama")
    tree = first_round(model, MedusaDrafter(model, layouts.read(tmp_path)), Fixed(3, (3, 2))).tree
    state = last_hidden(model, PROMPT)[-2]
    best = [np.argsort(-plain.logits(k, state))[:n].tolist() for k, n in enumerate((3, 2, 1))]
    assert tree.parents == (-1, -1, -1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8)
    assert tree.tokens.tolist() == best[0] + best[1] * 3 + best[2] * 6


def test_only_heads_that_the_plan_reaches_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tgi(tmp_path)
    model = tiny_models.tiny("llama")
    ran: list[int] = []
    project = MedusaHeads.project
    monkeypatch.setattr(MedusaHeads, "project", lambda self, k, x: ran.append(k) or project(self, k, x))
    drafter = MedusaDrafter(model, layouts.read(tmp_path))
    first_round(model, drafter, Fixed(2))
    assert ran == [0, 1]


@pytest.mark.parametrize("projection", ["shared", "tied"])
def test_one_product_serves_heads_with_one_projection(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.tiny("llama")
    heads = tiny_heads(projection)
    heads.borrow(model)
    state = numbers(1, HIDDEN, seed=3)
    calls: list[int] = []
    project = MedusaHeads.project
    alone = [heads(k, state) for k in range(HEADS)]
    monkeypatch.setattr(MedusaHeads, "project", lambda self, k, x: calls.append(len(x)) or project(self, k, x))
    together = MedusaDrafter(model, heads, "eager")._logits(state, HEADS)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    assert calls == [HEADS]


def tiny_heads(projection: str = "own", ids: list[int] | None = None, noise: float = 0.3) -> MedusaHeads:
    """Random heads for the tiny models."""
    shape = HeadShape(HEADS, LAYERS, HIDDEN, VOCAB, len(ids or range(VOCAB)), projection)
    heads = MedusaHeads(shape, torch.tensor(ids) if ids else None)
    return tiny_models.randomize(heads.double(), noise, 5).requires_grad_(False)


def test_tied_heads_start_as_the_targets_own_head() -> None:
    model = tiny_models.tiny("phi")  # whose head has a bias
    heads = MedusaHeads(HeadShape(HEADS, LAYERS, HIDDEN, VOCAB, len(IDS), "tied"), torch.tensor(IDS)).double()
    heads.borrow(model)
    state = numbers(2, HIDDEN, seed=3)
    expected = model.get_output_embeddings()(state)[:, IDS]
    for k in range(HEADS):
        torch.testing.assert_close(heads(k, state), expected, rtol=0, atol=1e-12)
    assert not any("borrowed" in name or "projection" in name for name in heads.state_dict())


class Only(LogitsProcessor):
    """Bans every token but one, which no head can draft."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, 60:62] = scores[:, 60:62]
        return allowed


@pytest.mark.parametrize("verifier", ["coupled", "ratio", "recursive", "match"])
def test_a_ban_of_the_whole_draft_vocabulary_costs_acceptance_only(verifier: str) -> None:
    model = tiny_models.tiny("llama")
    drafter = MedusaDrafter(model, tiny_heads(ids=IDS))
    policies = [Fixed(3)] if verifier in ("ratio",) else [Fixed(3), Fixed(3, (3, 2)), DynamicTree(8, 3, 3)]
    for policy in policies:
        made = specdec.SpeculativeDecoder(model, drafter=drafter, verifier=verifier, policy=policy)
        out = made.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=2, processors=[Only()], strict=True)
        assert len(out.tokens) == 12
        assert set(out.tokens) <= {60, 61}


def test_draft_vocabulary_and_trees_keep_the_text() -> None:
    model = tiny_models.tiny("llama")
    for heads in (tiny_heads(ids=IDS), tiny_heads("shared"), tiny_heads("tied", IDS)):
        for temperature in (0.0, 1.0):
            for policy in (Fixed(5), StaticTree((-1, -1, 0, 0, 1, 4)), DynamicTree(9, 3, 4)):
                made = specdec.SpeculativeDecoder(model, drafter=MedusaDrafter(model, heads), policy=policy)
                out = made.generate(PROMPT, max_new_tokens=24, temperature=temperature, seed=4, strict=True)
                assert out.tokens == tiny_models.reference(model, PROMPT, 24, temperature=temperature, seed=4)


# ---------------------------------------------------------------- what is refused


def test_heads_of_another_target_are_refused() -> None:
    model = tiny_models.tiny("llama")
    with pytest.raises(IncompatiblePairError, match="width 24"):
        MedusaDrafter(model, MedusaHeads(HeadShape(1, 1, 24, VOCAB, VOCAB)))
    with pytest.raises(IncompatiblePairError, match="500 tokens"):
        MedusaDrafter(model, MedusaHeads(HeadShape(1, 1, HIDDEN, 500, 500)))
    with pytest.raises(InputError, match="specdec train medusa"):
        MedusaDrafter.build(BuildContext(model))


def broken(tensors: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    rest = {n: t for n, t in tensors.items() if n != name}
    return rest if tensor is None else {**rest, name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("1.0.linear.weight", None, r"1\.0\.linear\.weight"),
        ("1.0.linear.bias", None, r"1\.0\.linear\.bias"),
        ("1.2.weight", None, "projection of head 1"),
        ("0.1.linear.weight", torch.zeros(HIDDEN, 3, dtype=torch.float64), r"\[16, 3\]"),
        ("2.2.weight", torch.zeros(VOCAB, HIDDEN, dtype=torch.int8), "floating point"),
        ("norm.weight", torch.zeros(3), "norm.weight"),
        ("70.0.linear.weight", torch.zeros(HIDDEN, HIDDEN), "71 heads"),
    ],
)
def test_incomplete_files_are_refused(name: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    tensors = broken(original(Plain()), name, tensor)
    save_file(tensors, write_config(tmp_path, **ORIGINAL) / "medusa_lm_head.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        layouts.read(tmp_path)


class Code:
    def __reduce__(self) -> Any:
        return print, ("this must never be printed",)


def test_pickles_with_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**original(Plain()), "x": Code()}, write_config(tmp_path, **ORIGINAL) / "medusa_lm_head.pt")
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        layouts.read(tmp_path)
    assert "never" not in capsys.readouterr().out


def test_damaged_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no Medusa heads"):
        layouts.read(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        layouts.read(tmp_path / "absent")
    (write_config(tmp_path, **ORIGINAL) / "medusa_lm_head.safetensors").write_bytes(b"12345678 not a header")
    with pytest.raises(UnsupportedModelError, match="cannot read"):
        layouts.read(tmp_path)
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"not a zip")
    with pytest.raises(UnsupportedModelError):
        layouts.read(tmp_path)


@pytest.mark.parametrize("ids", [[1, 1, 2], [0, 1, VOCAB], [-1, 0, 1]])
def test_maps_that_name_no_or_the_same_tokens_are_refused(ids: list[int], tmp_path: Path) -> None:
    plain = Plain(rows=3)
    tensors = {**vllm_blocks(plain), "token_map": torch.tensor(ids)}
    tensors.update({f"lm_heads.{k}.weight": w for k, w in enumerate(plain.projections)})
    save_file(tensors, vllm_config(tmp_path, truncated_vocab_size=3) / "model.safetensors")
    with pytest.raises(InputError, match="different tokens"):
        layouts.read(tmp_path)


# ---------------------------------------------------------------- training


def rows_of(model: Any, count: int, length: int, seed: int) -> Rows:
    """Texts that the model itself draws."""
    torch.manual_seed(seed)
    tokens = torch.randint(VOCAB, (count, 1))
    with torch.no_grad():
        for _ in range(length - 1):
            logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat((tokens, logits.softmax(-1).multinomial(1)), 1)
    return Rows.full(tokens.numpy().astype(np.int32))


def objective(model: Any, **options: Any) -> MedusaObjective:
    return create("medusa", model, **{"heads": HEADS, "stored": "float32", **options})


def test_acceptance_is_the_overlap_two_places_ahead() -> None:
    """Position by position, by a loop over starts; a head that is one place off gives other numbers."""
    model = tiny_models.tiny("llama", dtype=torch.float32).requires_grad_(False)
    made = objective(model, layers=2)
    tiny_models.randomize(made.module, 0.3, 5)
    tokens, mask = rows_of(model, 2, 9, 0).tensors()
    mask[1, 7:] = False
    batch = look(model, tokens, mask, made.hidden)
    overlap_NK, agree_NK = made.acceptance(batch)
    states = batch.hidden[2]
    expected, shifted = [], []
    for b in range(2):
        for t in range(9 - HEADS):
            if not mask[b, t + 1 : t + HEADS + 1].all():
                continue
            for out, offset in ((expected, 1), (shifted, 0)):
                row = []
                for k in range(HEADS):
                    p, q = batch.logits_BLV[b, t + k + offset].softmax(-1), made.module(k, states[b, t]).softmax(-1)
                    row.append((torch.minimum(p, q).sum().item(), float(p.argmax() == q.argmax())))
                out.append(row)
    found = torch.stack((overlap_NK, agree_NK), -1)
    assert found.shape == (10, HEADS, 2)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    assert (found - torch.tensor(shifted)).abs().max() > 0.05


def test_loss_weighs_the_heads_and_leaves_out_what_does_not_count() -> None:
    model = tiny_models.tiny("llama", dtype=torch.float32).requires_grad_(False)
    made = objective(model, decay=0.5, loss="ce")
    tiny_models.randomize(made.module, 0.3, 5)
    tokens, mask = rows_of(model, 2, 9, 0).tensors()
    mask[0, :4] = False
    batch = look(model, tokens, mask, made.hidden)
    total = 0.0
    for k in range(HEADS):
        terms = [
            -made.module(k, batch.hidden[2][b, t]).log_softmax(-1)[batch.logits_BLV[b, t + k + 1].argmax()]
            for b in range(2)
            for t in range(9 - k - 1)
            if mask[b, t + k + 1]
        ]
        total += 0.5**k * torch.stack(terms).mean().item()
    assert float(made.loss(batch).loss) == pytest.approx(total, rel=1e-5)


TEXT = np.array([[7, 7, 7, 4, 4, 9], [4, 7, 60, 7, 4, 9]], dtype=np.int32)


def test_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    model = tiny_models.tiny("llama", dtype=torch.float32, eos_token_id=50).requires_grad_(False)
    made = objective(model, vocab=3, projection="tied")
    made.begin(TEXT)
    assert made.module.d2t_absolute.tolist() == [4, 7, 50]
    state = numbers(1, HIDDEN, seed=1, dtype=torch.float32)
    torch.testing.assert_close(made.module(1, state), model.get_output_embeddings()(state)[:, [4, 7, 50]])


@pytest.mark.parametrize("projection", ["own", "shared"])
def test_projections_start_from_the_linear_map_to_later_states(projection: str) -> None:
    model = tiny_models.tiny("llama", eos_token_id=50).requires_grad_(False)
    made = objective(model, vocab=3, projection=projection)
    rows = rows_of(model, 6, 12, 0).tokens_RL
    made.begin(rows)
    states = look(model, torch.from_numpy(rows).long(), torch.ones(6, 12, dtype=torch.bool), (2,)).hidden[2].numpy()
    head = model.get_output_embeddings().weight.detach().numpy()[made.module.d2t_absolute]
    for k, layer in enumerate(made.module.projections):
        early, late = states[:, : -k - 1].reshape(-1, HIDDEN), states[:, k + 1 :].reshape(-1, HIDDEN)
        # Ridge regression as least squares over rows that pull towards 0.
        pull = np.sqrt(1e-2 * (early**2).sum(0).mean()) * np.eye(HIDDEN)
        found, *_ = np.linalg.lstsq(np.concatenate((early, pull)), np.concatenate((late, 0 * pull)), rcond=None)
        np.testing.assert_allclose(layer.weight.detach().numpy(), head @ found.T, rtol=1e-4, atol=1e-5)
        again = objective(model, vocab=3, projection=projection)
        again.begin(rows)
        assert again.module.projections[k].weight.equal(layer.weight)  # a resumed run starts the same


@pytest.mark.parametrize("options", [{}, {"vocab": 40}, {"projection": "shared", "layers": 2}, {"projection": "tied"}])
def test_training_raises_acceptance_and_its_folder_drafts(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.tiny("llama", dtype=torch.float32).requires_grad_(False)
    data = TrainingData(rows_of(model, 40, 24, 0), rows_of(model, 8, 24, 1), {})
    settings = Settings(out=tmp_path, steps=60, lr=0.02, evaluations=3, batch=8)
    report = train(objective(model, **options), data, settings)
    first, best = report.curve[0]["expected_length_t1"], report.best["expected_length_t1"]
    assert best > first + 0.02
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["specdec_drafter"] == "medusa"
    drafter = loading.resolve_drafter(str(tmp_path), BuildContext(model))
    assert isinstance(drafter, MedusaDrafter)
    again = objective(model, **options)
    again.begin(data.train.tokens_RL)
    again.module = layouts.read(tmp_path)
    again.module.borrow(model)
    batch = look(model, *data.held_out.tensors(), again.hidden)
    overlap_NK, _ = again.acceptance(batch)
    found = float(overlap_NK.double().cumprod(1).sum(1).mean())
    assert 1 + found == pytest.approx(best, rel=1e-5)
    on = create("medusa", model, init=str(tmp_path))
    on.begin(data.train.tokens_RL)
    assert on.depth == HEADS
    torch.testing.assert_close(on.acceptance(batch)[0], overlap_NK)
    assert all(p.requires_grad for p in on.module.parameters())


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("projection", ["own", "shared", "tied"])
@pytest.mark.parametrize("bias", [True, False])
def test_exports_read_back_as_the_same_heads(layout: str, projection: str, bias: bool, tmp_path: Path) -> None:
    model = tiny_models.tiny("llama")
    model.save_pretrained(tmp_path / "target")
    heads = MedusaHeads(HeadShape(HEADS, LAYERS, HIDDEN, VOCAB, VOCAB, projection, bias)).double()
    tiny_models.randomize(heads, 0.3, 5).requires_grad_(False)
    for name in ("own", "out"):
        (tmp_path / name).mkdir()
    layouts.write(heads, tmp_path / "own", str(tmp_path / "target"), torch.float64)
    MedusaObjective.export(tmp_path / "own", tmp_path / "out", layout)
    again = layouts.read(tmp_path / "out")
    again.borrow(model)
    heads.borrow(model)
    state = numbers(2, HIDDEN, seed=3)
    for k in range(HEADS):
        torch.testing.assert_close(again(k, state), heads(k, state), rtol=0, atol=1e-12)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "specdec_drafter" not in config
    assert MedusaDrafter.recognises(config, tmp_path / "out")


def test_export_says_what_a_layout_cannot(tmp_path: Path) -> None:
    for name in ("own", "vllm"):
        (tmp_path / name).mkdir()
    layouts.write(tiny_heads(ids=IDS), tmp_path / "own", "", torch.float64)
    with pytest.raises(InputError, match="no draft vocabulary"):
        layouts.export(tmp_path / "own", tmp_path / "vllm", "original")
    layouts.export(tmp_path / "own", tmp_path / "vllm", "vllm")
    assert layouts.read(tmp_path / "vllm").d2t_absolute.tolist() == IDS


def test_bad_options_are_refused() -> None:
    model = tiny_models.tiny("llama")
    for options, message in (
        ({"heads": 0}, "--heads"),
        ({"layers": 0}, "--layers"),
        ({"vocab": VOCAB + 1}, "--vocab"),
        ({"decay": 0.0}, "--decay"),
        ({"loss": "x"}, "no loss"),
        ({"projection": "x"}, "projection"),
    ):
        with pytest.raises(InputError, match=message):
            objective(model, **options)
    made = objective(model)
    short = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(short, short == 0, torch.zeros(1, 2, VOCAB), {2: torch.zeros(1, 2, HIDDEN)})
    with pytest.raises(InputError, match="--length"):
        made.loss(batch)
