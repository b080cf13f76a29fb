"""Adaptive windows on real gloo ranks of different and changing speed, against the float64 reference that replays the
counts that the run recorded."""

import os
import re
import signal
import time
from itertools import accumulate

import deepspeed
import pytest
from packaging.version import Version

from tests.support import oracle, training
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(240)

TOLERANCE = 1e-5  # of the distance moved: fp32 against float64
EPS = 1e-4  # with 1e-8 a gradient near 0 in the first steps turns fp32's last bits into 1e-4 of the way, by the counts
MICRO_BATCH_S = 0.004  # of a rank of speed 1; the network's own compute takes about 1 ms


def ds_config(n, clip=0.0, **params):
    return training.ds_config(n, clip, accumulation="adaptive", eps=EPS, **params)


def train(config, windows, slowness, groups=1, lr_decay=None, replay=None, folder=None, save_at=None, resume=False):
    """The plain loop. ``slowness``: seconds / MICRO_BATCH_S of this rank's micro-batches, window by window, cyclic.

    Args:
        replay: recorded counts that the windows get.
        folder, save_at: a checkpoint is saved there after that many windows; with ``resume`` training begins at it.
    """
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
    if resume:
        engine.load_checkpoint(folder)
        record["samples_loaded"] = engine.global_samples
    while engine.global_steps < windows:
        window, micro_batch = engine.global_steps, 0
        record["lr"].append(engine.get_lr()[0])
        while engine.global_steps == window:
            time.sleep(MICRO_BATCH_S * slowness[window % len(slowness)])
            loss = engine(*training.batch_for(engine, rank, window, micro_batch))
            engine.backward(loss)
            engine.step()
            record["losses"].append(loss.item())
            micro_batch += 1
        record["own"].append(micro_batch)
        record["norms"].append(float(engine.get_global_grad_norm()))
        record["samples"].append(engine.global_samples)
        if engine.global_steps == save_at:
            engine.save_checkpoint(folder)
            record["samples_saved"] = engine.global_samples
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
        schedule=schedule, world_size=world_size, windows=len(counts), n=n, a=in_a, counts=counts, eps=EPS, **options
    )


def check(records, reference, tolerance=TOLERANCE):
    """Weights, losses, norms and books of every rank against the replay and each other."""
    first = records[0]
    counts = [window.micro_batches for window in first["windows"]]
    assert len(counts) == len(first["norms"])
    for rank, record in enumerate(records):
        assert record["windows"] == first["windows"] and record["lr"] == first["lr"]
        assert record["own"] == [window[rank] for window in counts], "told is what was computed"
        assert record["samples"] == first["samples"]
    assert oracle.distance(first["weights"], reference["weights"]) < tolerance
    assert first["losses"] == pytest.approx(reference["losses"], rel=tolerance, abs=tolerance / 10)
    assert first["norms"] == pytest.approx([0.0, *reference["norms"]][: len(counts)], rel=tolerance)
    # a step knows the samples of the steps before it, the end those of all
    sums = [4 * sum(window) for window in counts]
    assert first["samples"] == [sum(sums[:window]) for window in range(len(sums))]
    assert first["all_samples"] == sum(sums)


SPEEDS = {  # of each rank, window by window
    2: [[1], [4]],
    3: [[1, 1, 8], [5, 1], [2, 6, 1]],
    4: [[1], [1], [1, 2], [4]],
}
CASES = [
    ("acco", 2, 0.0, 1, 4),
    ("acco", 3, 2.0, 2, 5),
    pytest.param("acco", 4, 0.0, 1, 2, marks=pytest.mark.full),
    ("wp", 3, 0.0, 1, 4),
    ("local", 2, 2.0, 2, 1),
    ("local", 3, 0.0, 1, 4),
    pytest.param("dpu", 2, 2.0, 2, 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("schedule", "world_size", "clip", "groups", "n"), CASES)
def test_the_recorded_counts_in_the_reference_give_the_same_weights(ranks, schedule, world_size, clip, groups, n):
    config = ds_config(n, clip, schedule=schedule)
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


# ---- the books


@pytest.mark.parametrize("lr_follows", ["samples", "steps"])
def test_the_learning_rate_follows_samples_or_steps(ranks, lr_follows):
    config = ds_config(2, lr_follows=lr_follows)
    speeds = [{"slowness": slowness} for slowness in ([1, 1, 3], [5, 2])]
    records = ranks(2).run(train, per_rank=speeds, config=config, windows=14, lr_decay=0.95)
    check(records, replay(records[0], "acco", 2, 2, 1, lrs=records[0]["lr"]))
    batch = 4 * 2 * 2
    known_at_the_start = [0, *records[0]["samples"]][:14]
    steps = [samples // batch for samples in known_at_the_start] if lr_follows == "samples" else range(14)
    assert records[0]["lr"] == pytest.approx([1e-2 * 0.95**step for step in steps], rel=1e-9)
    assert known_at_the_start[-1] // batch > 15, "more samples than steps, or this test shows nothing"
    assert records[0]["batch_size"] == records[0]["all_samples"] / 14


def test_replayed_windows_have_the_same_bits(ranks):
    config = ds_config(2)
    speeds = [{"slowness": [1, 2]}, {"slowness": [6]}]
    first = ranks(2).run(train, per_rank=speeds, config=config, windows=10)
    again = ranks(2).run(train, per_rank=speeds[::-1], config=config, windows=10, replay=first[0]["windows"])
    assert again[0]["windows"] == first[0]["windows"]
    assert again[0]["losses"] == first[0]["losses"]
    assert all(mine.equal(theirs) for mine, theirs in zip(again[0]["weights"], first[0]["weights"]))
    assert len({window.micro_batches for window in first[0]["windows"]}) > 1


@pytest.mark.parametrize("schedule", ["acco", "local"])
def test_a_resumed_run_goes_on_where_it_was(ranks, tmp_path, schedule):
    config = ds_config(2, schedule=schedule)
    speeds = [{"slowness": [1, 2]}, {"slowness": [6, 3]}]
    common = dict(config=config, windows=10, lr_decay=0.95, folder=str(tmp_path))
    first = ranks(2).run(train, per_rank=speeds, save_at=6, **common)
    resumed = ranks(2).run(train, per_rank=speeds, resume=True, replay=first[0]["windows"], **common)
    counts = [sum(window.micro_batches) for window in first[0]["windows"]]
    assert first[0]["samples_saved"] == resumed[0]["samples_loaded"] == 4 * sum(counts[:6])
    assert resumed[0]["windows"] == first[0]["windows"][6:]
    for key in ("lr", "norms"):
        assert resumed[0][key] == first[0][key][6:]
    assert resumed[0]["all_samples"] == first[0]["all_samples"] == 4 * sum(counts)
    assert all(mine.equal(theirs) for mine, theirs in zip(resumed[0]["weights"], first[0]["weights"]))


def test_max_window_bounds_the_window_and_is_told(ranks):
    config = ds_config(2, max_window=5)
    slow = [{"slowness": [1]}, {"slowness": [30]}]
    records = ranks(2).run(_train_and_listen, per_rank=slow, config=config, windows=6)
    check([record for record, _ in records], replay(records[0][0], "acco", 2, 2, 1))
    windows = records[0][0]["windows"]
    assert max(max(window.micro_batches) for window in windows) == 5
    assert max(window.in_phase_a[0] for window in windows) == 2  # of 5, as 1 of 2
    text = "\n".join(records[0][1])
    told = (
        r"as many micro-batches as max_window allows and waited: \d+ samples in one step, \d\.\d times train_batch_size"
    )
    assert len(re.findall(told, text)) == 1, "said once"
    assert re.search(r"micro-batches of the ranks: 5, \d; gradient_accumulation_steps = 2, max_window = 5", text)
    assert not records[1][1]


def _train_and_listen(**arguments):
    import logging

    heard = []

    class Ear(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                heard.append(record.getMessage())

    from deepspeed_acco.engine.log import logger

    ear = Ear()
    logger().addHandler(ear)
    try:
        return train(**arguments), heard
    finally:
        logger().removeHandler(ear)


def test_a_grown_batch_is_told_with_figures(ranks):
    config = ds_config(2)
    records = ranks(2).run(
        _train_and_listen, per_rank=[{"slowness": [1]}, {"slowness": [12]}], config=config, windows=5
    )
    assert any("times train_batch_size = 16" in text and "Lower gradient_accum" in text for text in records[0][1])


def test_warmup_windows_wait_and_are_counted(ranks):
    config = ds_config(2, overlap_warmup_steps=3)
    records = ranks(2).run(train, per_rank=[{"slowness": [1]}, {"slowness": [6]}], config=config, windows=8)
    windows = records[0]["windows"]
    assert [window.micro_batches for window in windows[:3]] == [(2, 2)] * 3
    assert any(window.micro_batches[0] > 2 for window in windows[3:])
    reference = replay(records[0], "acco", 2, 2, 1, warmup=3)
    assert oracle.distance(records[0]["weights"], reference["weights"]) < TOLERANCE


# ---- the end


def train_to_the_end(config, lengths, slowness, total=None):
    """As many loops as ``lengths`` has entries, each over that many batches of this rank."""
    import torch.distributed as dist

    import deepspeed_acco

    rank = dist.get_rank()
    engine = training.start_engine(config)
    record = {"windows": [], "steps": []}
    deepspeed_acco.on_window(engine, record["windows"].append)
    used = 0
    for length in lengths:
        batches = [training.batch(rank, 0, used + index) for index in range(length)]
        for batch in deepspeed_acco.train_samples(engine, batches, total):
            time.sleep(MICRO_BATCH_S * slowness)
            engine.backward(engine(*batch))
            engine.step()
            used += 1
        record["steps"].append(engine.global_steps)
    record.update(used=used, samples=engine.global_samples, skipped=engine.skipped_steps)
    record["weights"] = training.true_master_weights(engine)
    engine.destroy()
    return record


def check_the_end(records, schedule, n, a):
    windows = records[0]["windows"]
    counts = [window.micro_batches for window in windows]
    world_size = len(records)
    starts = [list(accumulate((window[rank] for window in counts), initial=0)) for rank in range(world_size)]
    for rank, record in enumerate(records):
        assert (record["steps"], record["windows"]) == (records[0]["steps"], windows)
        assert starts[rank][-1] == record["used"], "every micro-batch computed is in exactly one step"
        assert record["samples"] == 4 * sum(map(sum, counts))
        assert record["skipped"] == 0
    assert len(windows) == records[0]["steps"][-1]

    def data(rank, window, micro_batch):
        return training.batch(rank, 0, starts[rank][window] + micro_batch)

    reference = replay(records[0], schedule, world_size, n, a, data=data)
    assert oracle.distance(records[0]["weights"], reference["weights"]) < TOLERANCE


ENDS = [
    ("acco", 4, [[37], [9]], [1, 3]),
    ("acco", 2, [[0, 5], [23, 4], [11, 0]], [1, 2, 3]),  # two loops; a rank without any data, and which one changes
    ("acco", 2, [[8], [8]], [1, 1]),
    ("acco", 4, [[1], [0]], [1, 1]),
    ("wp", 2, [[3], [20]], [3, 1]),
    ("dpu", 1, [[3, 2], [7, 1], [12, 9]], [1, 1, 2]),
]


@pytest.mark.parametrize(("schedule", "n", "lengths", "slowness"), ENDS)
def test_data_that_end_at_different_times(ranks, schedule, n, lengths, slowness):
    config = ds_config(n, schedule=schedule, comm_timeout_s=30)
    per_rank = [{"lengths": own, "slowness": slow} for own, slow in zip(lengths, slowness)]
    records = ranks(len(lengths)).run(train_to_the_end, per_rank=per_rank, config=config)
    assert [record["used"] for record in records] == [sum(own) for own in lengths]
    check_the_end(records, schedule, n, max(1, round(n / 2)))


def test_an_estimate_that_no_rank_has_data_after_is_not_the_end(ranks):
    """The last micro-batch of both ranks opens phase B of the second window. The blocking lane has fixed counts."""
    config = ds_config(4, comm_timeout_s=30, lane="inline")
    records = ranks(2).run(train_to_the_end, config=config, lengths=[7], slowness=0)
    assert [window.micro_batches for window in records[0]["windows"]] == [(4, 4), (3, 3)]
    check_the_end(records, "acco", 4, 2)


def test_training_ends_at_the_total_on_all_ranks(ranks):
    config = ds_config(2, comm_timeout_s=30)
    per_rank = [{"lengths": [500], "slowness": 1}, {"lengths": [500], "slowness": 4}, {"lengths": [7], "slowness": 1}]
    records = ranks(3).run(train_to_the_end, per_rank=per_rank, config=config, total=400)
    check_the_end(records, "acco", 2, 1)
    sums = [4 * sum(window.micro_batches) for window in records[0]["windows"]]
    assert sum(sums[:-2]) < 400 <= sum(sums)
    assert records[2]["used"] == 7


def test_no_data_at_all_is_no_hang(ranks):
    config = ds_config(2, comm_timeout_s=30)
    per_rank = [{"lengths": [0, 3], "slowness": 1}, {"lengths": [0, 4], "slowness": 1}]
    records = ranks(2).run(train_to_the_end, per_rank=per_rank, config=config)
    assert [record["used"] for record in records] == [3, 4]
    assert records[0]["windows"][0].micro_batches == (0, 0) and records[0]["skipped"] == 1


# ---- ranks that stand still


@pytest.mark.parametrize("pause_s", [2, pytest.param(10, marks=pytest.mark.full)])
def test_a_rank_that_is_paused_goes_on(ranks, pause_s):
    pool = ranks(2)
    config = ds_config(2, max_window=20)
    pool.run(train, config=config, windows=2, slowness=[1])  # everything is built and loaded
    pool.start(train, config=config, windows=60, slowness=[4])
    time.sleep(1.0)
    os.kill(pool.processes[1].pid, signal.SIGSTOP)
    time.sleep(pause_s)
    assert pool.is_usable and not pool.answers(0), "the test must pause in mid-training"
    os.kill(pool.processes[1].pid, signal.SIGCONT)
    records = pool.collect(limit_s=60)
    check(records, replay(records[0], "acco", 2, 2, 1))
    longest = max(window.micro_batches[0] for window in records[0]["windows"])
    assert 10 < longest <= 20, "the other rank computed meanwhile, in one of its phases as much as it may"


def _train_until_stopped(config, victim, window_of_death):
    import torch.distributed as dist

    engine = training.start_engine(config)
    begin = time.monotonic()
    try:
        while True:
            if dist.get_rank() == victim and engine.global_steps == window_of_death:
                os.kill(os.getpid(), signal.SIGSTOP)
            begin = time.monotonic()
            engine.backward(engine(*training.batch(dist.get_rank(), engine.global_steps, 0)))
            engine.step()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin


@pytest.mark.distributed
@pytest.mark.full  # the fault matrix has the like
def test_a_rank_that_stops_for_good_is_an_error_on_all_others():
    timeout_s = 5
    pool = RankPool(3)
    try:
        config = ds_config(2, comm_timeout_s=timeout_s)
        pool.start(_train_until_stopped, config=config, victim=1, window_of_death=3)
        for message, waited in pool.collect(ranks=[0, 2], limit_s=60):
            assert "another rank has ended, or did not answer within comm_timeout_s = 5 s" in message
            assert waited < timeout_s + 5
    finally:
        for process in pool.processes:
            process.kill()
        pool.close()


# ---- who else owns the windows


def _try_refused(config):
    import deepspeed_acco

    messages = {}

    def refused(name, call):
        try:
            call()
            messages[name] = "accepted"
        except (ValueError, RuntimeError) as error:
            messages[name] = str(error)

    engine = training.start_engine(config)
    x, y = training.batch(0, 0, 0)
    refused("boundary", lambda: engine.set_gradient_accumulation_boundary(True))

    def under_no_sync():
        with engine.no_sync():
            engine(x, y)

    refused("no_sync", under_no_sync)

    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    refused("accelerate", lambda: DeepSpeedEngineWrapper(engine).backward(engine(x, y)))
    refused("train_batch_size", lambda: engine.set_train_batch_size(4 * 4 * 2 * 9))

    def full_gradient():
        from deepspeed.utils import safe_get_full_grad

        while True:
            engine.backward(engine(x, y))
            if engine.is_gradient_accumulation_boundary():
                break
            engine.step()
        safe_get_full_grad(engine.module.first.weight)

    refused("full_gradient", full_gradient)
    engine.step()

    def zero_grad_in_phase_b():
        loss = engine(x, y)
        while engine.optimizer.position.phase.name == "A":
            engine.backward(loss)
            engine.step()
            loss = engine(x, y)
        engine.optimizer.zero_grad()  # before the backward, behind which one rank may end the window alone

    refused("zero_grad", zero_grad_in_phase_b)
    refused("total", lambda: deepspeed_acco.train_samples(engine, [], 0))
    engine.destroy()
    for name, changes in (
        ("unmanaged", {"managed_gradient_accumulation": False}),
        ("fp16", {"fp16": {"enabled": True}}),
        ("max_window", {"gradient_accumulation_steps": 40}),
    ):
        refused(name, lambda changes=changes: training.start_engine({**config, **changes}))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    refused("trainer", lambda: training.start_engine(config))
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    engine = training.start_engine(training.ds_config(2))
    for name in ("on_window", "replay_windows", "train_samples"):
        refused(name, lambda name=name: getattr(deepspeed_acco, name)(engine, []))
    engine.destroy()
    return messages


def test_whoever_ends_windows_himself_is_refused(ranks):
    config = ds_config(2, max_window=20)
    for messages in ranks(2).run(_try_refused, config=config):
        for name in ("boundary", "no_sync", "accelerate"):
            assert "HF Trainer and Accelerate need it" in messages[name], messages
        assert "zero_grad() in phase B is not allowed" in messages["zero_grad"]
        assert "total=0) is not allowed; allowed: a whole number >= 1" in messages["total"]
        assert "the full gradient is not known" in messages["full_gradient"]
        assert "HF Trainer and Accelerate end the windows themselves" in messages["trainer"]
        if Version(deepspeed.__version__) >= Version("0.19"):  # before there is no such key
            assert "managed_gradient_accumulation = False" in messages["unmanaged"]
        assert "fp16.enabled = True" in messages["fp16"]
        for name in ("max_window", "train_batch_size"):
            assert "max_window = 20 is not allowed; allowed: >= gradient_accumulation_steps" in messages[name], messages
        for name in ("on_window", "replay_windows", "train_samples"):
            assert f"{name}() got an engine without adaptive windows" in messages[name]
