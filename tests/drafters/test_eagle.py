"""EAGLE heads from every published layout, in every round of a text, beside a plain computation of what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plain_eagle
import pytest
import specdec.drafters.eagle as module
import tiny_eagle
import tiny_models
import torch
from plain_eagle import Plain
from safetensors.torch import load_file, save_file
from specdec.drafters import EagleDrafter
from torch import Tensor

import specdec
from specdec.drafter import BuildContext
from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.formats import eagle as files
from specdec.policy import Fixed, Policy
from specdec.tree_policy import DynamicTree, StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
TOLERANCE = 1e-9
VOCAB, WIDTH, LAYERS = tiny_models.VOCAB, 16, 4

EAGLE3 = {
    "version": 3, "vocab": VOCAB, "draft_vocab": 40, "width": WIDTH, "target_width": WIDTH, "heads": 4, "kv_heads": 2,
    "head_dim": 8, "ids": (1, 2, 3),
}  # fmt: skip
EAGLE1 = {**EAGLE3, "version": 1, "draft_vocab": VOCAB, "ids": (LAYERS,)}
#: layout, shape, and the tensors that the head brings along though it could share the target's.
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "original-3": ("original", {**EAGLE3, "ids": (2, 2, 1)}, set()),  # ids by the rule: 2, half, 3 before the end
    "original-3-same-vocabulary": ("original", {**EAGLE3, "ids": (2, 2, 1), "draft_vocab": VOCAB}, set()),
    "original-1": ("original", EAGLE1, {"embed"}),
    "original-1-bias": ("original", {**EAGLE1, "bias": True}, set()),
    "specforge": ("specforge", {**EAGLE3, "ids": (2, 2, 1)}, {"embed"}),
    "modelopt": ("modelopt", {**EAGLE3, "norm_before_fc": True}, set()),
    "speculators": ("speculators", {**EAGLE3, "norm_before_residual": True}, {"embed"}),
    "speculators-wide": ("speculators", {**EAGLE3, "width": 24, "fc_norm": True, "norm_output": True}, {"embed"}),
    "speculators-qwen3": ("speculators", {**EAGLE3, "kind": "qwen3", "norm_output": True}, set()),
    "speculators-four-states": ("speculators", {**EAGLE3, "ids": (0, 1, 3, 4)}, set()),
}
POLICIES: dict[str, Policy] = {
    "chain": Fixed(4),
    "tree": Fixed(3, (2, 2)),
    "shape": StaticTree((-1, -1, 0, 0, 1, 2)),
    "dynamic": DynamicTree(budget=8, k=4, width=3),
}


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_models.tiny("llama", num_hidden_layers=LAYERS)


def weights(shape: Mapping[str, Any], own: set[str]) -> dict[str, Tensor]:
    """Random tensors under their published names, float64."""
    torch.manual_seed(1)
    width, given = shape["width"], shape["target_width"]
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    into = 2 * width if shape["version"] == 3 else width
    sizes: dict[str, tuple[int, ...]] = {
        "layers.0.self_attn.q_proj.weight": (q, into),
        "layers.0.self_attn.k_proj.weight": (kv, into),
        "layers.0.self_attn.v_proj.weight": (kv, into),
        "layers.0.self_attn.o_proj.weight": (width, q),
        "layers.0.mlp.gate_proj.weight": (24, width),
        "layers.0.mlp.up_proj.weight": (24, width),
        "layers.0.mlp.down_proj.weight": (width, 24),
        "layers.0.post_attention_layernorm.weight": (width,),
    }
    if shape["version"] == 3:
        sizes["fc.weight"] = (width, len(shape["ids"]) * given)
        sizes["layers.0.hidden_norm.weight"] = sizes["layers.0.input_layernorm.weight"] = sizes["norm.weight"] = (
            width,
        )
        sizes["lm_head.weight"] = (shape["draft_vocab"], width)
    else:
        sizes["fc.weight"] = (width, 2 * width)
    if shape.get("bias"):
        sizes["fc.bias"] = (width,)
    if shape.get("norm_before_fc"):
        sizes["input_norm.weight"] = (len(shape["ids"]) * given,)
    if shape.get("fc_norm"):
        sizes.update({f"fc_norm.{i}.weight": (given,) for i in range(len(shape["ids"]))})
    if shape.get("kind") == "qwen3":
        sizes["layers.0.self_attn.q_norm.weight"] = sizes["layers.0.self_attn.k_norm.weight"] = (shape["head_dim"],)
    if "embed" in own:
        sizes["embed_tokens.weight"] = (shape["vocab"], width)
    made = {
        name: torch.randn(size, dtype=torch.float64) * (0.4 if len(size) > 1 else 1) for name, size in sizes.items()
    }
    if shape["draft_vocab"] < shape["vocab"]:
        made["d2t"] = tiny_eagle.draft_vocabulary(shape["vocab"], shape["draft_vocab"])
    return made


def write(folder: Path, case: str) -> dict[str, Tensor]:
    layout, shape, own = CASES[case]
    made = weights(shape, own)
    plain_eagle.WRITERS[layout](folder, shape, made)
    return made


def opened(folder: Path, target: Any, **options: Any) -> EagleDrafter:
    drafter = EagleDrafter.build(BuildContext(target, source=str(folder)), **options)
    assert isinstance(drafter, EagleDrafter)
    return drafter


def plain(case: str, made: Mapping[str, Tensor], target: Any) -> Plain:
    shape = CASES[case][1]
    embed = made.get("embed_tokens.weight", target.get_input_embeddings().weight.detach())
    return Plain(shape, made, embed, made.get("lm_head.weight", target.get_output_embeddings().weight.detach()))


@torch.inference_mode()
def states_of(target: Any, tokens: Sequence[int], ids: Sequence[int]) -> list[list[Tensor]]:
    hidden = target(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
    return [[hidden[i][0, at] for i in ids] for at in range(len(tokens))]


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int], Tensor]]:
    """Every row that a drafter's head computed: the text before it, the path to it, its logits in target ids."""
    seen: list[tuple[list[int], list[int], Tensor]] = []
    grow = module.grow

    def spying(expand: Any, plan: Any, request: Any, prefix: Any, chance: Any, ids_R: Tensor | None) -> Any:
        text, done = list(prefix), [0]

        def recorded(ran: Any) -> Any:
            logits = yield from expand(ran)
            new = range(done[0] - 1, len(ran))
            for node, row in zip(new, logits, strict=True):
                whole = row.clone()
                if ids_R is not None:
                    whole = torch.full((VOCAB,), -torch.inf, dtype=row.dtype).index_copy_(0, ids_R, row)
                seen.append((text, [int(ran.tokens[n]) for n in ran.path(node)], whole))
            done[0] = len(ran) + 1
            return logits

        return grow(recorded, plan, request, prefix, chance, ids_R)

    monkeypatch.setattr(module, "grow", spying)
    return seen


def in_target_ids(logits: Tensor, made: Mapping[str, Tensor]) -> Tensor:
    if "d2t" not in made:
        return logits
    whole = torch.full((VOCAB,), -torch.inf, dtype=logits.dtype)
    for draft_id, offset in enumerate(made["d2t"].tolist()):
        whole[draft_id + offset] = logits[draft_id]
    return whole


def generate(target: Any, drafter: EagleDrafter, policy: Policy, **options: Any) -> Any:
    decoder = specdec.SpeculativeDecoder(target, drafter=drafter, policy=policy, verifier="coupled")
    return decoder.generate(PROMPT, **{"max_new_tokens": 12, "strict": True, **options})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_says_what_the_plain_computation_says(
    case: str, policy: str, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(tmp_path, case)
    reference, ids = plain(case, made, target), CASES[case][1]["ids"]
    seen = record(monkeypatch)
    out = generate(target, opened(tmp_path, target), POLICIES[policy])
    assert out.tokens == tiny_models.reference(target, PROMPT, 12)
    assert len({len(text) for text, _, _ in seen}) > 3  # rounds
    assert max(len(path) for _, path, _ in seen) >= 2
    states = states_of(target, out.prompt + out.tokens, ids)
    for text, path, logits in seen[:: 1 if policy == "chain" else 5]:
        expected = in_target_ids(reference.says(states, text, path), made)
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("wrong", ["token", "layer", "map", "stale"])
def test_the_comparison_notices_what_goes_wrong_in_practice(
    wrong: str, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off-by-one tokens and layers, a map read as absolute, and own features kept where true ones have come."""
    made = write(tmp_path, "modelopt")
    seen = record(monkeypatch)
    out = generate(target, opened(tmp_path, target), Fixed(3))
    reference, ids = plain("modelopt", made, target), CASES["modelopt"][1]["ids"]
    tokens = out.prompt + out.tokens
    states = states_of(target, tokens, [i + (wrong == "layer") for i in ids])
    text, path, logits = next(row for row in seen if len(row[0]) > len(PROMPT) and len(row[1]) == 2)
    shifted = [text[0], *text[:-1]] if wrong == "token" else text
    if wrong == "stale":  # the last accepted row as it was when it was drafted: from the head's own output
        kept = len(text) - 2
        features = torch.stack([reference.feature(states[i]) for i in range(kept)])
        _, own = reference.rows(features, text[1 : kept + 1])
        true = reference.feature
        reference.feature = lambda given: own[-1] if given is states[kept] else true(given)  # type: ignore[method-assign]
    said = reference.says(states, shifted, path)
    if wrong == "map":
        expected = torch.full((VOCAB,), -torch.inf, dtype=said.dtype)
        expected[made["d2t"].clamp_max(VOCAB - 1)] = said
    else:
        expected = in_target_ids(said, made)
    gap = (logits.nan_to_num(neginf=-1e3) - expected.nan_to_num(neginf=-1e3)).abs().max()
    assert gap > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_folders_are_recognised(case: str, target: Any, tmp_path: Path) -> None:
    write(tmp_path, case)
    config = json.loads((tmp_path / "config.json").read_text())
    assert EagleDrafter.recognises(config, tmp_path)
    decoder = specdec.SpeculativeDecoder(target, drafter=str(tmp_path), policy=Fixed(3))
    assert isinstance(decoder.drafter, EagleDrafter)
    assert decoder.generate(PROMPT, max_new_tokens=6, strict=True).tokens == tiny_models.reference(target, PROMPT, 6)


def test_other_folders_are_not(target: Any, tmp_path: Path) -> None:
    tiny_models.tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not EagleDrafter.recognises(config, tmp_path)
    for other in (
        {"architectures": ["DFlashDraftModel"], "num_hidden_layers": 1, "model_type": "qwen3"},
        {"speculators_model_type": "peagle", "architectures": ["PEagleSpeculator"]},
        {"medusa_num_heads": 3},
    ):
        assert not EagleDrafter.recognises(other, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"speculators_model_type": "peagle"}))
    with pytest.raises(UnsupportedModelError, match="holds no EAGLE head: it is a 'peagle' speculator"):
        opened(tmp_path, target)


def damaged(folder: Path, target: Any, change: Any, config: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Open a ModelOpt folder whose tensors went through `change`, and whose config got other fields."""
    write(folder, "modelopt")
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    opened(folder, target, **options)


def without(name: str) -> Any:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def put(name: str, value: Any) -> Any:
    return lambda tensors: {**tensors, name: value(tensors) if callable(value) else value}


def absolute(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.arange(len(tensors["d2t"])) + tensors["d2t"]


@pytest.mark.parametrize(
    ("change", "config", "error", "message"),
    [
        (without("norm.weight"), {}, InputError, r"lack 1 of its weights, for example norm\.weight"),
        (without("lm_head.weight"), {}, InputError, r"lack 1 of its weights, for example lm_head\.weight"),
        (without("d2t"), {}, InputError, r"lack 1 of its weights, for example d2t"),
        (without("layers.0.hidden_norm.weight"), {}, InputError, "EAGLE-3 head's files lack"),
        (put("layers.0.extra", torch.zeros(1)), {}, InputError, r"no such head has: layers\.0\.extra"),
        (put("fc.weight", torch.zeros(16, 32)), {}, InputError, r"fc\.weight has shape \[16, 32\].*\[16, 48\]"),
        (dict, {"hidden_size": 1 << 40, "head_dim": 8}, (InputError, IncompatiblePairError), r"weight|width|wide"),
        (dict, {"target_hidden_size": 32}, IncompatiblePairError, "a target of width 32, and this one has 16"),
        (put("t2d", torch.zeros(VOCAB)), {}, InputError, "t2d marks 0 tokens"),
        (put("d2t", absolute), {}, InputError, "d2t holds target ids, where offsets are meant"),
        (lambda t: {**without("t2d")(t), "d2t": t["d2t"] + 1}, {}, InputError, "1 of its tokens lie outside"),
        (lambda t: {**without("t2d")(t), "d2t": -torch.arange(40)}, {}, InputError, "two of its tokens are one"),
        (put("d2t", torch.zeros(40)), {}, InputError, "one whole number for each draft token"),
        (dict, {"model_type": "mamba"}, UnsupportedModelError, "layers of type 'mamba'"),
        (dict, {"num_hidden_layers": 10**6}, UnsupportedModelError, "1 to 64 layers"),
        (dict, {"eagle_config": {"use_mtp_layernorm": True}}, UnsupportedModelError, "use_mtp_layernorm"),
        (dict, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}}, IncompatiblePairError, "has 0 to 4"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_what_is_wrong(
    change: Any, config: Mapping[str, Any], error: Any, message: str, target: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        damaged(tmp_path, target, change, config)


def test_bad_folders_and_options_are_refused(target: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a head that was trained for this target"):
        EagleDrafter.build(BuildContext(target))
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        opened(tmp_path, target)
    write(tmp_path, "modelopt")
    with pytest.raises(InputError, match="hidden_convention is one of input, output, not 'before'"):
        opened(tmp_path, target, hidden_convention="before")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read"):
        opened(tmp_path, target)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        opened(tmp_path, target)
    torch.save({"fc.weight": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")  # code when unpickled
    with pytest.raises(InputError, match="cannot read"):
        opened(tmp_path, target)


def test_a_head_for_another_target_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "modelopt")
    with pytest.raises(IncompatiblePairError, match="trained for a target of width 16, and this one has 32"):
        opened(tmp_path, tiny_models.tiny("llama", hidden_size=32))
    with pytest.raises(IncompatiblePairError, match="knows 64 tokens, and the target has 48"):
        opened(tmp_path, tiny_models.tiny("llama", num_hidden_layers=LAYERS, vocab_size=48))


def test_the_export_reads_back_as_the_same_head(target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, changes in enumerate(
        ({"own_head": False}, {"fc_norm": True, "norm_output": True}, {"draft_vocab_size": 64})
    ):
        fields = {"target_layer_ids": [0, 2, 3], "hidden_convention": "output", "draft_vocab_size": 40, **changes}
        head = tiny_eagle.head(target, **fields)
        own, out = tmp_path / f"own{i}", tmp_path / f"out{i}"
        own.mkdir()
        out.mkdir()
        files.write_own(own, head, torch.float64)
        found = files.read(own)
        files.export(found, out, target.get_output_embeddings().weight.detach())
        config = json.loads((out / "config.json").read_text())
        assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # the layout names inputs of layers
        assert load_file(out / "model.safetensors")["t2d"].sum() == fields["draft_vocab_size"]
        rows = []
        for folder in (own, out):
            seen = record(monkeypatch)
            generate(target, opened(folder, target), Fixed(3))
            rows.append(torch.stack([logits for _, _, logits in seen]))
            monkeypatch.undo()
        torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="needs that table"):
        files.export(files.read(tmp_path / "own0"), tmp_path / "out0")
