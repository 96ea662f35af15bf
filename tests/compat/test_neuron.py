"""The cells of the Trainium tutorial, with its names, on this device; and what its words mean here."""

import pytest
import torch

from specdec.compat.neuron import LlamaForSampling, NeuronConfig, QuantizationConfig, SpeculativeGenerator
from specdec.errors import BackendWarning, InputError
from specdec.loading import EMBEDDED, load_tokenizer

TARGET, DRAFT = EMBEDDED / "target", EMBEDDED / "draft"


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForSampling, LlamaForSampling]:
    target = LlamaForSampling.from_pretrained(TARGET, n_positions=128, batch_size=1, amp="f32")
    draft = LlamaForSampling.from_pretrained(DRAFT, n_positions=128, batch_size=1, amp="f32")
    target.enable_speculative_decoder(5)
    return draft, target


@pytest.fixture(scope="module")
def input_ids() -> torch.Tensor:
    ids: torch.Tensor = load_tokenizer(TARGET)("import os\n\ndef main(", return_tensors="pt").input_ids
    return ids


def test_the_cells(models: tuple[LlamaForSampling, LlamaForSampling], input_ids: torch.Tensor) -> None:
    draft, target = models
    generator = SpeculativeGenerator(draft, target, 5)
    fast = generator.sample(input_ids=input_ids, sequence_length=50, temperature=0.0)
    plain = target.sample(input_ids, sequence_length=50, temperature=0.0, top_k=None)
    assert fast.shape == (1, 50)
    assert torch.equal(fast, plain)
    rounds = generator.generations[0].trace.rounds
    assert max(r.num_nodes for r in rounds) == 4  # k counts the known token
    assert generator.generations[0].stats.num_accepted_draft_tokens > 0


def test_sampled_text_keeps_the_seed(
    models: tuple[LlamaForSampling, LlamaForSampling], input_ids: torch.Tensor
) -> None:
    draft, target = models
    generator = SpeculativeGenerator(draft, target, 4)
    fast = generator.sample(input_ids, 40, temperature=0.8, seed=3)
    assert torch.equal(fast, target.sample(input_ids, 40, temperature=0.8, top_k=None, seed=3))
    assert not torch.equal(fast, generator.sample(input_ids, 40, temperature=0.8, seed=4))


def test_rows_padded_on_the_right(models: tuple[LlamaForSampling, LlamaForSampling], input_ids: torch.Tensor) -> None:
    draft, target = models
    shorter = input_ids[0, :-2]
    rows = torch.stack([input_ids[0], torch.cat([shorter, torch.zeros(2, dtype=torch.int64)])])
    mask = torch.ones_like(rows)
    mask[1, -2:] = 0
    generator = SpeculativeGenerator(draft, target, 5)
    both = generator.sample(rows, 32, attention_mask=mask, temperature=0.0)
    assert both.shape == (2, 32)
    assert torch.equal(both[1], generator.sample(shorter[None], 32, temperature=0.0)[0])
    with pytest.raises(InputError, match="padded on the right"):
        generator.sample(rows, 32, attention_mask=mask.flip(1))


def test_an_end_stops_and_is_padded(models: tuple[LlamaForSampling, LlamaForSampling], input_ids: torch.Tensor) -> None:
    draft, target = models
    generator = SpeculativeGenerator(draft, target, 5)
    whole = generator.sample(input_ids, 50, temperature=0.0)[0]
    end = int(whole[input_ids.shape[1] + 3])
    ended = generator.sample(input_ids, 50, temperature=0.0, eos_token_id=end)[0]
    first = input_ids.shape[1] + whole[input_ids.shape[1] :].tolist().index(end)
    assert ended.tolist() == whole[: first + 1].tolist()


class Streamer:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, ids: torch.Tensor) -> None:
        self.ids += ids.tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer(models: tuple[LlamaForSampling, LlamaForSampling], input_ids: torch.Tensor) -> None:
    streamer = Streamer()
    out = SpeculativeGenerator(models[0], models[1], 5).sample(input_ids, 30, streamer=streamer)
    assert streamer.ids == out[0, input_ids.shape[1] :].tolist()
    assert streamer.ended


def test_quantised_target(input_ids: torch.Tensor) -> None:
    config = NeuronConfig(quant=QuantizationConfig(quant_dtype="s8", dequant_dtype="bf16"), weight_tiling=True)
    target = LlamaForSampling.from_pretrained(TARGET, n_positions=64, amp="f32", neuron_config=config)
    target.enable_speculative_decoder([3, 5])
    plain = target.sample(input_ids, 40, temperature=0.0, top_k=None)
    assert torch.equal(SpeculativeGenerator("ngram", target, 3).sample(input_ids, 40, temperature=0.0), plain)


def test_what_is_refused(models: tuple[LlamaForSampling, LlamaForSampling], input_ids: torch.Tensor) -> None:
    draft, target = models
    with pytest.raises(InputError, match=r"call target.enable_speculative_decoder\(8\)"):
        SpeculativeGenerator(draft, target, 8)
    with pytest.raises(InputError, match="counts the known token too"):
        SpeculativeGenerator(draft, target, 1)
    with pytest.raises(InputError, match=r"enable_speculative_decoder\(4\) first"):
        SpeculativeGenerator(target, draft, 4)
    with pytest.raises(InputError, match="at most n_positions = 128"):
        SpeculativeGenerator(draft, target, 5).sample(input_ids, 129)
    with pytest.raises(InputError, match="more than the prompt's"):
        SpeculativeGenerator(draft, target, 5).sample(input_ids, input_ids.shape[1])
    with pytest.raises(InputError, match="amp is one of bf16, f32"):
        LlamaForSampling.from_pretrained(DRAFT, amp="f16")
    with pytest.raises(InputError, match="context is"):
        LlamaForSampling.from_pretrained(DRAFT, n_positions=1 << 20)
    with pytest.raises(InputError, match="quant_dtype is one of"):
        QuantizationConfig("s4")
    with pytest.warns(BackendWarning, match="tp_degree=32"):
        LlamaForSampling.from_pretrained(DRAFT, n_positions=64, tp_degree=32)
