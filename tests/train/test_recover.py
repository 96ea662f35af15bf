"""Recovery: rounded forwards, straight-through gradients, masks that stay, a folder that holds what was trained."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer
from torch import nn

from specdec import cli
from specdec.bench.prompts import read_prompts
from specdec.errors import InputError, UnsupportedModelError
from specdec.loading import load_model
from specdec.quant import PackedLinear, named_packed, parse
from specdec.quant.layers import candidates, weight_of
from specdec.quant.recipe import Recipe
from specdec.quant.sparse import keep_largest
from specdec.runtime.copies import with_layers
from specdec.train import checkpoint, data, provenance
from specdec.train.objective import Acceptance, create
from specdec.train.pruning import Pruning
from specdec.train.recover import MASTERS, RecoverObjective
from specdec.train.rounding import RoundedLinear, rounded
from specdec.train.settings import Settings
from specdec.train.trainer import look, train

LENGTH = 16
DENSE = ("mxfp4", "mxfp6_e2m3", "mxint8", "int8", "int4", "int4-asym")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "initializer_range": 0.2}


def rows(count: int, seed: int) -> data.Rows:
    return data.Rows.full(np.random.default_rng(seed).integers(0, 64, (count, LENGTH)).astype(np.int32))


@pytest.fixture(scope="module")
def target():
    return tiny("llama", dtype=torch.float32, **SHAPE).requires_grad_(False)


@pytest.fixture
def texts():
    return data.TrainingData(rows(200, 1), rows(24, 2), {"from": "chance"})


def settings(out: Path, **changes) -> Settings:
    return Settings(**{"out": out, "steps": 24, "batch": 8, "lr": 2e-3, "evaluations": 4, "patience": 0, **changes})


def recover(target, recipe="mxfp4", kind: type[RecoverObjective] = RecoverObjective, **options) -> RecoverObjective:
    return create(kind, target, None, recipe=recipe, **options)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the layer


@pytest.mark.parametrize("name", [*DENSE, "sparse-60", "sparse-2x4"])
def test_the_forward_is_that_of_stored_weights(name):
    weight, bias, x = random(8, 64), random(8, seed=1), random(3, 5, 64, seed=2)
    layer, stored = RoundedLinear(weight, bias, parse(name)), PackedLinear.of(weight, bias, parse(name))
    torch.testing.assert_close(layer(x), stored(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(rounded(weight, layer.format, layer.mask), stored.weight_in(torch.float32))
    assert {part: t.tolist() for part, t in layer.packed().items()} == {p: t.tolist() for p, t in stored.parts.items()}


@pytest.mark.parametrize("name", DENSE)
def test_the_gradient_goes_straight_through(name):
    weight, bias, x = random(8, 64), random(8, seed=1), random(6, 64, seed=2).requires_grad_()
    layer = RoundedLinear(weight, bias, parse(name))
    out = layer(x)
    slope = random(*out.shape, seed=3)
    (out * slope).sum().backward()
    # Those of a plain product with the rounded values themselves.
    plain = nn.Parameter(rounded(weight, layer.format))
    given = x.detach()
    if name == "int8":
        scale = given.abs().amax(1, keepdim=True) / 127
        given = (given / scale).round() * scale
    given.requires_grad_()
    (F.linear(given, plain, bias) * slope).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, given.grad, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.detach(), weight)  # or nothing was rounded


def test_dropped_weights_have_no_gradient_and_stay_zero():
    layer = RoundedLinear(random(8, 64), None, parse("sparse-75"))
    layer(random(5, 64, seed=1)).square().sum().backward()
    assert int(layer.mask.sum()) == 8 * 16
    assert torch.equal(layer.weight.grad != 0, layer.mask)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    with torch.no_grad():
        layer.weight.add_(random(8, 64, seed=2))  # as momentum from before the pruning could
    kept = layer.format.unpack(layer.packed()) != 0
    assert torch.equal(kept, layer.mask)
    assert torch.equal(rounded(layer.weight, layer.format, layer.mask), layer.format.unpack(layer.packed()))


def test_half_precision_rounds_the_stored_weight_once():
    layer = RoundedLinear(random(8, 64), None, parse("mxfp6_e2m3"))
    x = random(3, 64, seed=1).bfloat16()
    expected = F.linear(x, layer.format.unpack(layer.packed(), torch.bfloat16))
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), expected)


# ------------------------------------------------------------------ the student


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "qwen2"])
def test_before_the_first_step_it_is_rounding_to_nearest(architecture, tmp_path):
    changes = {"n_embd": 32} if architecture == "gpt2" else SHAPE
    target = tiny(architecture, dtype=torch.float32, **changes).requires_grad_(False)
    before = copy.deepcopy(target.state_dict())
    made = recover(target, "int4")
    made.save(tmp_path)
    tokens = torch.arange(24).view(2, 12)
    shapes = candidates(target).shapes
    packed = {n: PackedLinear.of(weight_of(m), m.bias, parse("int4")) for n, m in target.named_modules() if n in shapes}
    with torch.no_grad():
        expected = with_layers(target, lambda name, _: packed.get(name))(tokens).logits
        torch.testing.assert_close(made.student(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        loaded = load_model(tmp_path, device="cpu")
        assert torch.equal(loaded(tokens).logits, expected)
    for name, layer in named_packed(loaded).items():
        assert all(torch.equal(part, packed[name].parts[p]) for p, part in layer.parts.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_everything_else_is_the_targets_own_storage(target):
    made = recover(target, Recipe("mxfp4", rules=((r"layers\.0\.", None),), head=None))
    theirs = {p.data_ptr() for p in target.parameters()}
    trained = {p.data_ptr() for p in made.module.parameters()}
    assert not trained & theirs
    assert {p.data_ptr() for p in made.student.parameters()} - trained <= theirs
    assert all(name.startswith("model/layers/1/") for name in made.module)
    made.loss(look(target, *rows(2, 3).tensors())).loss.backward()
    assert all(p.grad is not None for p in made.module.parameters())
    assert all(p.grad is None for p in target.parameters())


def test_held_out_numbers_are_what_they_say(target):
    made = recover(target, "int4")
    tokens, mask = rows(3, 5).tensors()
    mask[1, 9:] = False
    with torch.no_grad():
        overlap_NK, agree_NK, others = made.judge(look(target, tokens, mask))
        p, q = target(tokens).logits.log_softmax(-1), made.student(tokens).logits.log_softmax(-1)
    count = LENGTH + 9 + LENGTH
    assert overlap_NK.shape == agree_NK.shape == (count, 1)
    torch.testing.assert_close(overlap_NK[:, 0], torch.minimum(p.exp(), q.exp()).sum(-1)[mask])
    assert agree_NK[:, 0].tolist() == (p.argmax(-1) == q.argmax(-1))[mask].float().tolist()
    torch.testing.assert_close(others["kl"], (p.exp() * (p - q)).sum(-1)[mask], rtol=1e-3, atol=1e-5)
    for name, logs in (("loss", q), ("target_loss", p)):
        each = -logs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(others[name], each[mask[:, :-1]])


# ------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("recipe", "loss", "lr"), [("mxfp4", "fkl", 1e-3), ("int4-asym", "jsd", 3e-4), ("sparse-60", "lk", 5e-3)]
)
def test_it_learns_and_the_folder_holds_what_was_learnt(target, texts, tmp_path, recipe, loss, lr):
    made = recover(target, recipe, loss=loss, masters=True)
    report = train(made, texts, settings(tmp_path, steps=60, lr=lr))
    first, best = report.curve[0], report.best
    assert best["step"] > 0
    assert best["kl"] < 0.8 * first["kl"]
    assert best["target_loss"] == first["target_loss"]
    # The folder is an ordinary one: bit for bit the weights that were judged.
    loaded = load_model(tmp_path, device="cpu")
    masters = load_file(tmp_path / MASTERS)
    for name, layer in named_packed(loaded).items():
        trained = made.layers[name]
        assert torch.equal(layer.weight_in(torch.float32), rounded(trained.weight, trained.format, trained.mask))
        assert torch.equal(
            layer.weight_in(torch.float32), trained.format.unpack(trained.format.pack(masters[f"{name}.weight"]))
        )
    batch = look(target, *texts.held_out.tensors())
    with torch.no_grad():
        assert float(made.judge(batch)[2]["kl"].mean()) == pytest.approx(best["kl"], rel=1e-4)
        torch.testing.assert_close(
            loaded(batch.tokens_BL).logits, made.student(batch.tokens_BL).logits, rtol=1e-4, atol=1e-4
        )
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "specdec"
    assert provenance.read(tmp_path)["options"]["recipe"] == recipe


class Interrupted(RecoverObjective):
    """Somebody presses Ctrl-C in the middle of its sixth step."""

    calls = 0

    def loss(self, batch):
        self.calls += 1
        if self.calls == 6:
            signal.raise_signal(signal.SIGINT)
        return super().loss(batch)


@pytest.mark.parametrize(
    "options", [{"recipe": "int4"}, {"recipe": "sparse-60", "prune": "wanda", "prune_steps": 4, "prune_share": 0.8}]
)
def test_an_interrupted_run_ends_with_the_very_same_weights(target, texts, tmp_path, options):
    whole, parted = (settings(tmp_path / name, steps=12) for name in ("whole", "parted"))
    report = train(recover(target, **options), texts, whole)
    with pytest.raises(KeyboardInterrupt):
        train(recover(target, kind=Interrupted, **options), texts, parted)
    torch.manual_seed(123)
    resumed = train(recover(target, **options), texts, parted)
    ends = [load_file(checkpoint.latest(s.out) / "module.safetensors") for s in (whole, parted)]
    saved = [load_file(s.out / "model.safetensors") for s in (whole, parted)]
    for one, other in (ends, saved):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert [row["kl"] for row in report.curve] == [row["kl"] for row in resumed.curve]


# ------------------------------------------------------------------ pruning


def test_masks_stay_as_they_were_chosen(target, texts, tmp_path):
    made = recover(target, "sparse-75")
    chosen = {n: keep_largest(weight_of(target.get_submodule(n)).abs(), layer.format.stored(layer.weight.shape[1]))
              for n, layer in made.layers.items()}  # fmt: skip
    train(made, texts, settings(tmp_path))
    for name, layer in named_packed(load_model(tmp_path, device="cpu")).items():
        left = layer.weight_in(torch.float32) != 0
        assert not (left & ~chosen[name]).any()
        assert left.sum() > 0.99 * chosen[name].sum()
        assert not torch.equal(layer.weight_in(torch.float32), parse("sparse-75").unpack(
            parse("sparse-75").pack(weight_of(target.get_submodule(name)))
        ))  # fmt: skip


def test_steps_of_pruning_drop_more_and_more_and_nothing_comes_back():
    layer = RoundedLinear(random(8, 64), None, parse("sparse"))
    pruning = Pruning({"a": layer}, "magnitude", steps=4, share=0.6)
    assert not pruning.settled
    dropped, before = [], torch.ones(8, 64, dtype=torch.bool)
    for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0):
        pruning.advance(share)
        assert pruning.settled == (share >= 0.6)
        assert not (layer.mask & ~before).any()
        before = layer.mask.clone()
        dropped.append(round(1 - float(layer.mask.sum(1)[0]) / 64, 2))
        with torch.no_grad():
            layer.weight.add_(random(8, 64, seed=int(share * 10)) * 0.1)
    # 0.8 (1 - (1 - i/4)^3), of 64 rounded down.
    expected = [int(64 * 0.8 * (1 - (1 - i / 4) ** 3)) / 64 for i in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert dropped == [round(x, 2) for x in expected]


def test_wanda_looks_at_the_inputs(target):
    made = recover(target, Recipe("sparse-60", head=None), prune="wanda", calibration_rows=6)
    tokens = rows(6, 4)
    made.begin(tokens.tokens_RL)
    made.advance(0.0)
    with torch.no_grad():
        embedded = target.get_input_embeddings()(tokens.tensors()[0])
        first = target.model.layers[0]
        norms = first.input_layernorm(embedded).flatten(0, 1).norm(dim=0)
    layer = made.layers["model.layers.0.self_attn.q_proj"]
    weight = first.self_attn.q_proj.weight
    assert torch.equal(layer.mask, keep_largest(weight.abs() * norms, layer.format.stored(32)))
    assert not torch.equal(layer.mask, keep_largest(weight.abs(), layer.format.stored(32)))


def test_no_weights_are_kept_before_all_is_pruned(target, texts, tmp_path):
    made = recover(target, "sparse-60", prune_steps=3, prune_share=0.7)
    report = train(made, texts, settings(tmp_path, evaluations=8, patience=1))
    assert report.best["step"] >= 0.7 * 24
    assert report.curve[1]["kl"] < report.best["kl"] < report.curve[0]["kl"]  # less was pruned; all was, untrained
    for layer in named_packed(load_model(tmp_path, device="cpu")).values():
        assert int((layer.weight_in(torch.float32) != 0).sum(1).max()) <= layer.format.stored(layer.in_features)


# ------------------------------------------------------------------ what does not fit


def test_bad_input_is_refused_and_named(target):
    for options, message in (
        ({"recipe": "mxfp5"}, "no recipe or format is called 'mxfp5'; did you mean"),
        ({"recipe": {"default": "mxfp4", "rules": [["nowhere", "int8"]]}}, "'nowhere' matches none of"),
        ({"recipe": {"default": "int4-g128"}}, r"model\.layers\.0\.self_attn\.q_proj \[32, 32\] cannot be stored"),
        ({"recipe": {"default": "int4", "method": "gptq"}}, "'gptq'"),
        ({"loss": "l2"}, "no loss is called 'l2'"),
        ({"prune": "chance"}, "no pruning is called 'chance'"),
        ({"prune": "wanda"}, "no sparse format"),
        ({"recipe": "sparse-2x4", "prune_steps": 3}, "cannot be pruned in steps"),
        ({"recipe": "sparse", "prune_steps": 0}, "--prune-steps"),
        ({"recipe": "sparse", "prune_share": 1.0}, "--prune-share"),
    ):
        with pytest.raises(InputError, match=message):
            recover(target, **options)


def test_weights_that_cannot_be_stored_are_named(target, tmp_path):
    broken = copy.deepcopy(target)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    for recipe in ("mxfp4", "sparse"):
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of 2048 weights are NaN"):
            recover(broken, recipe)
    recover(target, "int4").save(tmp_path)
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        recover(load_model(tmp_path, device="cpu"), "int4")


def test_the_prompts_that_weights_are_judged_by_are_no_training_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB, **SHAPE).save_pretrained("target")
    byte_tokenizer().save_pretrained("target")
    prompts = [prompt.text for prompt in read_prompts()]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text + "\nmore"}) + "\n" for text in prompts))
    words = ["train", "recover", "--target", "target", "--recipe", "int4", "--steps", "1", "--length", "32"]
    for source in (["--data", "text.jsonl"], ["--self-generate", "8"]):
        assert cli.main([*words, *source]) == 2
        assert "holds an evaluation prompt" in capsys.readouterr().err


# ------------------------------------------------------------------ the command


def test_the_command_writes_a_folder_and_says_what_it_gained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB, **SHAPE).bfloat16()
    model.save_pretrained("target")
    byte_tokenizer().save_pretrained("target")
    Path("mixed.json").write_text('{"default": "mxfp4", "head": "mxfp6_e2m3"}')
    Path("text.txt").write_text("".join(f"value_{i} = {i * i}\n\n" for i in range(2000)), encoding="utf-8")
    words = ["train", "recover", "--target", "target", "--data", "text.txt", "--recipe", "mixed.json", "--out", "out"]
    words += ["--steps", "4", "--batch", "2", "--length", "32", "--evaluations", "2", "--held-out", "0.1"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out
    assert "KL to full precision" in out
    assert "specdec compare --target out" in out
    stored, theirs = load_file("out/model.safetensors"), load_file("target/model.safetensors")
    # What is not quantised is as it was, in its own dtype.
    for name, tensor in theirs.items():
        if name in stored:
            assert tensor.dtype == stored[name].dtype == torch.bfloat16
            assert torch.equal(tensor, stored[name])
    assert stored["model.layers.0.self_attn.q_proj.weight_codes"].dtype == torch.uint8
    assert "model.layers.0.self_attn.q_proj.weight" not in stored
    assert {layer.format.name for layer in named_packed(load_model("out", device="cpu")).values()} == {
        "mxfp4",
        "mxfp6_e2m3",
    }


def test_measures_of_several_processes_add_up():
    one, two = Acceptance(), Acceptance()
    for found, values in ((one, [0.5, 1.0]), (two, [3.0])):
        rows_N = torch.tensor(values, dtype=torch.float64)
        found.add(rows_N[:, None] / 4, torch.ones(len(values), 1), {"kl": rows_N})
    names = ("kl", "loss")
    sums = one.sums(names) + two.sums(names)
    one.restore(sums, names)
    assert one.means()["kl"] == pytest.approx(1.5)
    assert one.by_position(1) == pytest.approx([4.5 / 4 / 3])


@pytest.mark.slow
def test_two_processes_prune_and_round_alike(tmp_path):
    model = tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB, **SHAPE)
    model.save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"value_{i} = {i * i}\n\n" for i in range(2000)), encoding="utf-8")
    words = ["specdec", "train", "recover", "--target", str(tmp_path / "target"), "--data", str(text), "--length", "32"]
    words += ["--recipe", "sparse-60", "--prune", "wanda", "--prune-steps", "2", "--steps", "6", "--evaluations", "3"]
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "-m"]
    curves, ends = [], []
    for name, first, batch in (("one", [], "4"), ("two", launch, "2")):
        more = ["--batch", batch, "--lr", "3e-3", "--device", "cpu", "--out", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-m", *first, *words, *more], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append([(row["kl"], row["loss"]) for row in provenance.read(tmp_path / name)["held_out_curve"]])
        ends.append(load_file(checkpoint.latest(tmp_path / name) / "module.safetensors"))
    assert np.allclose(*curves, atol=1e-4)
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-3, atol=1e-5)
