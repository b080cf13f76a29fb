"""Adaptive windows on real gloo ranks of different and changing speed, against the float64 reference that replays the
counts that the run recorded."""

import time

import pytest

from tests import oracle, training

pytestmark = pytest.mark.timeout(240)

TOLERANCE = 1e-5  # of the distance moved: fp32 against float64
MICRO_BATCH_S = 0.004  # of a rank of speed 1; the network's own compute takes about 1 ms


def train(
    config,
    windows,
    slowness,
    clip_after=None,
    groups=1,
    lr_decay=None,
    replay=None,
    rest=None,
    hurry=0.0,
):
    """The plain loop. ``slowness``: seconds / MICRO_BATCH_S of this rank's micro-batches, window by window, cyclic."""
    import torch.distributed as dist
    from torch.optim.lr_scheduler import ExponentialLR

    import deepspeed_acco

    rank = dist.get_rank()
    arguments = {} if lr_decay is None else {"lr_scheduler": lambda optimizer: ExponentialLR(optimizer, lr_decay)}
    engine = training.start_engine(config, groups, **arguments)
    record = {"windows": [], "lr": [], "samples": [], "norms": [], "losses": [], "own": []}
    deepspeed_acco.on_window(engine, record["windows"].append)
    if replay is not None:
        deepspeed_acco.replay_windows(engine, replay)
    while engine.global_steps < windows:
        window, micro_batch = engine.global_steps, 0
        record["lr"].append(engine.get_lr()[0])
        while engine.global_steps == window:
            time.sleep(MICRO_BATCH_S * slowness[window % len(slowness)])
            loss = engine(*training.batch(rank, window, micro_batch))
            engine.backward(loss)
            engine.step()
            record["losses"].append(loss.item())
            micro_batch += 1
        record["own"].append(micro_batch)
        record["norms"].append(float(engine.get_global_grad_norm()))
        record["samples"].append(engine.global_samples)
    record["weights"] = training.true_master_weights(engine)
    engine.destroy()
    record["all_samples"] = engine.global_samples
    record["batch_size"] = engine.tput_timer.batch_size
    return record


def replay(record, schedule, world_size, n, a, **options):
    """The reference with the counts that rank 0 recorded."""
    counts = [list(window.micro_batches) for window in record["windows"]]
    in_a = [list(window.in_phase_a) or a for window in record["windows"]]
    return oracle.run_reference(
        schedule=schedule, world_size=world_size, windows=len(counts), n=n, a=in_a, counts=counts, **options
    )


def check(records, reference):
    """Weights, losses, norms and books of every rank against the replay and each other."""
    first = records[0]
    counts = [window.micro_batches for window in first["windows"]]
    assert len(counts) == len(first["norms"])
    for rank, record in enumerate(records):
        assert record["windows"] == first["windows"] and record["lr"] == first["lr"]
        assert record["own"] == [window[rank] for window in counts], "told is what was computed"
        assert record["samples"] == first["samples"]
    assert oracle.distance(first["weights"], reference["weights"]) < TOLERANCE
    assert first["losses"] == pytest.approx(reference["losses"], rel=1e-5, abs=1e-6)
    assert first["norms"] == pytest.approx([0.0, *reference["norms"]][: len(counts)], rel=1e-5)
    # a step knows the samples of the steps before it, the end those of all
    sums = [4 * sum(window) for window in counts]
    assert first["samples"] == [sum(sums[:window]) for window in range(len(sums))]
    assert first["all_samples"] == sum(sums)


SPEEDS = {  # of each rank, window by window
    2: [[1], [4]],
    3: [[1, 1, 5], [3, 1], [2, 4, 1]],
    4: [[1], [1], [1, 2], [4]],
}
CASES = [
    ("acco", 2, 0.0, 1, 4),
    ("acco", 3, 2.0, 2, 5),
    ("acco", 4, 0.0, 1, 2),
    ("wp", 3, 0.0, 1, 4),
    ("dpu", 2, 2.0, 2, 1),
]


@pytest.mark.parametrize(("schedule", "world_size", "clip", "groups", "n"), CASES)
def test_the_recorded_counts_in_the_reference_give_the_same_weights(ranks, schedule, world_size, clip, groups, n):
    config = training.ds_config(n, clip, schedule=schedule, accumulation="adaptive")
    speeds = [{"slowness": slowness} for slowness in SPEEDS[world_size]]
    records = ranks(world_size).run(train, per_rank=speeds, config=config, windows=16, groups=groups)
    a = phase_a = max(1, round(n / 2))
    reference = replay(records[0], schedule, world_size, n, a, clip=clip, groups=groups)
    check(records, reference)
    windows = records[0]["windows"]
    assert all(min(window.micro_batches) >= n for window in windows)
    assert all(len(window.in_phase_a) == (world_size if schedule == "acco" else 0) for window in windows)
    assert all(min(window.in_phase_a, default=phase_a) >= phase_a for window in windows)
    uneven = [window for window in windows if len(set(window.micro_batches)) > 1]
    assert len(uneven) >= len(windows) / 4, "the ranks must have had different counts for this test to show anything"
    assert len({window.micro_batches for window in windows}) > 2, "and other ones in other windows"
