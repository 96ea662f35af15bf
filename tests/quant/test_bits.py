"""Codes as bit strings, against Python's own integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import InputError
from specdec.quant.bits import WIDTHS, pack_bits, packed_bytes, row_chunks, unpack_bits


def as_integer(packed: torch.Tensor) -> int:
    return int.from_bytes(bytes(packed.tolist()), "little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_position_beside_every_neighbour(bits):
    """4096 pairs of 6-bit codes at each of the four positions, and what lies around them untouched."""
    codes, positions = 1 << bits, 4
    first, second = torch.meshgrid(torch.arange(codes), torch.arange(codes), indexing="ij")
    for position in range(positions):
        rows = torch.zeros(codes * codes, positions, dtype=torch.uint8)
        rows[:, position] = first.flatten()
        rows[:, (position + 1) % positions] = second.flatten()
        packed = pack_bits(rows, bits)
        assert packed.shape == (codes * codes, positions * bits // 8)
        assert torch.equal(unpack_bits(packed, bits, positions), rows)
        values = (packed.long() << (8 * torch.arange(packed.shape[1]))).sum(1)
        shifts = bits * position, bits * ((position + 1) % positions)
        assert torch.equal(values, (first << shifts[0] | second << shifts[1]).flatten())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_is_one_little_endian_number(data):
    bits = data.draw(st.sampled_from(sorted(WIDTHS)))
    rows, groups = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    K = groups * WIDTHS[bits]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 1 << bits, (rows, K), dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_bytes(K, bits))
    assert packed.dtype == torch.uint8
    for row, row_bytes in zip(codes.tolist(), packed, strict=True):
        assert as_integer(row_bytes) == sum(code << (bits * i) for i, code in enumerate(row))
    assert torch.equal(unpack_bits(packed, bits, K), codes)


def test_leading_dimensions_and_strides_do_not_matter():
    codes = torch.randint(0, 64, (3, 5, 8), dtype=torch.uint8)
    packed = pack_bits(codes, 6)
    assert torch.equal(packed[1, 2], pack_bits(codes[1, 2], 6))
    turned = pack_bits(codes.transpose(0, 2).contiguous().transpose(0, 2), 6)
    assert torch.equal(turned, packed)
    apart = torch.zeros(3, 5, 12, dtype=torch.uint8)
    apart[..., ::2] = packed
    assert torch.equal(unpack_bits(apart[..., ::2], 6, 8), codes)


@pytest.mark.parametrize(
    ("bits", "K", "message"),
    [
        (5, 32, "codes of 5 bits cannot be packed; choose one of 4, 6, 8"),
        (6, 34, "rows of 34 codes of 6 bits end within a byte; K must be a multiple of 4"),
        (4, 7, "rows of 7 codes of 4 bits end within a byte; K must be a multiple of 2"),
    ],
)
def test_sizes_that_do_not_fill_bytes(bits, K, message):
    for use in (
        lambda: packed_bytes(K, bits),
        lambda: pack_bits(torch.zeros(2, K, dtype=torch.uint8), bits),
        lambda: unpack_bits(torch.zeros(2, K, dtype=torch.uint8), bits, K),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_other_tensors_are_refused():
    with pytest.raises(InputError, match=r"codes to pack are uint8; found torch\.int64"):
        pack_bits(torch.zeros(2, 4, dtype=torch.int64), 6)
    with pytest.raises(InputError, match=r"8 codes of 6 bits are 6 bytes of uint8; found 5 of torch\.uint8"):
        unpack_bits(torch.zeros(2, 5, dtype=torch.uint8), 6, 8)
    with pytest.raises(InputError, match=r"found 6 of torch\.int8"):
        unpack_bits(torch.zeros(2, 6, dtype=torch.int8), 6, 8)


@pytest.mark.parametrize("shape", [(0, 64), (1, 1 << 18), (1000, 300), (7, 0), (3, 5)])
def test_chunks_cover_each_row_once(shape):
    rows = [row for chunk in row_chunks(torch.empty(shape)) for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(shape[0]))
    if shape == (1000, 300):
        assert len(list(row_chunks(torch.empty(shape)))) > 1
