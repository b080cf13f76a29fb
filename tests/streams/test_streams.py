# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA half's order on a CPU: nothing that two streams share is touched without an event between, the host waits
where it is known to and nowhere else, and mistakes in that order are found (docs/reference/cuda.md)."""

import pytest

from tests.streams import scenarios
from tests.streams.clocks import ANSWERS
from tests.streams.faults import FAULTS
from tests.streams.scenarios import MORE_SCENARIOS, SCENARIOS

SEEDS = (1, 2, 3)
ALWAYS_RUN = {("acco, looks", 1), ("acco, finished on another stream", 1), ("acco adaptive", 1)}
RANDOM = [
    pytest.param(name, seed, marks=() if (name, seed) in ALWAYS_RUN else pytest.mark.full)
    for name in SCENARIOS
    for seed in SEEDS
]


def require_ordered(ranks, name, folder, *, world_size=1, **arguments):
    for seen in ranks(world_size).run(scenarios.run, name=name, folder=str(folder), **arguments):
        assert seen.findings == {}
        if world_size == 1:  # else adaptive windows differ
            assert seen.waits == SCENARIOS[name].waits_in(seen.windows)
        assert "c10d::_allgather_base_" in seen.operators
        assert seen.operators.keys() & {"deepspeed_acco::adamw_commit", "deepspeed_acco::adamw_commit_change"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_access_is_ordered(ranks, tmp_path, name):
    for answers in ("never", "always"):
        require_ordered(ranks, name, tmp_path / answers, answers=answers)


@pytest.mark.parametrize("name, seed", RANDOM)
def test_whatever_queries_answer(ranks, tmp_path, name, seed):
    require_ordered(ranks, name, tmp_path, answers="at random", seed=seed)


@pytest.mark.full
@pytest.mark.parametrize("name", MORE_SCENARIOS)
def test_more_ways(ranks, tmp_path, name):
    for answers in ANSWERS:
        (seen,) = ranks(1).run(scenarios.run, name=name, folder=str(tmp_path / answers), answers=answers)
        assert seen.findings == {}


@pytest.mark.full
@pytest.mark.parametrize("world_size, ranks_per_host", [(2, 1), (4, 2)])
@pytest.mark.parametrize("name", SCENARIOS)
def test_among_several_ranks(ranks, tmp_path, name, world_size, ranks_per_host):
    for answers in ANSWERS:
        where = dict(world_size=world_size, ranks_per_host=ranks_per_host)
        require_ordered(ranks, name, tmp_path / answers, answers=answers, **where)


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_found(ranks, tmp_path, name):
    fault = FAULTS[name]
    (seen,) = ranks(1).run(scenarios.run, name=fault.scenario, folder=str(tmp_path), answers=fault.answers, fault=name)
    assert fault.is_found_in(seen), seen
