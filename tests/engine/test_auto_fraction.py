"""Where "auto" splits a window: what it does with the ranks' figures."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from deepspeed_acco.algorithm.schedules import SCHEDULES
from deepspeed_acco.algorithm.step_time import Figures, best_split
from deepspeed_acco.engine.auto_fraction import WINDOWS_TO_MEASURE, AutoFraction
from deepspeed_acco.runtime.clock import LaneTimes
from deepspeed_acco.settings import Settings


class _Driver:
    """A rank whose rounds take what it is told; the other rank measured ``other``."""

    def __init__(self, rounds, other=None):
        self.clock = 0.0
        self.lane = SimpleNamespace(times=lambda: self._times.copy())
        self.comm = SimpleNamespace(device=torch.device("cpu"), gather_from_all=lambda own: [own, other or own])
        self.rounds, self.waits = rounds, 0
        self._times = LaneTimes()

    def finish(self):
        self.waits += 1
        for kind, spent in self.rounds.items():
            self._times.add(f"{kind} 7", spent, 0.0)


@pytest.fixture
def clock(monkeypatch):
    """Every window takes 10 s of it."""
    now = itertools.count(0.0, 10.0)
    monkeypatch.setattr("deepspeed_acco.runtime.clock.time", SimpleNamespace(perf_counter=lambda: next(now)))


def _fraction(driver, **settings):
    return AutoFraction(Settings(schedule="acco", **settings), driver, driver.comm, driver.lane)


def _run(split, windows, n=10, first=0):
    for window in range(first, first + windows):
        split.at_window_end(window, n, n, logs=False)


def test_a_number_stays_and_measures_nothing(clock):
    driver = _Driver({"COMMIT": 8.0, "ESTIMATE": 1.0})
    split = _fraction(driver, estimate_fraction=0.3)
    _run(split, 30)
    assert split.fraction == 0.3 and split.phase_a(10) == 3 and not driver.waits
    assert split.to_state() is None, "nothing was chosen"


@pytest.mark.parametrize("word", ["auto", "measured"])
def test_auto_is_one_half_and_then_the_fastest(clock, word):
    driver = _Driver({"COMMIT": 8.0, "ESTIMATE": 1.0})
    split = _fraction(driver, estimate_fraction=word)
    _run(split, WINDOWS_TO_MEASURE - 1)
    assert split.fraction == 0.5 and split.to_state() is None
    _run(split, 1, first=WINDOWS_TO_MEASURE - 1)
    assert split.fraction == 0.8 and split.phase_a(10) == 8 and split.to_state() == 0.8
    waits = driver.waits
    _run(split, 20)
    assert split.fraction == 0.8 and driver.waits == waits, "chosen once"


def test_the_slowest_computation_and_the_shortest_rounds_count(clock):
    # The other rank's micro-batch takes 2 s; its rounds seemed shorter, since it came to them last.
    driver = _Driver({"COMMIT": 14.0, "ESTIMATE": 8.0}, other=[2.0, 12.0, 1.0])
    split = _fraction(driver, estimate_fraction="auto")
    _run(split, WINDOWS_TO_MEASURE)
    assert split.phase_a(10) == best_split(SCHEDULES["acco"], 10, Figures(2.0, 12.0, 1.0)) == 9


def test_warm_up_windows_are_not_measured(clock):
    driver = _Driver({"COMMIT": 8.0, "ESTIMATE": 1.0})
    split = _fraction(driver, estimate_fraction="auto", overlap_warmup_steps=4)
    _run(split, 4 + WINDOWS_TO_MEASURE - 1)
    assert split.fraction == 0.5
    _run(split, 1, first=4 + WINDOWS_TO_MEASURE - 1)
    assert split.fraction == 0.8


def test_without_estimates_it_measures_on_and_says_so_once(clock, caplog):
    from deepspeed_acco.engine.log import logger

    driver = _Driver({"COMMIT": 8.0})
    split = _fraction(driver, estimate_fraction="auto")
    logger().addHandler(caplog.handler)
    for window in range(2 * WINDOWS_TO_MEASURE):
        split.at_window_end(window, 10, 10, logs=True)
    logger().removeHandler(caplog.handler)
    assert split.fraction == 0.5 and split.to_state() is None
    assert [record.message for record in caplog.records if "estimate_fraction stays 0.5" in record.message] != []
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    driver.rounds = {"COMMIT": 8.0, "ESTIMATE": 1.0}
    _run(split, WINDOWS_TO_MEASURE, first=2 * WINDOWS_TO_MEASURE)
    assert split.fraction == 0.8


def test_a_checkpoint_decides_for_auto_alone(clock):
    driver = _Driver({"COMMIT": 8.0, "ESTIMATE": 1.0})
    split = _fraction(driver, estimate_fraction="auto")
    _run(split, WINDOWS_TO_MEASURE)
    assert split.fraction == 0.8
    split.from_state(0.7)
    assert split.phase_a(10) == 7 and split.to_state() == 0.7, "it goes on as the run that saved it"
    split.from_state(None)
    assert split.fraction == 0.5 and split.to_state() is None, "that run had not chosen"
    _run(split, WINDOWS_TO_MEASURE)
    assert split.fraction == 0.8
    given = _fraction(driver, estimate_fraction=0.25)
    given.from_state(0.7)
    assert given.fraction == 0.25, "what the JSON says holds"
