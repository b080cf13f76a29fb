import pytest

from deepspeed_acco.rounds import (
    COMMIT,
    ESTIMATE,
    PREDICT,
    SCHEDULES,
    Phase,
    Place,
    Position,
    blocks_at_end,
    schedule_of_window,
)


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
        "wp": (None, PREDICT, False),
        "dpu": (None, COMMIT, False),
        "sync": (None, COMMIT, True),
    }


def test_warmup_windows_are_sync():
    assert [schedule_of_window("acco", window, 2).name for window in range(4)] == ["sync", "sync", "acco", "acco"]


def test_a_window_that_ends_in_phase_a_blocks_only_where_there_is_a_phase_b():
    blocking = {name: [blocks_at_end(s, phase) for phase in Phase] for name, s in SCHEDULES.items()}
    assert blocking == {"acco": [True, False], "wp": [False, False], "dpu": [False, False], "sync": [True, True]}


def _after(position, events):
    for event in events:
        position = {"f": Position.after_forward, "b": Position.after_backward, "e": Position.after_eval_forward}[event](
            position
        )
    return position


@pytest.mark.parametrize(
    ("events", "micro_batches"),
    [
        ("", 0),
        ("fb", 1),
        ("fbfb", 2),
        ("ffb", 1),
        ("fbb", 1),
        ("ffbb", 1),
        ("b", 0),
        ("eb", 1),
        ("fbe", 1),
        ("fbefb", 2),
    ],
)
def test_what_counts_as_a_micro_batch(events, micro_batches):
    assert _after(Position(), events).micro_batches == micro_batches


def test_phase_a_is_over_only_when_no_graph_is_outstanding():
    acco = SCHEDULES["acco"]
    assert not _after(Position(), "fb").is_phase_a_over(acco, 2)
    assert _after(Position(), "fbfb").is_phase_a_over(acco, 2)
    assert _after(Position(), "fbfbe").is_phase_a_over(acco, 2)  # an evaluation in between
    assert not _after(Position(), "fbfbf").is_phase_a_over(acco, 2)
    assert not _after(Position(), "fbfb").is_phase_a_over(SCHEDULES["dpu"], 2)
    in_b = _after(Position(), "fbfb").after_phase_a()
    assert (in_b.phase, in_b.micro_batches_in_a) == (Phase.B, 2)
    assert not in_b.is_phase_a_over(acco, 2)
    assert in_b.after_window() == Position(window=1)
