import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed_acco.optim import ops  # noqa: E402
from deepspeed_acco.optim.native import kernels_reason  # noqa: E402
from tests.support.ranks import RankPool  # noqa: E402

_POOLS: dict[int, RankPool] = {}


@pytest.fixture
def ranks():
    """``ranks(n)``: a pool of n ranks, kept from test to test and made anew after a failure."""

    def pool(world_size: int) -> RankPool:
        if world_size not in _POOLS or not _POOLS[world_size].is_usable:
            _POOLS[world_size] = RankPool(world_size)
        return _POOLS[world_size]

    return pool


@pytest.fixture(scope="session")
def native():
    """Gives optim/ops.py with the native kernels loaded. Where they cannot be built the tests fail, never skip."""
    reason = kernels_reason("cpu")
    if reason:
        pytest.fail(f"the native kernels are not in use: {reason}")
    return ops


def pytest_sessionfinish(session, exitstatus):
    for pool in _POOLS.values():
        pool.close()
