"""Most tests of this folder need the native kernels, which the first of them compiles."""

from collections.abc import Iterator

import pytest
import torch

from specdec import kernels

WITHOUT = ("test_build", "test_triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = "tests/kernels" in item.nodeid and not any(name in item.nodeid for name in WITHOUT)
        if needed and not kernels.available():
            item.add_marker(pytest.mark.skip(reason=kernels.why_not()))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


VARIANTS = kernels.isas() if kernels.available() else []


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
