"""The commands as a user runs them: tiny models in folders, `main(argv)`, what is printed, exit codes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
from tiny_models import noisy, tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer

from specdec import cli
from specdec.bench import bare
from specdec.loading import EMBEDDED

COMPARE = ("--max-new-tokens", "10", "--limit", "2", "--repetitions", "2", "--warmup", "0")
SHORT_PROMPTS = ("def f(x):", "import os", "never read")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a target and a draft that agree often."""
    import torch

    folder = tmp_path_factory.mktemp("pair")
    target = tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB)
    for name, model in (("target", target), ("draft", noisy(target, 0.02))):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(SHORT_PROMPTS), encoding="utf-8")
    return folder


@pytest.fixture
def run(pair, capsys, monkeypatch):
    """Runs a command on the pair; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(bare, "_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def call(command: str, *arguments: str, draft: bool = True):
        models = ["--target", str(pair / "target"), *(["--drafter", str(pair / "draft")] if draft else [])]
        prompts = ["--prompts", str(pair / "prompts.txt")] if command == "compare" else []
        code = invoke(command, *models, *prompts, *arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def invoke(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def plain_text(pair, prompt: str, **options) -> str:
    import specdec

    return specdec.load(str(pair / "target")).generate_plain(prompt, **options).text


# ------------------------------------------------------------------ help


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from specdec.cli import main\ntry: main(['{}', '--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, file=sys.stderr)"
    for command in ("--debug", "compare", "generate", "info"):
        done = subprocess.run([sys.executable, "-c", code.format(command)], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "False", command
        assert "usage: specdec" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_ends_with_examples_that_parse(command, capsys):
    assert invoke(command, "--help") == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^ +(?:.*\| )?specdec {command}(.*?)(?: {{2,}}.*)?$", text, re.MULTILINE)
    assert examples
    for example in examples:
        import shlex

        parsed = cli.build_parser(command).parse_args([command, *shlex.split(example)])
        assert callable(parsed.run)


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "specdec", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"specdec \d+\.\d+\.\d+\n", done.stdout)


# ------------------------------------------------------------------ generate


def test_generate_prints_prompt_and_text(run, pair):
    code, out, err = run("generate", "def f(", "--max-new-tokens", "12")
    assert code == 0
    assert out == "def f(" + plain_text(pair, "def f(", max_new_tokens=12) + "\n"
    assert "12 tokens in" in err
    assert "ended by: length" in err
    assert run("generate", "def f(", "--max-new-tokens", "12", "--quiet")[2] == ""


def test_generate_reads_files_and_pipes(run, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("class A:\n", encoding="utf-8")
    _, from_file, _ = run("generate", "--prompt-file", str(file), "--max-new-tokens", "8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("class A:\n"))
    _, from_pipe, _ = run("generate", "--max-new-tokens", "8")
    assert from_file == from_pipe
    assert from_file.startswith("class A:\n")


def test_generate_writes_json(run, pair, tmp_path):
    file = tmp_path / "out.json"
    options = ("--temperature", "0.8", "--seed", "5", "--max-new-tokens", "12", "--k", "3", "--json", str(file))
    code, _, _ = run("generate", "import", *options)
    report = json.loads(file.read_text(encoding="utf-8"))
    assert code == 0
    assert report["text"] == plain_text(pair, "import", temperature=0.8, seed=5, max_new_tokens=12)
    assert len(report["tokens"]) == len(report["origins"]) == 12 == report["stats"]["num_tokens"]
    assert report["finish_reason"] == "length"
    assert report["policy"] == "fixed(k=3)"
    assert set(report["origins"]) == {"model", "target"}


def test_show_origin_brackets_drafted_text_without_colours(run, pair):
    code, out, err = run("generate", "def f(", "--show-origin", "--max-new-tokens", "20", "--k", "3")
    assert code == 0
    assert "drafted by model" in err
    shown = out.removeprefix("def f(").removesuffix("\n")
    assert shown.count("⟨") == shown.count("⟩") > 0
    assert re.sub("[⟨⟩]", "", shown) == plain_text(pair, "def f(", max_new_tokens=20)


def test_show_origin_colours_each_token_by_its_origin(run, pair, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = tmp_path / "out.json"
    options = ("--show-origin", "--max-new-tokens", "20", "--k", "3", "--json", str(file))
    _, out, err = run("generate", "def f(", *options)
    origins = json.loads(file.read_text(encoding="utf-8"))["origins"]
    text = plain_text(pair, "def f(", max_new_tokens=20)
    assert "\x1b[32m■ drafted by model" in err
    assert re.sub(r"\x1b\[[0-9;]*m", "", out) == "def f(" + text + "\n"
    drafted, own = (re.findall(rf"\x1b\[{code}m(.*?)\x1b", out, re.DOTALL) for code in ("32", "1;33"))
    # Line ends carry no colour. Bytes are tokens here: several may be one character, so sums are bounds.
    assert sum(map(len, drafted + own)) == len(text.replace("\n", ""))
    assert 0 < sum(map(len, drafted)) <= origins.count("model")
    assert bool(own) == ("target" in origins)


def test_show_origin_stops_where_the_text_stops(run, pair):
    full = plain_text(pair, "def f(", max_new_tokens=30)
    stop = next(c for c in full[8:] if c.isascii() and c.isprintable() and c not in full[:8])
    options = ("--max-new-tokens", "30", "--stop", stop)
    _, out, _ = run("generate", "def f(", *options)
    _, shown, _ = run("generate", "def f(", "--show-origin", *options)
    assert out == "def f(" + full[: full.index(stop)] + "\n"
    assert re.sub("[⟨⟩]", "", shown) == out


# ------------------------------------------------------------------ compare


def test_compare_prints_a_report_and_writes_json(run, tmp_path):
    file = tmp_path / "out.json"
    code, out, _ = run("compare", *COMPARE, "--k", "3", "--json", str(file))
    assert code == 0
    for words in ("✓ identical texts 2/2", "plain loop", "speculative", "ideal", "Acceptance", "Time", "Prompts"):
        assert words in out
    report = json.loads(file.read_text(encoding="utf-8"))
    fields = (
        "target draft verifier policy device dtype versions prompts identical divergences plain speculative speedup"
    )
    fields += " ideal_speedup efficiency stats seconds clean_slices rows baselines"
    assert set(fields.split()) <= set(report)
    assert (report["target"], report["draft"], report["drafter"]) == ("target", "draft", "model")
    assert (report["verifier"], report["policy"], report["dtype"]) == ("coupled", "fixed(k=3)", "float32")
    stats = report["stats"]
    wanted = "mean_acceptance_length draft_acceptance_rate acceptance_histogram conditional_acceptance"
    wanted += " joint_acceptance num_rounds num_draft_tokens num_accepted_draft_tokens"
    assert set(wanted.split()) <= set(stats)
    assert 0 < stats["num_accepted_draft_tokens"] <= stats["num_draft_tokens"]
    assert sum(stats["acceptance_histogram"].values()) == stats["num_rounds"]
    assert set(report["speedup"]) == {"median", "low", "high", "baseline"}
    assert report["speedup"]["low"] <= report["speedup"]["median"] <= report["speedup"]["high"]
    assert len(report["rows"]) == report["prompts"] == report["identical"] == 2
    assert report["slices"] == 2 * 2 * 2


@pytest.mark.parametrize("width", ["80", "100"])
def test_compare_fits_the_window(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    _, out, _ = run("compare", *COMPARE, "--baseline", "hf", "--baseline", "hf-assisted")
    assert max(map(len, out.splitlines())) <= int(width)
    speed = out[out.index("Speed") : out.index("Acceptance")]
    for words in ("hf-assisted-k4", "tokens/s", "spec. ÷ it"):
        assert words in speed
    assert "…" not in speed


def test_compare_says_law_not_tokens_where_the_seed_is_not_kept(run):
    code, out, _ = run("compare", *COMPARE, "--temperature", "1.0", "--verifier", "ratio")
    assert code == 0
    assert "does not keep the seed" in out
    assert "✗" not in out


def test_compare_model_free_and_by_category(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"text": f"x = {i}; x = {i}; ", "category": "ab"[i % 2]} for i in range(26)]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ("--prompts", str(prompts), "--max-new-tokens", "4", "--repetitions", "1")
    code, out, _ = run("compare", "--drafter", "ngram", *options, draft=False)
    assert code == 0
    assert "no weights" in out
    assert "medians by category" in out


def test_tree_means_the_fixed_policy(run, tmp_path):
    file = tmp_path / "out.json"
    assert run("compare", *COMPARE, "--tree", "3,2", "--json", str(file))[0] == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["policy"] == "fixed(k=2, tree 3x2)"
    assert report["identical"] == 2
    assert "10" in report["bare_seconds"]["target"], "3 + 6 nodes and the root"


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ((), "throughput"),
        (("--k", "4"), "fixed(k=4)"),
        (("--policy", "heuristic", "--k", "2"), "heuristic(k=2)"),
        (("--threshold", "0.3"), "confidence(threshold=0.3, k=10)"),
        (("--threshold", "0.3", "--k", "6"), "confidence(threshold=0.3, k=6)"),
    ],
)
def test_policy_options(options, policy):
    from specdec.cli.options import build_policy

    assert build_policy(cli.build_parser("compare").parse_args(["compare", *options])).name == policy


def test_a_bug_exits_1(run, monkeypatch):
    from specdec.bench import compare as module

    assert run("compare", *COMPARE)[0] == 0
    monkeypatch.setattr(module.Comparison, "has_bug", True)
    assert run("compare", *COMPARE)[0] == 1


# ------------------------------------------------------------------ info


def test_info(run, tmp_path, pair):
    file = tmp_path / "out.json"
    code, out, _ = run("info", "--json", str(file), "--dtype", "bfloat16")
    report = json.loads(file.read_text(encoding="utf-8"))
    assert code == 0
    assert report["dtype"] == "bfloat16"
    assert set(report["plugins"]) == {"drafter", "verifier", "policy", "backend", "trainer"}
    assert report["plugins"]["verifier"]["coupled"]["package"] == "specdec"
    model = report["models"][str(pair / "target")]
    assert model["parameters"] == sum(p.numel() for p in tiny("llama", vocab_size=TEXT_VOCAB).parameters())
    assert (model["layers"], model["vocabulary"], model["context"]) == (2, TEXT_VOCAB, 256)
    for words in ("coupled", "ngram", "throughput", "eager", "torch", "embedded target"):
        assert words in out


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "x", "--drafter", "sufix"), "did you mean 'suffix'"),
        (("generate", "x", "--verifier", "blok"), "did you mean 'block'"),
        (("generate", "x", "--policy", "fixd", "--k", "2"), "did you mean 'fixed'"),
        (("generate", "x", "--k", "0"), "k is the number of drafted tokens"),
        (("generate", "x", "--temperature", "-1"), "temperature must be"),
        (("generate", "x", "--policy", "throughput", "--threshold", "0.5"), "no option 'threshold'"),
        (("generate", "x", "--drafter", "ngram", "--drafter-option", "color=1"), "no option 'color'"),
        (("generate", "x", "--drafter-option", "color"), "key=value"),
        (("generate", "x", "--tree", "4,a"), "4,2,1"),
        (("generate", "x", "--verifier", "typical"), "--allow-lossy"),
        (("generate", "x", "--dtype", "float99"), "float99"),
        (("generate", "x", "--device", "nonsense"), "--device nonsense"),
        (("generate", "x", "--drafter", "./nowhere"), "./nowhere: no such folder"),
        (("generate", "x", "--json", "./nowhere/out.json"), "cannot write"),
        (("generate", "--prompt-file", "./nowhere.txt"), "cannot read ./nowhere.txt"),
        (("generate", "x" * 300), "context is 256"),
        (("generate", "x", "--chat"), "chat template"),
        (("generate", "x", "--colour"), "specdec generate --help"),
        (("compare", "--prompts", "./nowhere.jsonl"), "cannot read prompts"),
        (("compare", "--baseline", "hf-assisted", "--drafter", "ngram"), "ngram drafter has none"),
        (("info", "--drafter", "ngramm"), "did you mean 'ngram'"),
    ],
)
def test_errors_in_one_line(run, arguments, words):
    code, out, err = run(*arguments, draft=False)
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert words in err
    assert "Traceback" not in err


def test_debug_shows_where_it_happened(pair, run):
    from specdec.errors import UnknownPluginError

    for place in (("--debug", "generate"), ("generate", "--debug")):
        with pytest.raises(UnknownPluginError):
            cli.main([*place, "x", "--target", str(pair / "target"), "--drafter", "sufix"])


def test_unknown_command(capsys):
    assert invoke("generat") == 2
    assert re.fullmatch(r"error: [^\n]*generat[^\n]*\n", capsys.readouterr().err)


def test_interrupt_is_quiet(run, monkeypatch):
    from specdec.cli import info

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "gather", interrupted)
    assert run("info") == (130, "", "")


def test_a_failing_drafter_warns_in_one_line(run, monkeypatch):
    from specdec.drafters import NgramDrafter

    def fail(self, state, plan, chance):
        raise RuntimeError("no idea")

    monkeypatch.setattr(NgramDrafter, "propose", fail)
    code, _, err = run("generate", "x", "--drafter", "ngram", "--max-new-tokens", "8", "--quiet", draft=False)
    assert code == 0
    assert re.fullmatch(r"warning: [^\n]*no idea[^\n]*plain decoding\n", err)


def test_embedded_pair_is_the_default(monkeypatch, capsys):
    monkeypatch.setattr(bare, "_SECONDS", 0.0)
    if not (EMBEDDED / "target").is_dir():
        assert invoke("compare") == 2
        assert "no embedded pair" in capsys.readouterr().err
        return
    assert invoke("compare", "--limit", "1", "--max-new-tokens", "8", "--repetitions", "1") == 0
    assert "identical texts 1/1" in capsys.readouterr().out


def test_pieces_wait_until_the_stream_shows_them(capsys):
    """Text held back for a possible stop string comes out later, in the colour of the token that made it."""
    from rich.console import Console

    from specdec.cli.generate import Colours
    from specdec.text import Chunk

    colours = Colours(Console(width=80), byte_tokenizer(), [])
    codes = byte_tokenizer()("abcdef")["input_ids"]
    colours.show(Chunk("ab", tuple(codes[:3]), ("model", "target", "model")))
    colours.show(Chunk("cdef", tuple(codes[3:]), ("target", "model", "model")))
    colours.close()
    assert capsys.readouterr().out == "⟨a⟩b⟨c⟩d⟨ef⟩"
