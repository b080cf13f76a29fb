import os
import re

import pytest

from tests.support.launcher import operators_folder

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", operators_folder())  # one for this process and its ranks: built once

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


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    """Marks a test by its fixtures, and leaves out ``full`` and ``gpu`` unless they are asked for."""
    asked = config.option.markexpr
    unasked = [marker for marker in ("full", "gpu") if not re.search(rf"\b{marker}\b", asked)]
    chosen, left_out = [], []
    for item in items:
        for fixture, marker in (("ranks", "distributed"), ("native", "native")):
            if fixture in item.fixturenames:
                item.add_marker(marker)
        (left_out if any(item.get_closest_marker(marker) for marker in unasked) else chosen).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def pytest_sessionfinish(session, exitstatus):
    for pool in _POOLS.values():
        pool.close()
