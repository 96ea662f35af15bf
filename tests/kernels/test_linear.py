"""Linear: a row's bits do not depend on the rows beside it, the tile it falls in, or threads."""

import pytest
import torch
from torch.nn.functional import linear as stock

from specdec import kernels

# Inputs and outputs that are no multiple of a vector, a tile or a stream; the last ones are cut into pieces along K.
SIZES = [(1, 1), (7, 5), (31, 129), (257, 65), (256, 640), (768, 50), (1000, 37), (2113, 301)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-15}
DTYPES = list(TOLERANCE)


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(rows * 7919 + inputs * 31 + outputs)
    x = torch.randn(rows, inputs, generator=noise)
    weight = torch.randn(outputs, inputs, generator=noise)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=noise).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size: tuple[int, int], dtype: torch.dtype, variant: str) -> None:
    x, weight, bias = case(11, *size, dtype)
    want = stock(x.double(), weight.double(), bias.double())
    scale = stock(x.double().abs(), weight.double().abs(), bias.double().abs())  # sums of magnitudes
    error = (kernels.linear(x, weight, bias).double() - want).abs()
    assert (error <= TOLERANCE[dtype] * (scale if dtype != torch.bfloat16 else want.abs() + 1e-4 * scale)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_alone_equal_rows_together(size: tuple[int, int], dtype: torch.dtype, variant: str) -> None:
    x, weight, bias = case(200, *size, dtype)
    alone = torch.cat([kernels.linear(x[i : i + 1], weight, bias) for i in range(64)])
    for rows in (*range(1, 65), 200):
        together = kernels.linear(x[:rows], weight, bias)
        assert torch.equal(together[:64], alone[: min(rows, 64)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_matter(dtype: torch.dtype) -> None:
    x, weight, _ = case(20, 300, 100, dtype)
    other = torch.full_like(x, torch.nan)
    other[13] = x[13]
    assert torch.equal(kernels.linear(other, weight)[13], kernels.linear(x, weight)[13])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [700, 1537])
def test_two_threads_equal_one(outputs: int, dtype: torch.dtype, two_threads: None) -> None:
    for rows in (1, 2, 5, 8, 9, 40):
        x, weight, bias = case(rows, 515, outputs, dtype)
        two = kernels.linear(x, weight, bias)
        torch.set_num_threads(1)
        assert torch.equal(kernels.linear(x, weight, bias), two)
        torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_do_not_depend_on_the_number_of_columns(dtype: torch.dtype, variant: str) -> None:
    x, weight, bias = case(6, 129, 90, dtype)
    whole = kernels.linear(x, weight, bias)
    for outputs in (1, 2, 3, 8, 25, 89):
        assert torch.equal(kernels.linear(x, weight[:outputs], bias[:outputs]), whole[:, :outputs])


def test_leading_dimensions_and_views() -> None:
    x, weight, bias = case(12, 40, 10, torch.float32)
    want = kernels.linear(x, weight, bias)
    assert torch.equal(kernels.linear(x.view(2, 3, 2, 40), weight, bias), want.view(2, 3, 2, 10))
    assert torch.equal(kernels.linear(x[3], weight, bias), want[3])
    assert torch.equal(kernels.linear(x.t().contiguous().t(), weight, bias), want)
    assert kernels.linear(x[:0], weight).shape == (0, 10)


def test_no_bias_is_a_bias_of_zero() -> None:
    x, weight, bias = case(3, 40, 10, torch.bfloat16)
    assert torch.equal(kernels.linear(x, weight), kernels.linear(x, weight, torch.zeros_like(bias)))


def test_bfloat16_is_rounded_once() -> None:
    """257 terms of 1 and a bias of 0.5 would stop at 256 if sums were kept in bfloat16."""
    ones = torch.ones(1, 259, dtype=torch.bfloat16)
    out = kernels.linear(ones, ones.repeat(2, 1), torch.tensor([0.5, -2.0], dtype=torch.bfloat16))
    assert out.tolist() == [[torch.tensor(259.5).bfloat16().item(), torch.tensor(257.0).bfloat16().item()]]


def test_bad_input() -> None:
    x, weight, bias = case(3, 40, 10, torch.float32)
    for message, arguments in {
        "does not fit weight": (x[:, :39], weight),
        "must be contiguous": (x, weight.t().contiguous().t()),
        "weight": (x, weight.bfloat16()),
        "float32, bfloat16 and float64": (x.half(), weight.half()),
        "bias must be": (x, weight, bias[:9]),
        "K must be positive": (x[:, :0], weight[:, :0]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            kernels.linear(*arguments)


def test_operators_trace_with_any_number_of_rows() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3 * 24, 24))

        def forward(self, x: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
            q, k, v = kernels.linear(x, self.weight).view(1, -1, 9, 8).transpose(1, 2).split(3, 1)
            return kernels.attend(q, k, v, handle, 0, 0.5).flatten(2)

    def forward_of(model: object, x: torch.Tensor) -> torch.Tensor:
        slots, steps = kernels.slots(1), kernels.steps()
        slots.reserve(16)
        rows = x.shape[1]
        places = torch.arange(rows)
        steps.add(slots, 0, rows, 0, torch.ones(rows, rows, dtype=torch.bool).tril(), places)
        return model(x, steps.handle())  # type: ignore[operator]

    model = Block()
    handle = torch.zeros(1, dtype=torch.int64)
    rows = torch.export.Dim("rows", min=2, max=16)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(1, 5, 24), handle), dynamic_shapes=({1: rows}, None))
        for width in (2, 5, 11):
            x = torch.randn(1, width, 24)
            assert torch.equal(forward_of(exported.module(), x), forward_of(model, x))
    torch.library.opcheck(torch.ops.specdec.linear.default, (torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)))
