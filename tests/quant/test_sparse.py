"""The sparse format: which weights stay, the layout that kernels read, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import InputError
from specdec.quant import PackedLinear, parse
from specdec.quant.sparse import Sparse, keep_largest

NAMES = ["sparse", "sparse-10", "sparse-33", "sparse-60", "sparse-95", "sparse-2x4"]


def slow(row: list[float], groups: int, count: int) -> set[int]:
    """Indices kept of a row that is cut into groups of a size: sorted by magnitude, the first of equals."""
    kept: set[int] = set()
    for start in range(0, len(row), groups):
        order = sorted(range(start, min(start + groups, len(row))), key=lambda i: (-abs(row[i]), i))
        kept.update(order[:count])
    return kept


def bits(mask_row: torch.Tensor) -> set[int]:
    return {8 * i + bit for i, byte in enumerate(mask_row.tolist()) for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_back(name):
    assert parse(name).name == name
    assert parse("sparse-80") == parse("sparse")


@pytest.mark.parametrize(
    "name", ["sparse-9", "sparse-96", "sparse-5x8", "sparse-x", "sparse--50", "sparse-²5", "sparse-50-2x4"]
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match="10 to 95, or 2x4"):
        parse(name)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 5),
    st.sampled_from([32, 64, 96, 160]),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-3, 0.5, 3.0]),
)
def test_the_largest_of_each_row_are_stored_in_order(name, N, K, seed, dtype, step):
    format = parse(name)
    generator = torch.Generator().manual_seed(seed)
    # Coarse steps make many weights equal, and many zero.
    weight = (torch.randn(N, K, generator=generator).div(step).round() * step).to(dtype)
    parts = format.pack(weight)
    for n in range(N):
        nnz = format.stored(K)
        expected = slow(weight[n].tolist(), *((4, 2) if name == "sparse-2x4" else (K, nnz)))
        assert bits(parts["mask"][n]) == expected
        assert parts["values"][n].tolist() == [weight[n, i].to(torch.bfloat16).item() for i in sorted(expected)]
        alone = torch.zeros(K)
        for i in expected:
            alone[i] = weight[n, i].to(torch.bfloat16)
        assert torch.equal(format.unpack(parts)[n], alone)
    format.check(parts, N, K)


@pytest.mark.parametrize("percent", [10, 29, 58, 80, 95])
def test_a_row_stores_what_the_percentage_leaves(percent):
    """29 % of 100 are 29, though 0.29 * 100 is 28.999... in floats."""
    for K in (32, 800, 4096, 11008):
        assert Sparse(percent).stored(K) == K - (percent * K) // 100


@pytest.mark.parametrize("name", ["sparse", "sparse-60", "sparse-2x4"])
def test_a_pruned_weight_keeps_exactly_its_nonzeros(name):
    format = parse(name)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 128, generator=generator).bfloat16()
    # Other weights than the largest, as Wanda leaves them.
    weight[~keep_largest(torch.rand(8, 128, generator=generator).unflatten(1, (-1, 4)), 1).flatten(1)] = 0
    if name == "sparse":
        weight[:, 64:] = 0
    weight[3] = 0
    back = format.unpack(format.pack(weight), torch.bfloat16)
    assert torch.equal(back, weight)
    again = format.pack(back)
    assert all(torch.equal(again[part], stored) for part, stored in format.pack(weight).items())


def test_zeros_are_stored_in_one_way():
    """Negative zeros and numbers too small for bfloat16 are zeros like others: the first are stored, as +0."""
    weight = torch.zeros(1, 32)
    weight[0, 31], weight[0, 30], weight[0, 29] = 1.0, -1e-45, 1e-45
    weight[0, 2] = -0.0
    parts = Sparse(80).pack(weight)
    assert bits(parts["mask"][0]) == {0, 1, 2, 3, 4, 5, 31}
    assert parts["values"].view(torch.int16).tolist() == [[0] * 6 + [0x3F80]]


def test_the_layer_multiplies_with_the_stored_weights():
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(48, 96, generator=generator), torch.randn(5, 96, generator=generator)
    layer = PackedLinear.of(weight, torch.ones(48), parse("sparse-60"))
    expected = x @ torch.where(keep_largest(weight.abs(), 96 - 57), weight, 0).bfloat16().float().T + 1
    torch.testing.assert_close(layer(x), expected)
    assert layer.num_bytes == 48 * (96 // 8 + 2 * 39)
    columns = torch.randn(96, 48, generator=generator)  # not contiguous when transposed
    assert torch.equal(
        PackedLinear.of(columns.T, None, parse("sparse")).parts["mask"], Sparse().pack(columns.T)["mask"]
    )


@pytest.mark.parametrize("K", [0, 8, 33, 100])
def test_shapes_that_do_not_fit(K):
    with pytest.raises(InputError, match=f"masks of 32 inputs.*has {K}"):
        parse("sparse").pack(torch.zeros(2, K))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(bad):
    weight = torch.ones(64, 64)
    weight[60, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        parse("sparse").pack(weight)


def test_weights_too_large_for_bfloat16():
    with pytest.raises(InputError, match=r"3\.4e\+38 is too large"):
        parse("sparse").pack(torch.full((1, 32), torch.finfo(torch.float32).max))


@pytest.mark.parametrize("name", ["sparse-60", "sparse-2x4"])
@pytest.mark.parametrize("flip", [1, 1 << 5])
def test_masks_that_do_not_fit_the_values_are_refused(name, flip):
    """A kernel would read past the values."""
    format = parse(name)
    parts = format.pack(torch.randn(6, 64, generator=torch.Generator().manual_seed(3)))
    parts["mask"][4, 2] ^= flip
    with pytest.raises(InputError, match=r"'mask' of sparse-\w+ weights \[6, 64\]"):
        PackedLinear(format, 64, 6, None, parts)


def test_a_mask_with_the_right_count_in_the_wrong_group_is_refused():
    format = parse("sparse-2x4")
    parts = format.pack(torch.ones(1, 32))
    assert parts["mask"][0, 0] == 0b00110011
    parts["mask"][0, 0] = 0b00000111 | 0b00010000
    with pytest.raises(InputError, match="3 weights in a group of four where 2"):
        format.check(parts, 1, 32)


def test_stored_numbers_that_are_none_are_refused():
    format = parse("sparse")
    parts = format.pack(torch.ones(2, 32))
    parts["values"][1, 2] = torch.inf
    with pytest.raises(InputError, match="'values' of sparse weights"):
        format.check(parts, 2, 32)


def test_parts_on_the_meta_device_have_shapes_alone():
    layer = PackedLinear(parse("sparse"), 64, 16)
    layer.format.check(layer.parts, 16, 64)
    assert layer.parts["values"].shape == (16, 13)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_keep_largest_keeps_the_first_of_equals(K, count, seed):
    count = min(count, K)
    scores = torch.randint(0, 5, (3, K), generator=torch.Generator().manual_seed(seed)).double()
    kept = keep_largest(scores, count)
    for row, mask in zip(scores.tolist(), kept, strict=True):
        assert set(mask.nonzero().flatten().tolist()) == slow(row, K, count)
