"""`custom_generate=specdec.hf.speculate(...)`: what `generate` would have given, or a refusal."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import noisy, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

import specdec.hf
from specdec.drafter import Drafter
from specdec.errors import InputError
from specdec.policy import Fixed
from specdec.proposal import Proposal
from specdec.tree import TokenTree

PROMPT = [5, 17, 3, 9, 17, 3]
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "gpt2", "gpt-neox"]


def ids(prompt=PROMPT) -> torch.Tensor:
    return torch.tensor([prompt])


def both(model, faster, prompt=PROMPT, **options):
    options = {"max_new_tokens": 40, **options}
    plain = model.generate(ids(prompt), **options)
    return plain, model.generate(ids(prompt), custom_generate=faster, **options)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def draft(llama):
    return noisy(llama, 0.05)


@pytest.fixture(scope="module")
def tokenizer():
    """One printable character per id."""
    vocab = {chr(48 + i): i for i in range(64)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family):
    model = tiny(family, dtype=torch.float32)
    seen = []
    for drafter in (noisy(model, 0.02), "ngram", None):
        plain, ours = both(model, specdec.hf.speculate(drafter, policy=Fixed(4), stats=seen.append))
        assert torch.equal(plain, ours)
        assert ours[0, : len(PROMPT)].tolist() == PROMPT
    assert seen[0].num_accepted_draft_tokens > 0, "a draft like the target is accepted at times"
    assert seen[2].num_draft_tokens == 0


CONFIGS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[3], [9, 17], [40, 2], [11]]},
    "suppress_tokens": {"suppress_tokens": [3, 17, 60, 61]},
    "forced_eos": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "max_length": {"max_length": 29, "max_new_tokens": None},
    "decay": {"exponential_decay_length_penalty": (5, 1.2), "eos_token_id": 7},
    "sequence_bias": {"sequence_bias": [[[17, 3], 4.0], [[22], 3.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_options_are_honoured(llama, draft, name):
    options = CONFIGS[name]
    faster = specdec.hf.speculate(draft, policy=Fixed(4))
    plain, ours = both(llama, faster, **options)
    assert torch.equal(plain, ours)
    bare = llama.generate(ids(), max_new_tokens=40)
    assert plain.tolist() != bare.tolist(), "the option does something on this model"


def test_end_ids_and_min_new_tokens(llama, draft):
    bare = llama.generate(ids(), max_new_tokens=40)[0, len(PROMPT) :].tolist()
    ends = [bare[9], bare[14]]
    faster = specdec.hf.speculate(draft, policy=Fixed(6))
    for options in ({"eos_token_id": ends}, {"eos_token_id": ends, "min_new_tokens": 20}, {"eos_token_id": ends[1]}):
        plain, ours = both(llama, faster, **options)
        assert torch.equal(plain, ours)
        assert plain.shape[1] < len(PROMPT) + 40 or "min_new_tokens" in options


def test_the_end_ids_of_the_model_are_used(draft):
    model = tiny("llama", dtype=torch.float32)
    bare = model.generate(ids(), max_new_tokens=30)[0].tolist()
    model.generation_config.eos_token_id = bare[len(PROMPT) + 5]
    plain, ours = both(model, specdec.hf.speculate(draft, policy=Fixed(4)))
    assert torch.equal(plain, ours)
    assert ours.shape[1] < len(bare)


def test_stop_strings(llama, draft, tokenizer):
    bare = llama.generate(ids(), max_new_tokens=40)[0, len(PROMPT) :]
    stop = tokenizer.decode(bare[10:13].tolist())
    assert len(stop) == 3
    plain = llama.generate(ids(), max_new_tokens=40, stop_strings=[stop], tokenizer=tokenizer)
    for k in (1, 2, 5, 12):
        faster = specdec.hf.speculate(draft, policy=Fixed(k), tokenizer=tokenizer, stop_strings=stop)
        ours = llama.generate(ids(), max_new_tokens=40, custom_generate=faster)
        assert torch.equal(plain, ours)
    assert plain.shape[1] < len(PROMPT) + 40
    with pytest.raises(InputError, match="tokenizer"):
        specdec.hf.speculate(stop_strings="x")


class StopAfter(StoppingCriteria):
    """Stateful, as users write them: counts its calls."""

    def __init__(self, calls: int):
        self.left = calls
        self.seen: list[list[int]] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([self.left <= 0])


def test_custom_stopping_criteria_are_asked_token_by_token(llama, draft):
    asked = []
    for faster in (None, specdec.hf.speculate(draft, policy=Fixed(5))):
        criterion = StopAfter(13)
        out = llama.generate(
            ids(),
            max_new_tokens=40,
            stopping_criteria=StoppingCriteriaList([criterion]),
            **({"custom_generate": faster} if faster else {}),
        )
        assert out.shape[1] == len(PROMPT) + 13
        asked.append(criterion.seen)
    assert asked[0] == asked[1]


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        out = scores.clone()
        out[:, (input_ids[:, -1] + 1) % scores.shape[-1]] = -torch.inf
        out[:, input_ids.shape[1] % 5] += 9.0
        return out


class TwoChildren(Drafter):
    """Trees on purpose: the target's token may be either child."""

    trees = True

    def start(self, request):
        return None

    def propose(self, state, plan, chance):
        if plan.depth < 2:
            return Proposal.empty()
        return Proposal.point(TokenTree.of([0, 1, 0, 1, 2, 3], (-1, -1, 0, 0, 1, 1)))

    def observe(self, state, outcome):
        return None


def test_own_processors_and_prefix_function_on_chains_and_trees(llama, draft):
    def allowed(batch_id, sent):
        assert batch_id == 0
        return range((len(sent) * 3) % 7, 50)

    options = {
        "logits_processor": LogitsProcessorList([Ban()]),
        "prefix_allowed_tokens_fn": allowed,
    }
    plain, ours = both(llama, specdec.hf.speculate(draft, policy=Fixed(4)), **options)
    assert torch.equal(plain, ours)
    tree = specdec.hf.speculate(TwoChildren(), policy=Fixed(2, (2, 2)), strict=True)
    assert torch.equal(plain, both(llama, tree, **options)[1])


def test_scores_and_logits_are_returned(llama, draft):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"repetition_penalty": 1.4, "max_new_tokens": 17}
    plain, ours = both(llama, specdec.hf.speculate(draft, policy=Fixed(4)), **options)
    assert type(plain) is type(ours)
    assert torch.equal(plain.sequences, ours.sequences)
    for a, b in ((plain.scores, ours.scores), (plain.logits, ours.logits)):
        assert len(a) == len(b) == 17
        torch.testing.assert_close(torch.stack(a), torch.stack(b), atol=2e-5, rtol=2e-5)
    plain, ours = both(llama, specdec.hf.speculate(draft), return_dict_in_generate=True)
    assert ours.scores is None
    assert ours.logits is None
    assert torch.equal(plain.sequences, ours.sequences)


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.tolist())

    def end(self):
        self.ended = True


def test_streamer(llama, draft):
    plain, ours = Recorder(), Recorder()
    llama.generate(ids(), max_new_tokens=12, streamer=plain)
    faster = specdec.hf.speculate(draft, streamer=ours)
    llama.generate(ids(), max_new_tokens=12, custom_generate=faster)
    assert plain.parts == ours.parts
    assert ours.ended
    with pytest.raises(InputError, match=r"speculate\(streamer"):
        llama.generate(ids(), streamer=Recorder(), custom_generate=faster)
    with pytest.raises(InputError, match=r"speculate\(drafter"):
        llama.generate(ids(), assistant_model=draft, custom_generate=faster)


def test_the_decoder_is_built_once_per_model(llama, draft):
    faster = specdec.hf.speculate(draft)
    llama.generate(ids(), max_new_tokens=4, custom_generate=faster)
    first = faster.decoder(llama)
    llama.generate(ids(), max_new_tokens=4, custom_generate=faster)
    assert faster.decoder(llama) is first
    other = tiny("qwen3", dtype=torch.float32)
    assert torch.equal(*both(other, faster))
    assert faster.decoder(llama) is first
    assert faster.decoder(other) is not first


def test_a_model_in_training_mode_is_refused_even_after_a_first_text(draft):
    model = tiny("llama", dtype=torch.float32)
    faster = specdec.hf.speculate(draft)
    model.generate(ids(), max_new_tokens=4, custom_generate=faster)
    model.train()
    with pytest.raises(InputError, match="eval"):
        model.generate(ids(), max_new_tokens=4, custom_generate=faster)


REFUSALS = {
    "beams": ({"num_beams": 2}, "beam search"),
    "several sequences": ({"do_sample": True, "num_return_sequences": 2}, "2 sequences"),
    "padding": ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "attention mask"),
    "pad inside": ({"pad_token_id": 17, "eos_token_id": 60}, "attention mask"),
    "positions": ({"position_ids": torch.arange(3, 9)[None]}, "position_ids"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "hidden": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "quantized": ({"cache_implementation": "offloaded"}, "cache_implementation"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "invalid values": ({"remove_invalid_values": True}, "remove_invalid_values"),
    "guidance": ({"guidance_scale": 1.5}, "state from token to token"),
    "context": ({"max_new_tokens": 251}, "250 or less"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_honoured_is_refused(llama, draft, name, monkeypatch):
    options, message = REFUSALS[name]
    faster = specdec.hf.speculate(draft)
    faster.decoder(llama)
    monkeypatch.setattr(type(llama), "forward", functools.wraps(type(llama).forward)(forbidden))
    with pytest.raises(InputError, match=message):
        llama.generate(ids(), **{"max_new_tokens": 5, **options}, custom_generate=faster)


def forbidden(*args, **kwargs):
    raise AssertionError("work started before the refusal")


def test_batches_embeddings_and_filled_caches_are_refused(llama, draft):
    faster = specdec.hf.speculate(draft)
    with pytest.raises(InputError, match="2 sequences"):
        llama.generate(torch.tensor([PROMPT, PROMPT]), custom_generate=faster)
    with pytest.raises(InputError, match="inputs_embeds"):
        llama.generate(inputs_embeds=llama.get_input_embeddings()(ids()), custom_generate=faster)
    with torch.no_grad():
        cache = llama(ids()[:, :3], use_cache=True).past_key_values
    with pytest.raises(InputError, match="past_key_values"):
        llama.generate(ids(), past_key_values=cache, custom_generate=faster)


# --- sampling ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coin():
    """Three tokens, so that the distribution of short texts can be written out."""
    return tiny("llama", dtype=torch.float32, vocab_size=3, bos_token_id=None)


def law(model, prompt, length, **filters):
    """Probability of every continuation, from cache-free forwards and `transformers`' own filters."""
    faster = SimpleNamespace(seen=None)

    def grab(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        faster.seen = logits_processor
        return input_ids

    model.generate(ids(prompt), do_sample=True, max_new_tokens=length, custom_generate=grab, **filters)
    texts = {(): 1.0}
    for _ in range(length):
        grown = {}
        for text, mass in texts.items():
            context = ids([*prompt, *text])
            with torch.no_grad():
                row = faster.seen(context, model(context).logits[:, -1].float()).softmax(-1)[0]
            for token, p in enumerate(row.tolist()):
                if p > 0:
                    grown[(*text, token)] = mass * p
        texts = grown
    return texts


@pytest.mark.parametrize("filters", [{"temperature": 1.6}, {"temperature": 0.5, "top_p": 0.9}], ids=["warm", "top-p"])
def test_sampling_has_the_distribution_of_generate(coin, filters):
    prompt, length, n = [0, 1, 2], 3, 400
    expected = law(coin, prompt, length, **filters)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    assert max(expected.values()) < 0.8, "the law is not nearly certain"
    faster = specdec.hf.speculate(noisy(coin, 0.3), policy=Fixed(2))
    set_seed(1234)
    counts = dict.fromkeys(expected, 0)
    for _ in range(n):
        out = coin.generate(ids(prompt), do_sample=True, max_new_tokens=length, custom_generate=faster, **filters)
        counts[tuple(out[0, len(prompt) :].tolist())] += 1  # KeyError: a text of probability zero
    chi = sum((counts[text] - n * p) ** 2 / (n * p) for text, p in expected.items() if n * p > 2)
    free = sum(n * p > 2 for p in expected.values())
    # Mean `free`, variance 2 `free`: six standard deviations, and a fixed seed.
    assert chi < free + 6 * (2 * free) ** 0.5
    backwards = zip(sorted(expected, key=expected.get), sorted(expected.values(), reverse=True), strict=True)
    wrong = sum((counts[text] - n * p) ** 2 / (n * p) for text, p in backwards if n * p > 2)
    assert wrong > free + 6 * (2 * free) ** 0.5, "the test tells this law from another"


def test_set_seed_makes_sampling_reproducible(llama, draft):
    faster = specdec.hf.speculate(draft, policy=Fixed(4))
    texts = []
    for seed in (1, 1, 2):
        set_seed(seed)
        texts.append(llama.generate(ids(), do_sample=True, temperature=2.0, top_k=0, custom_generate=faster).tolist())
    assert texts[0] == texts[1] != texts[2]
    again = llama.generate(ids(), do_sample=True, temperature=2.0, top_k=0, custom_generate=faster).tolist()
    assert again != texts[2], "the generator moves on from text to text"


def test_sampling_keeps_the_seed_whatever_drafts(llama, draft):
    texts = []
    for drafter in (draft, "ngram", None):
        set_seed(5)
        faster = specdec.hf.speculate(drafter, policy=Fixed(4))
        texts.append(llama.generate(ids(), do_sample=True, top_p=0.9, temperature=1.3, custom_generate=faster).tolist())
    assert texts[0] == texts[1] == texts[2]


def test_greedy_leaves_the_random_generator_alone(llama, draft):
    set_seed(3)
    expected = torch.rand(1)
    set_seed(3)
    llama.generate(ids(), max_new_tokens=5, custom_generate=specdec.hf.speculate(draft))
    assert torch.equal(torch.rand(1), expected)


def test_with_real_weights(shared: Path):
    from specdec.loading import load_model

    model, small = (load_model(shared / "models" / name) for name in ("bitllama-1M", "stories260K"))
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    seen = []
    faster = specdec.hf.speculate(small, tokenizer=tokenizer, stats=seen.append)
    for prompt in ("Once upon a time, there was", "Tom and Sue went to the park. They"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        plain = model.generate(**inputs, max_new_tokens=60)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=60, custom_generate=faster))
    assert seen[0].num_accepted_draft_tokens > 10
