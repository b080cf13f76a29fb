import pytest

from deepspeed_acco.algorithm.schedules import (
    COMMIT,
    COMMIT_FORESEEN,
    ESTIMATE,
    PREDICT,
    SCHEDULES,
    Phase,
    Place,
    blocks_at_end,
    schedule_of_window,
)
from deepspeed_acco.algorithm.window import Limits, Position


def test_only_commits_write_state_and_only_estimates_reduce_a_part():
    assert (ESTIMATE.writes_state, COMMIT.writes_state, PREDICT.writes_state) == (False, True, True)
    assert (ESTIMATE.reduces, COMMIT.reduces, PREDICT.reduces) == (Phase.A, None, None)
    assert ESTIMATE.leaves_true_weights is Place.LIVE
    assert COMMIT.leaves_true_weights is Place.COMM
    assert PREDICT.leaves_true_weights is Place.SHARDS


def test_schedules():
    rounds = {name: (s.at_phase_b, s.at_window_end, s.blocks) for name, s in SCHEDULES.items()}
    assert rounds == {
        "acco": (ESTIMATE, COMMIT, False),
        "local": (None, COMMIT_FORESEEN, False),
        "wp": (None, PREDICT, False),
        "dpu": (None, COMMIT, False),
        "sync": (None, COMMIT, True),
    }


def test_warmup_windows_are_sync():
    assert [schedule_of_window("acco", window, 2).name for window in range(4)] == ["sync", "sync", "acco", "acco"]


def test_a_window_that_ends_in_phase_a_blocks_only_where_there_is_a_phase_b():
    blocking = {name: [blocks_at_end(s, phase) for phase in Phase] for name, s in SCHEDULES.items()}
    behind = dict.fromkeys(("local", "wp", "dpu"), [False, False])
    assert blocking == {"acco": [True, False], **behind, "sync": [True, True]}


EVENTS = {
    "f": Position.after_forward,
    "b": Position.after_backward,
    "g": lambda position: position.after_backward(brought_gradients=True),
    "s": Position.after_micro_batch,
}


def _after(position, events):
    for event in events:
        position = EVENTS[event](position)
    return position


@pytest.mark.parametrize(
    ("events", "ended", "started"),
    [
        ("", 0, 0),
        ("fb", 0, 1),
        ("fbs", 1, 1),
        ("fbfbs", 1, 1),
        ("ffbs", 1, 1),
        ("fbbs", 1, 1),
        ("b", 0, 0),  # of an evaluation
        ("fbsb", 1, 1),
        ("g", 0, 1),  # training that no hook saw
        ("gsg", 1, 2),
        ("s", 1, 1),
        ("fbsfb", 1, 2),
    ],
)
def test_what_counts_as_a_micro_batch(events, ended, started):
    position = _after(Position(), events)
    assert (position.micro_batches, position.started_micro_batches) == (ended, started)
    assert position.is_between_windows == (started == 0)


def test_phase_a_is_over_only_between_two_micro_batches():
    acco, two = SCHEDULES["acco"], Limits(2, 2)
    assert not _after(Position(), "fbs").is_phase_a_over(acco, two)
    assert not _after(Position(), "fbsfb").is_phase_a_over(acco, two)
    assert _after(Position(), "fbsfbs").is_phase_a_over(acco, two)
    assert _after(Position(), "fbsfbsb").is_phase_a_over(acco, two)  # an evaluation in between
    assert not _after(Position(), "fbsfbsf").is_phase_a_over(acco, two)
    assert not _after(Position(), "fbsfbsg").is_phase_a_over(acco, two)
    assert not _after(Position(), "fbsfbs").is_phase_a_over(SCHEDULES["dpu"], two)
    in_b = _after(Position(), "fbsfbs").after_phase_a()
    assert (in_b.phase, in_b.micro_batches_in_a) == (Phase.B, 2)
    assert not in_b.is_phase_a_over(acco, two)
    assert in_b.after_window() == Position(window=1)


@pytest.mark.parametrize(
    ("micro_batches", "is_round_finished", "may_end"),
    [(1, True, False), (2, False, False), (2, True, True), (4, False, False), (5, False, True), (6, False, True)],
)
def test_an_adaptive_phase_needs_its_minimum_and_a_finished_round_or_its_maximum(
    micro_batches, is_round_finished, may_end
):
    limits = Limits(least=2, most=5)
    assert limits.allow_end(micro_batches, is_round_finished) == may_end
    position = _after(Position(), "fbs" * micro_batches)
    assert position.is_phase_a_over(SCHEDULES["acco"], limits, is_round_finished) == may_end
    assert not position.is_window_over(SCHEDULES["acco"], limits, is_round_finished)  # phase B has not begun
    assert position.is_window_over(SCHEDULES["wp"], limits, is_round_finished) == may_end
    in_b = _after(_after(Position(), "fbs" * 3).after_phase_a(), "fbs" * (micro_batches - 1) + "fb")
    assert in_b.is_window_over(SCHEDULES["acco"], limits, is_round_finished) == may_end  # phase A does not count
