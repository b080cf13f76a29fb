"""ACCO under DeepSpeed on real gloo ranks against the one-process float64 reference."""

import itertools

import deepspeed
import pytest
from packaging.version import Version

from deepspeed_acco.algorithm.window import phase_a_micro_batches
from tests.support import oracle, training

pytestmark = pytest.mark.timeout(300)

STEPS = 40
TOLERANCE = 1e-5  # of the distance moved: fp32 against float64

RANKS, CLIPS, GROUPS, WINDOWS = (1, 2, 3, 4), (0.0, 2.0), (1, 2), (2, 4, 5, 6)
FRACTIONS = (0.25, 0.5, 0.75)
SCHEDULES = ("acco", "local", "wp", "dpu", "sync")
RARER = [*("acco", "local", "wp", "sync"), pytest.param("dpu", marks=pytest.mark.full)]  # dpu rounds as local does
EVERYTHING = list(itertools.product(SCHEDULES, RANKS, CLIPS, GROUPS, WINDOWS, FRACTIONS))


def _pairwise():
    """A small set of cases in which every two values of different options meet at least once; four ranks are tested
    over two levels (test_two_levels.py), and dpu by others."""
    wanted = set()
    common = [case for case in EVERYTHING if case[0] != "dpu" and case[1] < 4]
    for case in common:
        wanted.update(itertools.combinations(enumerate(case), 2))
    chosen = []
    while wanted:
        best = max(common, key=lambda case: len(wanted & set(itertools.combinations(enumerate(case), 2))))
        chosen.append(best)
        wanted -= set(itertools.combinations(enumerate(best), 2))
    return chosen


PAIRWISE = _pairwise()
CASES = [pytest.param(*case, marks=() if case in PAIRWISE else pytest.mark.full) for case in EVERYTHING]


def check_equal(records, reference, windows, delay, tolerance=TOLERANCE):
    """Weights, losses, norms and replicas of a run against the reference."""
    expected = [0.0] * delay + reference["norms"]
    assert records[0]["norms"] == pytest.approx(expected[:windows], rel=1e-5)
    for record, losses in zip(records, reference["losses_of_ranks"]):
        assert oracle.distance(record["weights"], reference["weights"]) < tolerance
        assert record["losses"] == pytest.approx(losses, rel=1e-5, abs=1e-6)
    if len(records) > 1 and reference["is_alike"]:
        assert all(record["replicas"] == records[0]["replicas"] for record in records)
        for record in records:
            assert all(mine.equal(theirs) for mine, theirs in zip(record["live"], records[0]["live"]))
    elif len(records) > 1:
        assert all(record["replicas"] != records[0]["replicas"] for record in records[1:])
    # what destroy() leaves are the true weights in the model's dtype
    for left, true in zip(records[0]["after_destroy"], records[0]["weights"]):
        assert left.equal(true.to(left.dtype))


@pytest.mark.parametrize(("schedule", "world_size", "clip", "groups", "n", "fraction"), CASES)
def test_equals_the_reference(ranks, schedule, world_size, clip, groups, n, fraction):
    config = training.ds_config(n, clip, schedule=schedule, estimate_fraction=fraction)
    records = ranks(world_size).run(training.train, config=config, windows=STEPS, groups=groups)
    reference = oracle.run_reference(
        schedule=schedule,
        world_size=world_size,
        windows=STEPS,
        n=n,
        a=phase_a_micro_batches(n, fraction),
        clip=clip,
        groups=groups,
    )
    check_equal(records, reference, STEPS, delay=0 if schedule == "sync" else 1)
    if clip:
        clipped = sum(norm > clip for norm in reference["norms"])
        assert 0 < clipped < STEPS, "clipping must be in effect in some windows and not in others"


@pytest.mark.parametrize("schedule", ["local", "wp", "dpu", "sync"])
def test_one_micro_batch_a_window(ranks, schedule):
    records = ranks(2).run(training.train, config=training.ds_config(1, schedule=schedule), windows=20)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=20, n=1, a=1)
    check_equal(records, reference, 20, delay=0 if schedule == "sync" else 1)


@pytest.mark.parametrize("schedule", RARER)
def test_short_and_long_windows_by_hand(ranks, schedule):
    counts = [4, 1, 4, 2, 3, 4, 4, 1, 1, 5, 4, 3, 2, 4, 7, 4]
    config = training.ds_config(4, schedule=schedule)
    records = ranks(2).run(training.train, config=config, windows=len(counts), counts=counts)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=len(counts), n=4, a=2, counts=counts)
    assert oracle.distance(records[0]["weights"], reference["weights"]) < TOLERANCE
    assert records[0]["losses"] == pytest.approx(reference["losses"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("schedule", RARER)
def test_overlap_warmup(ranks, schedule):
    config = training.ds_config(4, schedule=schedule, overlap_warmup_steps=3)
    records = ranks(2).run(training.train, config=config, windows=10)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=10, n=4, a=2, warmup=3)
    assert oracle.distance(records[0]["weights"], reference["weights"]) < TOLERANCE
    assert records[0]["losses"] == pytest.approx(reference["losses"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("schedule", RARER)
def test_learning_rate_of_the_window(ranks, schedule):
    """The scheduler moves right after step(): a round that reads the rate late is wrong by 20 % here."""
    config = training.ds_config(4, schedule=schedule)
    records = ranks(2).run(training.train, config=config, windows=12, lr_decay=0.8)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=12, n=4, a=2, lr_decay=0.8)
    check_equal(records, reference, 12, delay=0 if schedule == "sync" else 1)


def _since(version, style, reason):
    is_older = Version(deepspeed.__version__) < Version(version)
    return pytest.param(style, marks=pytest.mark.skipif(is_older, reason=f"before DeepSpeed {version} {reason}"))


STYLES = [
    _since("0.18.9", "torch", "there is no engine.scale"),
    _since("0.18.9", "no_sync", "no_sync does not divide the loss by n"),
    "boundary",
    _since("0.19", "unmanaged", "there is no managed_gradient_accumulation"),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("schedule", ["acco", "local", "wp"])
def test_styles_of_accumulation(ranks, schedule, style):
    config = training.ds_config(4, 2.0, schedule=schedule)
    records = ranks(2).run(training.train, config=config, windows=12, style=style)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=12, n=4, a=2, clip=2.0)
    check_equal(records, reference, 12, delay=1)
