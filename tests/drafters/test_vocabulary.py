"""Draft vocabularies: the cut head against the whole one, what is always in, files, and texts that stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from specdec.drafters import ModelDrafter
from tiny_text import EOS, TEXT_VOCAB, byte_tokenizer
from torch import Tensor

import specdec
from specdec import cli
from specdec.chance import CounterChance
from specdec.drafter import BuildContext, Request
from specdec.errors import InputError
from specdec.growth import grow
from specdec.policy import Fixed, Plan
from specdec.proposal import Draw
from specdec.runtime.session import run
from specdec.sampling import Sampling
from specdec.tree import TokenTree
from specdec.tree_policy import DynamicTree
from specdec.vocabulary import DraftVocabulary, count_tokens, cut_head, most_frequent

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
KEPT = list(range(0, tiny_models.VOCAB, 2))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt-neox", "gemma3", "phi"])
def test_the_cut_model_has_the_whole_ones_logits(name: str) -> None:
    model = tiny_models.tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = torch.tensor([9, 2, 40])
    twin = cut_head(model, rows)
    ids = torch.tensor([PROMPT])
    torch.testing.assert_close(twin(ids).logits, model(ids).logits[..., rows], rtol=1e-12, atol=1e-12)
    assert twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    twin.get_output_embeddings().weight.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def masked(logits_FV: Tensor) -> Tensor:
    keep = torch.zeros(logits_FV.shape[-1], dtype=torch.bool)
    keep[KEPT] = True
    return logits_FV.masked_fill(~keep, -torch.inf)


PLANS = [Plan(4), Plan(3, (3, 2)), Plan(4, budget=8, width=3), Plan(5, stop_below=0.2), Plan(2, (20,))]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, top_k=40, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, repetition_penalty=1.4),
    Sampling(repetition_penalty=1.4),
]


@pytest.mark.parametrize("draw", list(Draw))
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_draft_vocabulary_is_the_whole_one_with_the_rest_at_minus_infinity(
    sampling: Sampling, plan: Plan, draw: Draw
) -> None:
    table = torch.randn(200, tiny_models.VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    request = Request(tuple(PROMPT), sampling, draw, tiny_models.VOCAB, 99)
    ids_R = torch.tensor(KEPT)

    def rows(ran: TokenTree, columns: Sequence[int] | None) -> Tensor:
        newest = ran.tokens[[i for i, d in enumerate(ran.depths) if d == ran.max_depth]] if len(ran) else [199]
        logits = table[newest]
        return masked(logits) if columns is None else logits[:, list(columns)]

    def expand(columns: Sequence[int] | None):
        def inner(ran: TokenTree):
            yield from ()
            return rows(ran, columns)

        return inner

    whole = run(grow(expand(None), plan, request, PROMPT, CounterChance(5, "draft")))
    cut = run(grow(expand(KEPT), plan, request, PROMPT, CounterChance(5, "draft"), ids_R))
    assert cut.proposal.tree.tokens.tolist() == whole.proposal.tree.tokens.tolist()
    assert (cut.proposal.tree.parents, cut.ran_as) == (whole.proposal.tree.parents, whole.ran_as)
    assert cut.proposal.draws == whole.proposal.draws
    assert set(cut.proposal.tree.tokens.tolist()) <= set(KEPT)
    if whole.proposal.q is not None:
        assert torch.equal(cut.proposal.q, whole.proposal.q)


@pytest.mark.parametrize("verifier", ["coupled", "ratio", "recursive", "match"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_do_not_change(temperature: float, verifier: str) -> None:
    target = tiny_models.tiny("llama-tied")
    drafter = ModelDrafter(tiny_models.noisy(target, 0.02), vocabulary=KEPT)
    for policy in (Fixed(4), Fixed(2, (3, 2)), DynamicTree(6, 3, 3)):
        if policy.branches and verifier == "ratio":
            continue
        decoder = specdec.SpeculativeDecoder(target, drafter=drafter, verifier=verifier, policy=policy)
        out = decoder.generate(PROMPT, max_new_tokens=40, temperature=temperature, seed=2, strict=True)
        if temperature == 0 or verifier == "coupled":
            expected = tiny_models.reference(target, PROMPT, 40, temperature=temperature, seed=2)
            assert out.tokens == expected
            assert any(token % 2 for token in expected), "this text is meant to leave the draft vocabulary"
        drafted = [token for token, origin in zip(out.tokens, out.origins, strict=True) if origin == "model"]
        assert all(token % 2 == 0 for token in drafted)


def test_the_most_frequent_with_what_is_always_in() -> None:
    counts = count_tokens([[1, 1, 1, 2, 2, 5], torch.tensor([5, 5, 0])], 8)
    assert counts.tolist() == [1, 3, 2, 0, 0, 3, 0, 0]
    assert most_frequent(counts, 3, always=[7]).ids_R.tolist() == [1, 5, 7]
    assert most_frequent(counts, 5).ids_R.tolist() == [0, 1, 2, 3, 5]  # of those never seen the lowest
    assert most_frequent(counts, 2).coverage(counts) == pytest.approx(6 / 9)
    for size in (1, 9):
        with pytest.raises(InputError, match="draft vocabulary of"):
            most_frequent(counts, size, always=[7])


def test_end_of_text_and_special_tokens_are_always_in(tmp_path: Path) -> None:
    model = tiny_models.tiny("llama", vocab_size=TEXT_VOCAB, eos_token_id=EOS)
    assert EOS in ModelDrafter(model, vocabulary=[5]).vocabulary.ids_R.tolist()
    model.save_pretrained(tmp_path / "draft")
    (tmp_path / "text.txt").write_text("aab " * 40, encoding="utf-8")
    tokenizer = byte_tokenizer()
    context = BuildContext(model, tokenizer, str(tmp_path / "draft"), dtype=torch.float64, device="cpu")
    built: Any = ModelDrafter.build(context, vocabulary=4, vocabulary_data=tmp_path / "text.txt")
    letters = [tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]]
    assert built.vocabulary.ids_R.tolist() == sorted([*letters, 256, EOS])
    with pytest.raises(InputError, match="vocabulary_data=FILE"):
        ModelDrafter.build(context, vocabulary=4)
    with pytest.raises(InputError, match="give vocabulary=N"):
        ModelDrafter.build(context, vocabulary_data=tmp_path / "text.txt")


def test_files_come_back_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    DraftVocabulary.of([9, 3, 3, 5], {"data": "text"}).save(tmp_path / "v.safetensors")
    back = DraftVocabulary.load(tmp_path / "v.safetensors")
    assert back.ids_R.tolist() == [3, 5, 9]
    assert back.about["data"] == "text"
    assert ModelDrafter(tiny_models.tiny(), vocabulary=tmp_path / "v.safetensors").vocabulary.ids_R.tolist() == [
        3,
        5,
        9,
    ]
    save_file({"d2t": torch.zeros(3, dtype=torch.int64)}, str(tmp_path / "offsets.safetensors"))
    save_file({"d2t_absolute": torch.zeros(3, 2, dtype=torch.int64)}, str(tmp_path / "shape.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(b"nothing")
    for name in ("offsets", "shape", "torn", "missing"):
        with pytest.raises(InputError):
            DraftVocabulary.load(tmp_path / f"{name}.safetensors")
    for ids in ([], [-1, 3], torch.ones(3)):
        with pytest.raises(InputError):
            DraftVocabulary.of(ids)
    with pytest.raises(InputError, match="made for another tokenizer"):
        ModelDrafter(tiny_models.tiny(), vocabulary=[3, tiny_models.VOCAB])


def test_the_command_writes_what_the_drafter_reads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_models.tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB)
    for folder in ("target", "draft"):
        model.save_pretrained(tmp_path / folder)
        byte_tokenizer().save_pretrained(tmp_path / folder)
    (tmp_path / "text.jsonl").write_text('{"text": "aaab"}\n{"text": "aacb"}\n{"text": "aabbb"}\n', encoding="utf-8")
    out = tmp_path / "v.safetensors"
    command = ("vocab", "--target", str(tmp_path / "target"), "--data", str(tmp_path / "text.jsonl"))
    assert cli.main([*command, "--size", "4", "--out", str(out)]) == 0
    assert "held-out" in capsys.readouterr().out
    assert len(DraftVocabulary.load(out)) == 4
    decoder = specdec.load(
        tmp_path / "target", tmp_path / "draft", dtype="float32", drafter_options={"vocabulary": str(out)}
    )
    assert len(decoder.drafter.vocabulary) == 4
    assert (
        decoder.generate("aab", max_new_tokens=8, strict=True).tokens
        == decoder.generate_plain("aab", max_new_tokens=8).tokens
    )
