"""Two tokenizers: what tokens stand for, how texts are translated, and drafts across the border."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_pairs
import torch
import transformers as tf
from specdec.drafters import CrossVocabDrafter, ModelDrafter
from specdec.drafters.cross_vocab import CommonTokens, Retokenised
from specdec.verifiers import Coupled
from tiny_text import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors

import specdec
from specdec.drafter import BuildContext
from specdec.errors import IncompatiblePairError, InputError
from specdec.generation import Stream
from specdec.policy import Fixed
from specdec.spelling import Spelling, complete
from specdec.translation import Translation, probe_texts
from specdec.tree_policy import DynamicTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARK = "\N{LOWER ONE EIGHTH BLOCK}"


@cache
def target() -> torch.nn.Module:
    return tiny_models.tiny("gpt-neox")


@cache
def translation() -> Translation:
    return Translation(*tiny_pairs.tokenizers())


def same_tokens() -> Translation:
    tokenizer = tiny_pairs.tokenizers()[0]
    return Translation(tokenizer, tokenizer)


def space_marked(words: list[str]) -> Any:
    """As SentencePiece models come: a space before the text, byte tokens, `<s>` in front."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, MARK, *words])}
    merges, pieces = [], set(vocab)
    for word in words:
        if len(word) > 1:
            merges.append((word[:-1], word[-1]))
    assert all(a in pieces and b in pieces for a, b in merges)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def marked() -> Spelling:
    return Spelling(space_marked([*"abcé", f"{MARK}a", f"{MARK}ab", "bc"]))


def test_pieces_are_bytes_in_both_alphabets() -> None:
    level, mark = Spelling(byte_tokenizer(merges=[("Ġ", "a")])), marked()
    for text in ("a bc", "é", "bc a", "你 ab\n"):
        data = text.encode()
        for spelling in (level, mark):
            tokens = spelling.tokenise(data)
            assert tokens is not None
            assert spelling.joined(tokens) == data
    assert level.by_bytes[b" a"] == 258
    assert mark.piece(mark.by_bytes["é".encode()]) == "é".encode()
    assert mark.piece(3 + 0xC3) == b"\xc3"
    assert level.specials.keys() == {256, 257}
    assert level.piece(257) is None
    assert level.piece(9999) is None


def test_the_space_before_a_text_is_no_part_of_it() -> None:
    spelling = marked()
    assert spelling.leads_with_space
    assert spelling.opening == [1]
    assert spelling.joined(spelling.tokenise(b"abc", opens=True) or []) == b" abc"
    assert spelling.joined(spelling.tokenise(b"abc") or []) == b"abc"
    assert spelling.joined(spelling.tokenise(b" abc") or []) == b" abc"
    assert not Spelling(byte_tokenizer()).leads_with_space


def test_text_that_looks_like_a_special_token_is_spelled() -> None:
    spelling = Spelling(byte_tokenizer())
    tokens = spelling.tokenise(b"a</s>b") or []
    assert 257 not in tokens
    assert spelling.joined(tokens) == b"a</s>b"


def test_unfinished_characters() -> None:
    data = "a你".encode()
    assert [complete(data[:n]) for n in range(len(data) + 1)] == [0, 1, 1, 1, 4]
    assert complete("é🙂".encode()[:-1]) == 2
    assert complete(b"") == 0
    spelling = marked()
    assert spelling.joined(spelling.tokenise(data[:3]) or []) == data[:3]


def test_tokenizers_that_cannot_be_spelled_are_refused() -> None:
    inner = Tokenizer(models.WordPiece(vocab={"a": 0, "##b": 1, "[UNK]": 2}))
    inner.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="WordPiece cannot be spelled"):
        Spelling(tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]"))


def test_prompts_are_translated_with_their_special_tokens() -> None:
    level = byte_tokenizer(merges=[("Ġ", "a")])
    there = Translation(level, marked().tokenizer)
    ids = [256, *level("bc a", add_special_tokens=False)["input_ids"], 257, *level("ab")["input_ids"]]
    theirs = there.prompt(ids)
    assert theirs[0] == 1
    assert theirs.count(1) == 1  # one beginning, whichever tokenizer wrote it
    assert there.draft.joined(theirs[: theirs.index(2)]) == b" bc a"
    assert there.draft.joined(theirs[theirs.index(2) :]) == b"ab"
    back = Translation(marked().tokenizer, level)
    assert back.target.joined(marked().tokenizer("bc a")["input_ids"]) == b" bc a"
    assert back.draft.joined(back.prompt(marked().tokenizer("bc a")["input_ids"])) == b"bc a"


def drafters() -> dict[str, Any]:
    draft = tiny_pairs.draft_of(target(), 0.03, translation().same)
    return {"tli": CommonTokens(draft, translation()), "retokenise": Retokenised(draft, translation())}


@pytest.mark.parametrize("method", ["tli", "retokenise"])
@pytest.mark.parametrize("verifier", ["coupled", "ratio", "block", "match"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_do_not_change(method: str, verifier: str, temperature: float) -> None:
    drafter, tokenizer = drafters()[method], translation().target.tokenizer
    for policy in (Fixed(1), Fixed(5), *((Fixed(3, (3, 2)), DynamicTree(8, 4, 3)) if drafter.trees else ())):
        if policy.branches and verifier in ("ratio", "block"):
            continue
        decoder = specdec.SpeculativeDecoder(
            target(), tokenizer=tokenizer, drafter=drafter, verifier=verifier, policy=policy
        )
        options = {"max_new_tokens": 40, "temperature": temperature, "seed": 5}
        out = decoder.generate(PROMPT, strict=True, eos_token_id=[], **options)
        if temperature == 0 or verifier == "coupled":
            assert out.tokens == tiny_models.reference(target(), PROMPT, 40, temperature=temperature, seed=5)
        assert temperature > 0 or out.stats.num_accepted_draft_tokens > 5


@pytest.mark.parametrize("method", ["tli", "retokenise"])
def test_with_one_tokenizer_it_drafts_what_the_model_drafter_does(method: str) -> None:
    there = same_tokens()
    draft = tiny_models.noisy(target(), 0.03)
    mine = CommonTokens(draft, there) if method == "tli" else Retokenised(draft, there)
    counts = []
    for drafter in (ModelDrafter(draft, vocabulary=sorted(there.same)), mine):
        decoder = specdec.SpeculativeDecoder(target(), drafter=drafter, policy=Fixed(4))
        # A prompt of letters, none of which merge.
        prompt = there.target.tokenise(b"wxyzwxyz")
        counts.append(decoder.generate(prompt, max_new_tokens=60, strict=True, eos_token_id=[]).stats.num_rounds)
    assert abs(counts[0] - counts[1]) <= (0 if method == "tli" else 12)


def test_common_tokens_carry_the_restricted_distribution() -> None:
    """q is the draft's softmax over the tokens that both have, under the target's numbers."""
    from specdec.chance import CounterChance
    from specdec.drafter import Request
    from specdec.policy import Plan
    from specdec.proposal import Draw
    from specdec.sampling import Sampling

    drafter, there = drafters()["tli"], translation()
    request = Request(tuple(PROMPT), Sampling(temperature=0.9), Draw.SAMPLED, tiny_models.VOCAB, 99)
    proposal = drafter.propose(drafter.start(request), Plan(1), CounterChance(1, "draft"))
    logits = tiny_models.cache_free(drafter.model, there.prompt(PROMPT))
    expected = torch.full((tiny_models.VOCAB,), -torch.inf, dtype=torch.float64)
    for mine, theirs in there.same.items():
        expected[mine] = logits[theirs]
    torch.testing.assert_close(proposal.q[0], (expected / 0.9).softmax(-1), rtol=0, atol=1e-12)
    assert float(proposal.q[0].sum()) == pytest.approx(1)
    assert int((proposal.q[0] == 0).sum()) == tiny_models.VOCAB - len(there.same)


@pytest.mark.parametrize("method", ["tli", "retokenise"])
def test_the_drafts_cache_is_that_of_its_own_text(method: str) -> None:
    drafter = drafters()[method]
    before = {key: value.clone() for key, value in drafter.model.state_dict().items()}
    decoder = specdec.SpeculativeDecoder(
        target(), tokenizer=translation().target.tokenizer, drafter=drafter, policy=Fixed(4)
    )
    task = decoder.prepare(PROMPT, max_new_tokens=30, strict=True, eos_token_id=[])
    for _ in Stream(task):
        pass
    # The state is not shown by the loop: the same rounds by hand.
    state = drafter.start(task.request)
    from specdec.chance import GreedyChance
    from specdec.outcome import conclude, finite
    from specdec.policy import Plan
    from specdec.tree import TokenTree

    own = decoder.prepare(PROMPT, max_new_tokens=30, eos_token_id=[]).target
    own.append(PROMPT)
    for _ in range(8):
        proposal = drafter.propose(state, Plan(4), GreedyChance())
        rows, broken = finite(own.forward(proposal.tree))
        p = task.request.sampling.probabilities(rows.logits, own.tokens, proposal.tree)
        outcome = conclude(proposal, Coupled().verify(p, proposal, len(own.tokens), GreedyChance()), rows, broken)
        own.commit(outcome.path, outcome.tokens)
        state = drafter.observe(state, outcome)
        session = state.session
        assert translation().draft.joined(session.tokens) == translation().target.joined(own.tokens)
        twin = session.fork()
        twin.drop_tree()
        row = twin.forward(TokenTree.empty()).logits[-1]
        expected = tiny_models.cache_free(drafter._runs(drafter.model), session.tokens)
        torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in drafter.model.state_dict().items())


def retokenised(of_target: Any, of_draft: Any) -> Retokenised:
    draft = tiny_models.tiny("llama", vocab_size=max(of_draft.get_vocab().values()) + 1)
    return Retokenised(draft, Translation(of_target, of_draft))


def test_committed_tokens_stay_and_the_last_token_may_not_be_a_beginning() -> None:
    of_target = byte_tokenizer(merges=[("a", "b"), ("b", "c"), ("ab", "c")])
    drafter = retokenised(of_target, byte_tokenizer(order=-1))
    there = drafter.translation
    ids = there.target.by_bytes

    def drafted(text: bytes) -> list[int]:
        return there.draft.tokenise(text) or []

    # "a" + "b" would be one token of this text; the target has chosen "a", so "b" follows it as it is.
    assert drafter._in_target([ids[b"x"], ids[b"a"]], drafted(b"bx")) == [ids[b"b"], ids[b"x"]]
    # Behind the end of the draft "ab" may still become "abc".
    assert drafter._in_target([ids[b"x"]], drafted(b"xab")) == [ids[b"x"]]
    assert drafter._in_target([ids[b"x"]], drafted(b"xabc")) == [ids[b"x"], ids[b"abc"]]
    # Alone it is all that there is: better than nothing.
    assert drafter._in_target([ids[b"x"]], drafted(b"ab")) == [ids[b"ab"]]


def test_the_drafts_end_of_text_is_the_targets() -> None:
    drafter = retokenised(byte_tokenizer(merges=[("a", "b")]), byte_tokenizer(order=-1))
    there = drafter.translation
    drafted = [*(there.draft.tokenise(b"xa") or []), there.draft.tokenizer.eos_token_id, 5, 6]
    x, a = there.target.by_bytes[b"x"], there.target.by_bytes[b"a"]
    assert drafter._in_target([x], drafted) == [x, a, there.target.tokenizer.eos_token_id]
    assert drafter._in_target([x], [there.draft.tokenizer.bos_token_id, 5]) == []


def test_unfinished_characters_cross_over_as_bytes() -> None:
    of_target = byte_tokenizer()
    drafter = retokenised(of_target, marked().tokenizer)
    there = drafter.translation
    data = "a你".encode()
    committed = there.target.tokenise(data[:2]) or []
    _, tail = drafter._in_draft([1, *(there.draft.tokenise(b"a") or [])], committed[1:])
    assert there.draft.joined(tail) == data[:2]
    rest = [3 + byte for byte in data[2:]]
    assert there.target.joined(drafter._in_target(committed, rest)) == data[2:]


def folder(model: Any, tokenizer: Any, path: Path) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_the_tokenizers_decide_the_method_and_the_name_tells(tmp_path: Path) -> None:
    mine = byte_tokenizer()
    model = tiny_models.tiny("llama", dtype=torch.float32, vocab_size=264)
    target_at = folder(model, mine, tmp_path / "target")
    draft_at = folder(copy.deepcopy(model), byte_tokenizer(order=-1), tmp_path / "draft")
    with pytest.raises(IncompatiblePairError, match=r"drafter='cross_vocab'.*--drafter-option draft="):
        specdec.load(target_at, draft_at)
    decoder = specdec.load(target_at, "cross_vocab", drafter_options={"draft": draft_at})
    assert decoder.drafter.name == "cross_vocab:tli"
    out = decoder.generate("def f", max_new_tokens=20, strict=True)
    assert out.tokens == decoder.generate_plain("def f", max_new_tokens=20).tokens
    few = BuildContext(model, byte_tokenizer(merges=[("e", "r"), ("Ġ", "t"), ("o", "n")]), dtype=torch.float32)
    (tmp_path / "probe.txt").write_text("er t on " * 9, encoding="utf-8")
    built = CrossVocabDrafter.build(few, draft=draft_at, probe=tmp_path / "probe.txt")
    assert built.name == "cross_vocab:retokenise"
    assert built.ratio > 1.3
    assert CrossVocabDrafter.build(few, draft=draft_at, method="tli").name == "cross_vocab:tli"


def test_options_are_checked() -> None:
    context = BuildContext(target(), byte_tokenizer())
    with pytest.raises(InputError, match=r"needs a draft model.*draft=org/model"):
        CrossVocabDrafter.build(context)
    with pytest.raises(InputError, match="method is one of"):
        CrossVocabDrafter.build(context, draft=target(), method="slem")
    with pytest.raises(InputError, match="needs both tokenizers"):
        CrossVocabDrafter.build(context, draft=target())
    with pytest.raises(InputError, match="ratio"):
        Retokenised(target(), translation(), ratio=0)


@pytest.mark.parametrize("method", ["tli", "retokenise"])
def test_a_real_draft_of_another_tokenizer(shared: Path, method: str) -> None:
    """The embedded draft, byte-level, for bitllama-1M, whose tokenizer is of SentencePiece's kind."""
    path = shared / "models" / "bitllama-1M"
    if not path.is_dir():
        pytest.skip("no bitllama-1M in ../shared/models")
    from specdec.loading import EMBEDDED

    options = {"draft": str(EMBEDDED / "draft"), "method": method}
    decoder = specdec.load(path, "cross_vocab", policy=Fixed(4), dtype="float32", drafter_options=options)
    coverage = decoder.drafter.translation.coverage(probe_texts())
    assert coverage > 0.95  # 512 short pieces, nearly all of which 4096 longer ones include
    for temperature in (0.0, 0.8):
        given = {"max_new_tokens": 40, "temperature": temperature, "seed": 3}
        prompt = "Once upon a time, there was a"
        assert decoder.generate(prompt, strict=True, **given).text == decoder.generate_plain(prompt, **given).text
