"""The comparison: what is run, what is counted, and the arithmetic of `ideal`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.verifiers import Coupled, Ratio
from tiny_models import cache_free, noisy, tiny

import specdec
from specdec.bench import bare, baselines
from specdec.bench.compare import PLAIN, SPECULATIVE, compare, expects_identity
from specdec.bench.prompts import Prompt
from specdec.bench.timing import Gate
from specdec.errors import IncompatiblePairError, InputError
from specdec.policy import Fixed
from specdec.trace import Round
from specdec.verifier import Verdict


class Ids:
    """A tokenizer whose texts are token ids written as numbers."""

    bos_token_id = None
    chat_template = None

    def __call__(self, text: str):
        return {"input_ids": [int(part) for part in text.split()]}

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


PROMPTS = [Prompt("a", "3 1 4 1 5", "x"), Prompt("b", "2 7 1 8", "x"), Prompt("c", "9 9 9 8 9 9 9", "y")]


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch):
    monkeypatch.setattr(bare, "_SECONDS", 0.0)


@pytest.fixture(scope="module")
def target():
    return tiny("llama")


@pytest.fixture(scope="module")
def draft(target):
    return noisy(target, 0.02)


def decoder(target, drafter, **options):
    options.setdefault("policy", Fixed(3))
    return specdec.SpeculativeDecoder(target, tokenizer=Ids(), drafter=drafter, **options)


def quiet_gate():
    return Gate(read=lambda: None)


def rounds(*shapes: tuple[int, int, int]) -> list[Round]:
    return [Round(num_nodes=nodes, depth_proposed=depth, num_emitted=emitted) for nodes, depth, emitted in shapes]


def test_ideal_on_a_trace_made_by_hand():
    """Rounds of width 5, 5 and 1 emit 5 + 2 + 1 tokens: 8 plain steps of 10 ms against 2 (4 · 1 + 12) + 10 ms."""
    costs = bare.BareCosts({1: 0.010, 5: 0.012}, draft=0.001)
    trace = rounds((4, 4, 5), (4, 4, 2), (0, 0, 1))
    assert bare.ideal_speedup(trace, costs) == pytest.approx(0.080 / (2 * (0.004 + 0.012) + 0.010))


def test_ideal_counts_depths_for_the_draft_and_nodes_for_the_target():
    """A tree of 6 nodes, 2 deep."""
    costs = bare.BareCosts({1: 1.0, 7: 2.0}, draft=0.25)
    assert bare.ideal_speedup(rounds((6, 2, 3)), costs) == pytest.approx(3 / (2 + 0.5))


def test_ideal_without_a_draft_model_and_without_rounds():
    costs = bare.BareCosts({1: 1.0, 4: 1.5})
    assert bare.ideal_speedup(rounds((3, 3, 4)), costs) == pytest.approx(4 / 1.5)
    assert bare.ideal_speedup([], costs) == 0


def test_widths_are_those_of_the_rounds():
    assert bare.choose_widths(rounds((4, 4, 1), (2, 2, 1), (4, 4, 3))) == [1, 3, 5]
    many = bare.choose_widths(rounds(*((n, n, 1) for n in range(40))))
    assert many[0] == 1
    assert many[-1] == 40
    assert len(many) <= 12


def test_bare_forwards_write_behind_the_text_and_are_counted(target, draft):
    made = decoder(target, ModelDrafter(draft))
    costs = bare.measure(made, [3, 1, 4, 1, 5], [1, 4])
    assert set(costs.target) == {1, 4}
    assert min(*costs.target.values(), costs.draft) > 0
    assert costs.length == 4
    assert bare.measure(decoder(target, NgramDrafter()), [3, 1, 4], [1]).draft == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_number_fits_the_others(target, draft, temperature):
    made = decoder(target, ModelDrafter(draft))
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    seen = []
    result = compare(
        made,
        PROMPTS,
        options,
        repetitions=2,
        gate=quiet_gate(),
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert seen == [(i, 12) for i in range(1, 13)]
    report = result.as_dict()
    assert (report["prompts"], report["identical"], report["divergences"]) == (3, 3, [])
    assert report["expects_identity"]
    assert (report["slices"], report["clean_slices"], report["clean_means"]) == (12, 12, "unknown")
    stats = report["stats"]
    assert 0 < stats["num_accepted_draft_tokens"] <= stats["num_draft_tokens"]
    assert sum(stats["acceptance_histogram"].values()) == stats["num_rounds"]
    weighted = sum(n * count for n, count in stats["acceptance_histogram"].items())
    assert weighted == stats["num_accepted_draft_tokens"]
    assert stats["mean_acceptance_length"] == pytest.approx(1 + weighted / stats["num_rounds"])
    assert stats["num_tokens"] == 2 * 3 * 12
    assert set(report["seconds"]) == {"prefill", "draft", "verify", "commit", "other"}
    assert report["speedup"]["baseline"] == "plain loop"
    seconds = {m: sum(sum(row["seconds"][m]) for row in report["rows"]) for m in ("plain", "speculative")}
    assert report["efficiency"] == pytest.approx(seconds["plain"] / seconds["speculative"] / report["ideal_speedup"])
    wall = sum(run.seconds for row in result.rows for run in row.runs[SPECULATIVE])
    assert sum(report["seconds"].values()) <= wall
    for row in result.rows:
        assert row.ratios(SPECULATIVE, PLAIN) == [
            a.tokens_per_second / b.tokens_per_second
            for a, b in zip(row.runs[SPECULATIVE], row.runs[PLAIN], strict=True)
        ]


def test_methods_take_turns(target):
    """Neither method always runs first."""
    made, order = decoder(target, NgramDrafter()), []
    speculative, plain = made.generate, made.generate_plain
    made.generate = lambda ids, **o: order.append("s") or speculative(ids, **o)
    made.generate_plain = lambda ids, **o: order.append("p") or plain(ids, **o)
    compare(made, PROMPTS[:2], {"max_new_tokens": 2}, repetitions=1, warmup=0, gate=quiet_gate())
    assert order == ["p", "s", "s", "p"]


def test_identity_is_expected_of_rules_that_keep_the_seed(target, draft):
    ratio = decoder(target, ModelDrafter(draft), verifier=Ratio())
    assert expects_identity(ratio, {"temperature": 0.0})
    assert not expects_identity(ratio, {"temperature": 0.7})
    assert expects_identity(decoder(target, ModelDrafter(draft)), {"temperature": 0.7})
    lossy = decoder(target, ModelDrafter(draft), verifier="typical", allow_lossy=True)
    assert not expects_identity(lossy, {"temperature": 0.7})
    result = compare(ratio, PROMPTS, {"max_new_tokens": 12, "temperature": 1.0}, repetitions=1, gate=quiet_gate())
    assert not result.has_bug
    assert result.divergences == []


class Broken(Coupled):
    """Accepts the first drafted token whatever the target says."""

    def verify(self, p, proposal, position, chance):
        verdict = super().verify(p, proposal, position, chance)
        if len(proposal.tree) and int(verdict.node) < 0:
            return Verdict.of(0, p[1].argmax())
        return verdict


def broken_comparison(target):
    made = decoder(target, ModelDrafter(noisy(target, 0.3)), verifier=Broken())
    return compare(made, PROMPTS, {"max_new_tokens": 16}, repetitions=1, warmup=0, gate=quiet_gate())


def test_a_wrong_verifier_is_called_a_bug(target):
    result = broken_comparison(target)
    report = result.as_dict()
    different = [row for row in result.rows if not row.identical(SPECULATIVE)]
    assert different
    assert result.has_bug
    assert report["identical"] == 3 - len(different)
    assert [found["id"] for found in report["divergences"]] == [row.prompt.id for row in different]
    for row, found in zip(different, report["divergences"], strict=True):
        plain, speculative = row.runs[PLAIN][0].tokens, row.runs[SPECULATIVE][0].tokens
        assert plain[: found["index"]] == speculative[: found["index"]]
        assert (plain[found["index"]], speculative[found["index"]]) == (
            found["plain_token"],
            found["speculative_token"],
        )
        assert found["verdict"] == "BUG"


def test_a_tie_is_no_bug(target, monkeypatch):
    from specdec.bench import compare as module
    from specdec.bench.divergence import TIE

    real = module.explain
    monkeypatch.setattr(module, "explain", lambda *a, **o: replace(real(*a, **o), verdict=TIE))
    result = broken_comparison(target)
    assert result.divergences
    assert not result.has_bug


def test_plain_decoding_that_does_not_repeat_itself_is_a_bug(target, monkeypatch):
    """The explainer cannot explain it; the comparison is not lost."""
    from specdec.bench import compare as module

    def cannot(*_, **__):
        raise InputError("a replay chooses another token")

    monkeypatch.setattr(module, "explain", cannot)
    result = broken_comparison(target)
    found = result.as_dict()["divergences"][0]
    assert result.has_bug
    assert found["reason"] == "a replay chooses another token"


def test_wrong_input_stops_before_any_work(target):
    made = decoder(target, NgramDrafter())
    calls = []
    made.generate = lambda *a, **o: calls.append(a)
    with pytest.raises(InputError, match="prompt long: the prompt has 300 tokens"):
        compare(made, [*PROMPTS, Prompt("long", "1 " * 300)], {"max_new_tokens": 2})
    with pytest.raises(InputError, match="repetitions"):
        compare(made, PROMPTS, repetitions=0)
    with pytest.raises(InputError, match="no prompts"):
        compare(made, [])
    assert calls == []


def test_baselines_give_the_plain_tokens_and_leave_the_models_alone(target, draft):
    made = decoder(target, ModelDrafter(draft))
    options = {"max_new_tokens": 12}
    others = [b for name in baselines.NAMES for b in baselines.build(name, made, options)]
    before = target.generation_config, draft.generation_config, draft.generation_config.to_dict()
    result = compare(made, PROMPTS, options, repetitions=1, baselines=others, gate=quiet_gate())
    report = result.as_dict()
    assert list(report["baselines"]) == ["hf", "hf-assisted", "hf-assisted-k4"]
    for found in report["baselines"].values():
        assert found["identical"] == 3
        assert found["speculative_over_it"]["median"] > 0
    assert target.generation_config is before[0]
    assert draft.generation_config is before[1]
    assert draft.generation_config.to_dict() == before[2]


def test_constant_schedule_drafts_four_tokens_every_round(target):
    """The target drafting for itself: five tokens per target step."""
    twin = noisy(target, 0.0)
    made = decoder(target, ModelDrafter(twin))
    constant = baselines.build("hf-assisted", made, {"max_new_tokens": 15})[1]
    steps = []
    hook = target.register_forward_hook(lambda *_: steps.append(1))
    try:
        assert constant.generate([3, 1, 4]) == made.generate_plain([3, 1, 4], max_new_tokens=15).tokens
        steps.clear()
        constant.generate([3, 1, 4])
    finally:
        hook.remove()
    assert len(steps) == 3


def test_hf_sampling_follows_the_given_options_not_the_checkpoint(target):
    """top_k=1 at a high temperature is greedy; without it no default (50 in transformers) may apply."""
    made = decoder(target, NgramDrafter())
    plain = made.generate_plain([3, 1, 4], max_new_tokens=8).tokens
    sampled = baselines.build("hf", made, {"max_new_tokens": 8, "temperature": 5.0, "top_k": 1, "seed": 1})[0]
    assert sampled.generate([3, 1, 4]) == plain
    free = baselines.build("hf", made, {"max_new_tokens": 30, "temperature": 1e4, "seed": 1})[0]
    tokens = [3, 1, 4, *free.generate([3, 1, 4])]
    ranks = [int((logits := cache_free(target, tokens[:i])).gt(logits[tokens[i]]).sum()) for i in range(3, 33)]
    assert max(ranks) >= 50


def test_assisted_baseline_needs_a_draft_model(target):
    with pytest.raises(IncompatiblePairError, match="ngram drafter has none"):
        baselines.build("hf-assisted", decoder(target, NgramDrafter()), {})
    with pytest.raises(InputError, match="no baseline"):
        baselines.build("vllm", decoder(target, NgramDrafter()), {})


def test_peak_memory_is_that_of_the_process(target):
    from specdec.bench.machine import peak_memory

    peak = peak_memory(torch.device("cpu"))
    assert "device" not in peak
    assert peak.get("process", 1 << 30) > 50 << 20
