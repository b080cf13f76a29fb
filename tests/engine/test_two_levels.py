"""Rounds over two levels, inside a host and between hosts, on real gloo ranks: against the float64 reference, the same
bits on every lane and rank, looks, adaptive windows, checkpoints, ranks that die, and which ranks share a host."""

import logging
import os
from unittest import mock

import pytest

from deepspeed_acco.engine.hosts import host_of_this_rank
from deepspeed_acco.runtime.levels import Levels, levels_of
from tests.engine import test_adaptive_windows as adaptive
from tests.engine import test_equality as equality
from tests.engine import test_quantized_estimate as quantized
from tests.support import oracle, training

pytestmark = pytest.mark.timeout(240)

WINDOWS = 12


# ---- which ranks share a host


def test_levels_of_hosts():
    assert levels_of("aabb") == (Levels(((0, 1), (2, 3))), None)
    assert levels_of("abab") == (Levels(((0, 2), (1, 3))), None)
    assert levels_of("abc") == (Levels.flat(3), None) and levels_of("aaa") == (Levels.flat(3), None)
    levels, reason = levels_of("aab")
    assert levels == Levels.flat(3) and reason == "the hosts have 2, 1 ranks, not as many each"


def test_rows_columns_and_places():
    levels = Levels(((0, 3), (1, 2)))
    assert [levels.row(rank) for rank in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]
    # Process groups sort their ranks, so columns do as well.
    assert [levels.column(rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert sorted(map(levels.place, range(4))) == [0, 1, 2, 3]
    assert [Levels.consecutive(6, 2).place(rank) for rank in range(6)] == [0, 3, 1, 4, 2, 5]
    assert [Levels.flat(3).place(rank) for rank in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"CROSS_RANK": "1", "SLURM_NODEID": "0"}, "1"),
        ({"GROUP_RANK": "2"}, "2"),
        ({"SLURM_NODEID": "3"}, "3"),
        ({}, ""),
    ],
)
def test_a_host_is_what_the_launcher_calls_it_and_its_name(environment, number):
    told, name = host_of_this_rank(environment)
    assert told == number and name == os.uname().nodename


def _levels(config, cross_rank):
    with mock.patch.dict(os.environ, {} if cross_rank is None else {"CROSS_RANK": cross_rank}):
        try:
            engine = training.start_engine(config)
        except (ValueError, RuntimeError) as error:
            return str(error)
    loss = engine(*training.batch(0, 0, 0))
    engine.backward(loss)
    levels = engine.optimizer.levels
    engine.destroy()
    return str(levels)


@pytest.mark.parametrize(
    ("ranks_per_host", "cross_ranks", "expected"),
    [
        ("auto", "0011", "2 hosts x 2 ranks"),
        ("auto", "0001", "4 hosts x 1 ranks"),
        ("auto", "0000", "4 hosts x 1 ranks"),
        (1, "0011", "4 hosts x 1 ranks"),
        (4, "0011", "1 hosts x 4 ranks"),
        (3, "0011", "ranks_per_host = 3 is not allowed with 4 data-parallel ranks; allowed: a number that divides"),
    ],
)
def test_what_the_key_means(ranks, ranks_per_host, cross_ranks, expected):
    config = training.ds_config(2, ranks_per_host=ranks_per_host)
    answers = ranks(4).run(_levels, config=config, per_rank=[{"cross_rank": host} for host in cross_ranks])
    assert [answer for answer in answers if expected not in answer] == []


def _warned(config, cross_rank):
    lines = []
    told = logging.Handler(logging.WARNING)
    told.emit = lambda line: lines.append(line.getMessage())
    logging.getLogger("deepspeed_acco").addHandler(told)
    _levels(config, cross_rank)
    logging.getLogger("deepspeed_acco").removeHandler(told)
    return [line for line in lines if "launcher started them on several" in line]


@pytest.mark.parametrize(("cross_ranks", "warnings"), [("0011", 0), ("0111", 1)])
def test_a_number_that_contradicts_the_launcher_is_told(ranks, cross_ranks, warnings):
    per_rank = [{"cross_rank": host} for host in cross_ranks]
    first, *others = ranks(4).run(_warned, config=training.ds_config(2, ranks_per_host=2), per_rank=per_rank)
    assert len(first) == warnings and not any(others)
    assert all("takes data-parallel ranks (0, 1) for one host" in line for line in first)


# ---- against the reference


CASES = [  # schedule, ranks, of each host, precision, clipping, groups, n
    ("acco", 6, 2, "fp32", 2.0, 2, 4),
    pytest.param("acco", 6, 3, "bf16", 0.0, 1, 5, marks=pytest.mark.full),
    ("wp", 4, 2, "fp32", 0.0, 2, 2),
    ("local", 6, 3, "fp32", 2.0, 2, 3),
    ("local", 4, 2, "bf16+fp32", 2.0, 1, 2),
    pytest.param("dpu", 4, 2, "bf16+fp32", 2.0, 1, 2, marks=pytest.mark.full),
    ("sync", 4, 4, "fp32", 2.0, 2, 2),
    pytest.param("acco", 4, 2, "fp16static", 2.0, 2, 4, marks=pytest.mark.full),
    pytest.param("acco", 8, 4, "fp32", 2.0, 1, 4, marks=pytest.mark.full),
    pytest.param("wp", 6, 3, "bf16", 2.0, 1, 4, marks=pytest.mark.full),
    pytest.param("dpu", 6, 2, "fp32", 0.0, 1, 3, marks=pytest.mark.full),
]
TOLERANCES = {"fp32": equality.TOLERANCE}
TOLERANCE_16_BIT = 3e-3


@pytest.mark.parametrize(("schedule", "world_size", "k", "precision", "clip", "groups", "n"), CASES)
def test_equals_the_reference(ranks, schedule, world_size, k, precision, clip, groups, n):
    config = training.ds_config(n, clip, precision, schedule=schedule, ranks_per_host=k)
    arguments = dict(windows=WINDOWS, groups=groups, precision=precision)
    records = ranks(world_size).run(training.train, config=config, **arguments)
    reference = oracle.run_reference(
        schedule=schedule,
        world_size=world_size,
        n=n,
        a=n // 2,
        clip=clip,
        ranks_per_host=k,
        scales=[128.0] * WINDOWS if precision.startswith("fp16") else None,
        **arguments,
    )
    tolerance = TOLERANCES.get(precision, TOLERANCE_16_BIT)
    for record, losses in zip(records, reference["losses_of_ranks"]):
        assert oracle.distance(record["weights"], reference["weights"]) < tolerance
        assert record["losses"] == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 3e-2)
        if reference["is_alike"]:
            assert record["replicas"] == records[0]["replicas"]
            assert all(mine.equal(theirs) for mine, theirs in zip(record["live"], records[0]["live"]))


@pytest.mark.parametrize(
    ("estimate_comm", "world_size", "k", "clip", "groups", "staging"),
    [
        ("int4", 4, 2, 2.0, 2, 6000),
        ("int8", 6, 3, 0.0, 1, None),
        pytest.param("int8", 6, 2, 2.0, 2, 6000, marks=pytest.mark.full),
        pytest.param("int4", 4, 4, 0.0, 1, None, marks=pytest.mark.full),
    ],
)
def test_quantizes_the_sums_of_hosts(ranks, estimate_comm, world_size, k, clip, groups, staging):
    """The reference quantizes each host's sum; one that quantizes each rank's gradients is far away."""
    config = training.ds_config(4, clip, estimate_comm=estimate_comm, ranks_per_host=k)
    arguments = dict(windows=6, groups=groups)
    records = ranks(world_size).run(quantized.train_wide, config=config, staging_bytes=staging, **arguments)
    common = dict(world_size=world_size, n=4, a=2, clip=clip, **arguments)
    reference = quantized.run_reference(estimate_comm, ranks_per_host=k, **common)
    mine = quantized.distance(records[0], reference)
    assert mine < quantized.TOLERANCE_WITH_TIES
    assert quantized.distance(records[0], quantized.run_reference(estimate_comm, **common)) > 50 * mine
    for record in records[1:]:
        assert all(mine.equal(theirs) for mine, theirs in zip(record["live"], records[0]["live"]))


# ---- the same bits


def _live_bits(record):
    return [[tensor.tolist() for tensor in record[key]] for key in ("weights", "live")], record["norms"]


@pytest.mark.parametrize(
    ("schedule", "estimate_comm", "precision"),
    [
        *(("acco", "full", "bf16"), ("acco", "int4", "fp32"), ("local", "full", "bf16")),
        pytest.param("wp", "full", "fp32", marks=pytest.mark.full),
    ],
)
def test_lanes_and_looks_give_the_same_bits(ranks, schedule, estimate_comm, precision):
    params = dict(schedule=schedule, ranks_per_host=2) | ({"estimate_comm": "int4"} if estimate_comm != "full" else {})
    arguments = dict(windows=8, groups=2, precision=precision)
    pool = ranks(4)
    plain, inline, looked_at = (
        pool.run(
            training.train, config=training.ds_config(4, 2.0, precision, lane=lane, **params), look=look, **arguments
        )
        for lane, look in (("auto", None), ("inline", None), ("auto", "look_in_every_way"))
    )
    for mine, other, third in zip(plain, inline, looked_at):
        assert _live_bits(mine) == _live_bits(other) == _live_bits(third)


# ---- adaptive windows


def test_adaptive_windows(ranks):
    config = adaptive.ds_config(2, 2.0, ranks_per_host=2)
    speeds = [{"slowness": slowness} for slowness in adaptive.SPEEDS[4]]
    records = ranks(4).run(adaptive.train, per_rank=speeds, config=config, windows=12)
    adaptive.check(records, adaptive.replay(records[0], "acco", 4, 2, 1, clip=2.0, ranks_per_host=2))
