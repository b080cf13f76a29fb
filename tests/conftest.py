import os
import re
import subprocess
import sys

import pytest

from tests.support.launcher import ROOT, operators_folder, rank_environment

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", operators_folder())  # one for this process and its ranks: built once

from deepspeed_acco.optim import ops  # noqa: E402
from deepspeed_acco.optim.native import kernels_reason  # noqa: E402
from tests.support.ranks import RankPool  # noqa: E402

_POOLS: dict[int, RankPool] = {}


def _is_made(folder: str) -> bool:
    """Makes a folder and tells whether it was not there: of several workers one makes it."""
    try:
        os.makedirs(folder)
    except FileExistsError:
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def _operators_are_built(request):
    """Starts to build the operators where there are none yet, beside the tests that need none, which come first."""
    if not any(map(_needs_operators, request.session.items)) or not _is_made(os.environ["TORCH_EXTENSIONS_DIR"]):
        yield
        return
    command = [sys.executable, "-m", "tests.support.operators"]
    # A build that an interrupt ends leaves a lock behind: in a session of its own it hears of none. What fails here
    # fails again, and says why, in the test that needs it.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=rank_environment(), **quiet):
        yield


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
    return any(item.get_closest_marker(marker) for marker in ("distributed", "native"))


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


def pytest_sessionfinish(session, exitstatus):
    for pool in _POOLS.values():
        pool.close()
