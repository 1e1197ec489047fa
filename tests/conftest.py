"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit import _C


@pytest.fixture(params=_C.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has, the best one first."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny problems on many threads are mostly waiting: fifty times slower on a busy machine. See `threads`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """For a test that sets the number of threads: afterwards it is as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
