import gc
import os
import re
import subprocess

import pytest

from tests.support.launcher import operators_folder

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", operators_folder())  # one for this process and its ranks: built once

from deepspeed_acco.optim import ops  # noqa: E402
from deepspeed_acco.optim.native import kernels_reason  # noqa: E402
from tests.support.operators import start_build  # noqa: E402
from tests.support.ranks import RankPool  # noqa: E402

_POOLS: dict[int, RankPool] = {}
_BUILDS: list[subprocess.Popen] = []


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


def _needs_operators(item) -> bool:
    """Tells whether a test needs those of the CPU."""
    has = item.get_closest_marker
    return bool(has("distributed") or has("native")) and not has("gpu")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    """Marks a test by its fixtures, leaves out ``full`` and ``gpu`` unless they are asked for, and puts those first
    that need no operators."""
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
    items[:] = sorted(chosen, key=_needs_operators)


def pytest_collection_finish(session):
    """Starts to build the operators where that was not done yet, beside the tests that need none. What is imported now
    stays, so that collections of garbage need not walk through it."""
    gc.collect()
    gc.freeze()
    if not session.config.option.collectonly and any(map(_needs_operators, session.items)):
        _BUILDS[:] = filter(None, [start_build()])


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before the test's time begins to count
def pytest_runtest_protocol(item):
    """Lets a test that needs the operators wait for them."""
    if _needs_operators(item):
        for build in _BUILDS:
            build.wait()
    return (yield)


def pytest_sessionfinish(session, exitstatus):
    for pool in _POOLS.values():
        pool.close()
