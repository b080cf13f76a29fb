# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Adds schedules as a contributor would, each a row of SCHEDULES and its lines of the reference, and trains, plans and
compares with them: nothing else may have to know their names."""

import contextlib
from dataclasses import replace

import pytest

from deepspeed_acco.algorithm.reference import LINES, Lines
from deepspeed_acco.algorithm.schedules import COMMIT, ESTIMATE, PREDICT, SCHEDULES, Schedule
from deepspeed_acco.settings import Settings
from deepspeed_acco.tools.cli import main
from deepspeed_acco.tools.compare.measure import bound_s
from deepspeed_acco.tools.plan import model as plan
from deepspeed_acco.tools.plan.advice import advise
from tests.support import oracle, training

TOLERANCE = 1e-5  # of the distance moved: fp32 against float64
WINDOWS = 20

# twin and late are acco and dpu by another name. leap is new: phase A at the estimate, phase B at the prediction that
# the PREDICT behind phase A has made of the window before.
ROWS = {
    "twin": Schedule("twin", at_phase_b=ESTIMATE, at_window_end=COMMIT, blocks=False),
    "late": Schedule("late", at_phase_b=None, at_window_end=COMMIT, blocks=False),
    "leap": Schedule("leap", at_phase_b=ESTIMATE, at_window_end=PREDICT, blocks=False),
}
NEW_LINES = {
    "twin": Lines(lambda at, rank: at.estimate, lambda at, rank: at.theta),
    "late": Lines(lambda at, rank: at.previous),
    "leap": Lines(lambda at, rank: at.estimate, lambda at, rank: at.next_prediction),
}
SAME = {"twin": "acco", "late": "dpu"}


@contextlib.contextmanager
def _added():
    SCHEDULES.update(ROWS)
    LINES.update(NEW_LINES)
    try:
        yield
    finally:
        for name in ROWS:
            del SCHEDULES[name], LINES[name]


@pytest.fixture
def new_rows():
    with _added():
        yield


def train_with_new_rows(**arguments):
    """Trains as training.train does, in a rank that has the new rows, too."""
    with _added():
        return training.train(**arguments)


@pytest.mark.parametrize("name", ROWS)
def test_it_trains_as_its_lines_say(ranks, new_rows, name):
    config = training.ds_config(4, 2.0, schedule=name, estimate_fraction=0.75)
    records = ranks(2).run(train_with_new_rows, config=config, windows=WINDOWS, look="look_in_every_way")
    expected = oracle.run_reference(schedule=name, world_size=2, windows=WINDOWS, n=4, a=3, clip=2.0)
    for record in records:
        assert oracle.distance(record["weights"], expected["weights"]) < TOLERANCE
    assert records[0]["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6)
    assert records[0]["replicas"] == records[1]["replicas"]
    if name in SAME:
        config = training.ds_config(4, 2.0, schedule=SAME[name], estimate_fraction=0.75)
        same = ranks(2).run(training.train, config=config, windows=WINDOWS)[0]
        assert records[0]["losses"] == same["losses"], "bit for bit"
        assert all(mine.equal(theirs) for mine, theirs in zip(records[0]["weights"], same["weights"]))
    else:  # an oracle that cannot tell it from the others would prove nothing
        for other in ("acco", "local", "wp", "dpu", "sync"):
            run = oracle.run_reference(schedule=other, world_size=2, windows=WINDOWS, n=4, a=3, clip=2.0)
            assert oracle.distance(run["weights"], expected["weights"]) > 100 * TOLERANCE


MODEL = plan.Model(10_000_000)
CLUSTER = plan.Cluster(4, 1e8, 1e-4, backend="gloo")


@pytest.mark.parametrize("micro_batch_s", [0.01, 0.2, 3.0])
@pytest.mark.parametrize("fraction", [None, 0.75])
def test_it_is_planned_as_what_it_is(new_rows, micro_batch_s, fraction):
    work = plan.Work(micro_batch_s, 6, 1e-9, fraction)
    of = {row.name: row for row in plan.predict_all(MODEL, CLUSTER, work)}
    for name, other in [*SAME.items(), ("twin-int8", "acco-int8"), ("twin-int4-commit8", "acco-int4-commit8")]:
        assert of[name] == replace(of[other], name=name)
    # leap has acco's two rounds, and the PREDICT's update on top: where both hide it takes the computation, too.
    assert of["leap"].wire_bytes == of["acco"].wire_bytes
    assert of["leap"].step_s >= of["acco"].step_s
    assert of["leap"].step_s == pytest.approx(work.compute_s) or micro_batch_s < 3.0
    assert advise(MODEL, CLUSTER, work).name in of


def test_the_command_plans_with_it(new_rows, capsys):
    arguments = ["plan", "--params", "1e7", "--ranks", "2", "--micro-batch-ms", "50", "--n", "8", "--round-ms", "300"]
    assert main([*arguments, "--sweep-ranks", "4"]) == 0
    printed = capsys.readouterr().out
    table, sweep = printed.split("PREDICTION over ranks")

    def with_two_phases(name):
        return [name, f"{name}-int8", f"{name}-int4", f"{name}-int4-commit8"]

    modes = [*with_two_phases("acco"), "local", "wp", "dpu", "sync", *with_two_phases("twin"), "late"]
    modes += with_two_phases("leap")
    firsts = [line.split(" ")[0] for line in table.split("\nsamples/s")[0].splitlines()]
    assert [word for word in firsts if word in modes] == modes
    swept = [name for name in modes if "int8" not in name]
    assert sweep.splitlines()[1].split("s/step")[1].split() == [*swept, "ACCO", "GiB/rank"]
    assert "local, wp, dpu and late have one round and hide it until R = C" in printed
    assert main([*arguments, "--n", "1"]) == 0
    assert "twin" not in capsys.readouterr().out, "there is no room for a second phase"


@pytest.mark.parametrize(
    ("name", "round_s", "expected"),
    [
        ("twin", 3.0, 9.0),  # C = 8 s, 3 of 4 micro-batches in phase A: A = 6, B = 2
        ("twin", 1.5, 8.0),
        ("twin", 7.0, 14.0),
        ("late", 7.0, 8.0),
        ("late", 9.0, 9.0),
        ("leap", 7.0, 14.0),
    ],
)
def test_a_comparison_has_its_bound(new_rows, name, round_s, expected):
    a = 3 if ROWS[name].has_two_phases else None
    assert bound_s(name, 8.0, round_s, 4, a) == pytest.approx(expected)


def test_settings_take_it_by_its_properties(new_rows):
    for name in ("twin", "leap"):
        Settings(schedule=name, estimate_fraction="auto", estimate_comm="int4", accumulation="adaptive")
    Settings(schedule="late", accumulation="adaptive")
    with pytest.raises(ValueError, match="estimate_comm = 'int4' is not allowed.*schedule = \"late\""):
        Settings(schedule="late", estimate_comm="int4")
    with pytest.raises(ValueError, match="estimate_fraction = 'auto' is not allowed.*schedule = \"late\""):
        Settings(schedule="late", estimate_fraction="auto")
