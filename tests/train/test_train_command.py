"""`specdec train` as a user runs it: tiny models in folders, `main(argv)`, what is printed, exit codes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import noisy, tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec
from specdec import cli, registry
from specdec.cli import train as command
from specdec.train import checkpoint
from specdec.train.draft import DraftObjective

QUICK = ("--steps", "4", "--batch", "2", "--length", "32", "--evaluations", "2", "--lr", "3e-3", "--held-out", "0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, a draft that agrees with it often, and text."""
    made = tmp_path_factory.mktemp("models")
    target = tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB)
    for name, model in (("target", target), ("draft", noisy(target, 0.05))):
        model.save_pretrained(made / name)
        byte_tokenizer().save_pretrained(made / name)
    (made / "text.txt").write_text("".join(f"value_{i} = {i * i}\n\n" for i in range(2000)), encoding="utf-8")
    return made


@pytest.fixture
def run(folder, capsys, monkeypatch, tmp_path):
    """Runs `specdec train draft` on the target; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, data: bool = True):
        text = ["--data", str(folder / "text.txt")] if data else []
        target = ["--target", str(folder / "target"), "--init", str(folder / "draft")]
        code = invoke("train", "draft", *target, *text, *QUICK, *arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def invoke(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


# ------------------------------------------------------------------ help


def test_without_a_kind_it_explains_itself(capsys):
    assert invoke("train") == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    for kind in registry.available("trainer"):
        assert kind in text


def test_help_of_all_kinds_loads_no_torch():
    code = "import sys; from specdec.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


def test_examples_parse_with_the_options_of_their_kind():
    shown = command._EXAMPLES + "".join(
        registry.find("trainer", kind).examples for kind in registry.available("trainer")
    )
    examples = re.findall(r"^ +specdec train (\w+)(.*?)(?: {2,}.*)?$", shown, re.MULTILINE)
    kinds = {kind for kind, _ in examples}
    assert {"draft", "export"} <= kinds <= {*registry.available("trainer"), "export"}
    for kind, words in examples:
        if kind != "export" and "--help" not in words:
            assert command.kind_parser(kind).parse_args(shlex.split(words)).out


@pytest.mark.parametrize("kind", sorted(registry.available("trainer")))
def test_every_kind_has_help_and_defaults_that_are_its_own(kind, capsys):
    assert invoke("train", kind, "--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--target", "--data", "--self-generate", "--steps", "--minutes", "--out"))
    assert command.kind_parser(kind).parse_args([]).out == f"runs/{kind}"
    assert registry.find("trainer", kind).kind == kind


# ------------------------------------------------------------------ training


def test_a_draft_from_text(run, folder, tmp_path):
    code, out, err = run("--json", "result.json", "--loss", "jsd")
    assert code == 0, err
    assert re.search(r"draft: 4 steps, 256 tokens in 0:\d\d; ended by steps; best at step \d", out)
    assert f"specdec compare --target {folder / 'target'} --drafter runs/draft" in out
    assert len(re.findall(r"^step +\d", err, re.MULTILINE)) == 3
    result = json.loads((tmp_path / "result.json").read_text())
    record = json.loads((tmp_path / "runs" / "draft" / "provenance.json").read_text())
    assert result["curve"] == record["held_out_curve"]
    assert record["options"]["loss"] == "jsd"
    assert record["data"]["files"] == ["text.txt"]
    decoder = specdec.load(folder / "target", drafter="runs/draft", backend="eager")
    made = decoder.generate("value_", max_new_tokens=12)
    assert made.stats.num_accepted_draft_tokens > 0
    assert made.tokens == decoder.generate_plain("value_", max_new_tokens=12).tokens
    # The same command again has nothing left to do; other options are another run.
    code, again, err = run("--loss", "jsd")
    assert (code, again) == (0, out)
    assert "going on at step 4" in err
    code, _, err = run("--loss", "tv")
    assert code == 2
    assert "another options" in err
    assert run("--loss", "tv", "--restart")[0] == 0


def test_a_draft_from_the_targets_own_texts(run, tmp_path):
    # Prompts of the data, then the built-in ones.
    for data, files in ((True, ["text.txt"]), (False, ["the built-in prompts"])):
        code, _, err = run(
            "--self-generate",
            "6",
            "--self-temperature",
            "0.5",
            "--prompt-tokens",
            "5",
            "--out",
            f"out-{data}",
            data=data,
        )
        assert code == 0, err
        assert "the target wrote 6 of 6 texts" in err
        record = json.loads((tmp_path / f"out-{data}" / "provenance.json").read_text())
        assert record["data"]["self_generated"] == 6
        assert record["data"]["temperatures"] == [0.5]
        assert record["data"]["files"] == files
        assert record["num_train_rows"] == (12 if data else 6)


def test_a_new_draft_has_the_shape_that_was_asked_for(folder, tmp_path, capsys):
    shape = ("--layers", "1", "--hidden", "8", "--heads", "2", "--kv-heads", "1", "--intermediate", "12")
    out = tmp_path / "new"
    options = ("--target", str(folder / "target"), "--data", str(folder / "text.txt"), "--out", str(out), "--quiet")
    assert invoke("train", "draft", *options, *QUICK, *shape) == 0, capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[name] for name in names] == [1, 8, 2, 1, 12]
    assert config["vocab_size"] == TEXT_VOCAB


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.txt"), "--data nowhere.txt: No such file"),
        (("--length", "100000"), "too little text for one row of 100000 tokens"),
        (("--steps", "0"), "steps is a number above 0"),
        (("--batch", "100000"), "a step takes 100000 rows"),
        (("--self-generate", "-1"), "--self-generate is a number of texts >= 1"),
        (("--self-temperature", "hot"), "'hot' is not a list of numbers"),
        (("--loss", "l2"), "invalid choice: 'l2'"),
        (("--on-policy", "2"), "--on-policy is a share"),
        (("--layers", "2"), "leave out --layers"),
        (("--threads", "0"), "--threads is a whole number"),
        (("--json", "no/such/folder/x.json"), "cannot write"),
        (("--target", "./nowhere"), "cannot load a model from ./nowhere"),
        (("--los", "fkl"), "unrecognized arguments"),
    ],
)
def test_wrong_input_is_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert out == ""


def test_unknown_kinds_and_missing_text(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke("train", "drft") == 2
    assert "no trainer is called 'drft'; did you mean 'draft'" in capsys.readouterr().err
    assert invoke("train", "draft", "--target", str(folder / "target"), "--init", str(folder / "draft")) == 2
    assert "no text to train on: give --data FILE" in capsys.readouterr().err


# ------------------------------------------------------------------ export


class Exporting(DraftObjective):
    """A kind with a layout of its own."""

    kind, layouts = "exporting", ("theirs",)

    @classmethod
    def export(cls, source, out, layout):
        (out / "layout.txt").write_text(f"{source.name} as {layout}")


def test_export_calls_the_kind_that_wrote_the_folder(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "run", tmp_path / "out"
    source.mkdir()
    assert invoke("train", "export", str(source), "--layout", "theirs", "--out", str(out)) == 2
    assert "was not written by `specdec train`" in capsys.readouterr().err
    (source / "provenance.json").write_text('{"kind": "draft"}')
    assert invoke("train", "export", str(source), "--layout", "theirs", "--out", str(out)) == 2
    assert "no layout called 'theirs'; there is none for it" in capsys.readouterr().err
    monkeypatch.setattr(registry, "find", lambda *_: Exporting)
    assert invoke("train", "export", str(source), "--layout", "hers", "--out", str(out)) == 2
    assert "there are: theirs" in capsys.readouterr().err
    assert invoke("train", "export", str(source), "--layout", "theirs", "--out", str(out)) == 0
    assert (out / "layout.txt").read_text() == "run as theirs"
    assert invoke("train", "export", str(source), "--layout", "theirs", "--out", str(out)) == 2
    assert "is not empty" in capsys.readouterr().err


# ------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(folder, tmp_path):
    options = ["train", "draft", "--target", str(folder / "target"), "--init", str(folder / "draft"), "--data"]
    options += [str(folder / "text.txt"), "--length", "32", "--steps", "6", "--evaluations", "2", "--device", "cpu"]
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "-m"]
    own = ["--self-generate", "20", "--prompt-tokens", "5"]
    for name, first, more in (("one", [], ["--batch", "4"]), ("two", launch, ["--batch", "2"]), ("own", launch, own)):
        words = [*first, "specdec", *options, *more, "--out", str(tmp_path / name)]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("ended by steps") == 1  # one process speaks
    curves, ends = [], []
    for name, processes in (("one", 1), ("two", 2)):
        record = json.loads((tmp_path / name / "provenance.json").read_text())
        assert record["processes"] == processes
        curves.append([row["expected_length_t1"] for row in record["held_out_curve"]])
        ends.append(load_file(checkpoint.latest(tmp_path / name) / "module.safetensors"))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "minutes"), [("eagle", 40.0), ("medusa", 40.0), ("draft", 20.0)])
def test_a_kinds_own_budget_is_taken_where_none_is_given(kind: str, minutes: float) -> None:
    parser = command.kind_parser(kind)
    assert f"budget of time (default: {minutes:g}" in " ".join(parser.format_help().split())
    assert command._settings(kind, parser.parse_args([])).minutes == minutes
    by_steps = command._settings(kind, parser.parse_args(["--steps", "7"]))
    assert (by_steps.steps, by_steps.minutes) == (7, None)
    assert command._settings(kind, parser.parse_args(["--minutes", "3"])).minutes == 3


def test_medusa_heads_learn_from_the_targets_own_greedy_texts() -> None:
    given = command.kind_parser("medusa").parse_args([])
    assert (given.self_generate, given.self_temperature, given.text_share) == (512, (0.0,), 0.0)
    other = command.kind_parser("eagle").parse_args([])
    assert (other.self_generate, other.self_temperature, other.text_share) == (0, (0.0, 1.0), 0.5)
