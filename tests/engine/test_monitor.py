"""What DeepSpeed's monitor, its timers and profilers show of the rounds, against counts by hand and the reference."""

import csv
import io
import itertools
import json
import logging
import re
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.support import faults, oracle, training
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(240)
EVENTS = (
    "exposed_wait_ms",
    "round_ms",
    "hidden_share",
    "sent_bytes",
    "received_bytes",
    "micro_batches",
    "estimate_error",
    "skipped_commits",
    "grad_norm",
)
SAMPLES = 4 * 4 * 2  # per window of n = 4 on two ranks


def _monitored(folder, config):
    return {**config, "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "run"}}


def _read(folder, name):
    """{samples: text of the value}, of one event file."""
    path = Path(folder) / "run" / f"Train_{name}.csv"
    if not path.exists():
        return {}
    with open(path) as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", name.split("_", 1)[1]]
    samples = [int(row[0]) for row in rows[1:]]
    assert len(set(samples)) == len(samples), "one value per window"
    return {at: row[1] for at, row in zip(samples, rows[1:])}


def _by_window(folder, name):
    return {at // SAMPLES - 1: float(value) for at, value in _read(folder, f"ACCO_{name}").items()}


def _loop(engine, windows, precision="fp32", counts=None, nan_in_window=None, rest_s=0.0):
    """Trains; returns the seconds of each window and, after it, what the engine counted."""
    import torch.distributed as dist

    rank = dist.get_rank()
    dtype = training.DTYPES[precision.partition("+")[0]]
    record = {"wall_s": [], "samples": [], "skipped": [], "norms": []}
    for window in range(windows):
        begin = time.perf_counter()
        count = counts[window] if counts else engine.gradient_accumulation_steps()
        for micro_batch in range(count):
            if counts:
                engine.set_gradient_accumulation_boundary(micro_batch == count - 1)
            x, y = training.batch(rank, window, micro_batch, dtype)
            if (rank, window, micro_batch) == (1, nan_in_window, 1):
                y = y * float("nan")
            engine.backward(engine(x, y))
            time.sleep(rest_s)
            if not counts or micro_batch == count - 1:
                engine.step()
        record["wall_s"].append(time.perf_counter() - begin)
        record["samples"].append(engine.global_samples)
        record["skipped"].append(engine.skipped_steps)
        record["norms"].append(float(engine.get_global_grad_norm()))
    return record


def _train(config, groups=1, **arguments):
    engine = training.start_engine(config, groups)
    record = _loop(engine, **arguments)
    engine.destroy()
    return record


# ---- counts


def test_counts_of_short_windows_and_who_writes_them(ranks, tmp_path):
    counts = [4, 2, 4, 1, 3, 4]
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    configs = [{"config": _monitored(folder, training.ds_config(4))} for folder in folders]
    record = ranks(2).run(_train, per_rank=configs, windows=6, counts=counts)[0]
    assert _by_window(folders[0], "micro_batches") == dict(enumerate(counts))
    assert _by_window(folders[0], "skipped_commits") == dict.fromkeys(range(6), 0)
    # COMMITs 0, 2 and 4 run behind the next window. Windows 1 and 3 end in phase A: their COMMITs block.
    assert set(_by_window(folders[0], "estimate_error")) == {1, 3, 5}
    assert set(_by_window(folders[0], "round_ms")) == set(range(6))
    # The same place on the axis as DeepSpeed's own events.
    assert list(_read(folders[0], "ACCO_micro_batches")) == record["samples"]
    assert list(_read(folders[0], "Samples_lr")) == record["samples"]
    assert not folders[1].exists()


@pytest.mark.parametrize("precision, known_after", [("fp32", 3), ("bf16", 3), ("fp16static", 2)])
def test_skipped_commits(ranks, tmp_path, precision, known_after):
    """Window 2 has a NaN on rank 1. fp16 knows it at once and starts no COMMIT, the others when it is finished."""
    config = _monitored(tmp_path, training.ds_config(4, precision=precision))
    record = ranks(2).run(_train, config=config, windows=6, precision=precision, nan_in_window=2)[0]
    expected = [int(window >= known_after) for window in range(6)]
    assert list(_by_window(tmp_path, "skipped_commits").values()) == expected == record["skipped"]
    assert set(_by_window(tmp_path, "estimate_error")) == {1, 2, 4, 5}, "COMMIT 2 made no step"
    norms = _by_window(tmp_path, "grad_norm")
    assert list(norms) == [0, 1, 2, 3, 4], "in the order of the axis, each but that of the COMMIT in flight"
    assert [window for window, norm in norms.items() if norm == float("inf")] == [2]
    # The engine tells a norm in the step after its own; of fp16's skipped step, which it knows at once, in its own.
    for window in {0, 1, 3, 4} - ({1} if known_after == 2 else set()):
        assert norms[window] == record["norms"][window + 1]


# ---- gradient norms


def _train_and_save(config, windows, folder):
    from deepspeed.monitor.monitor import MonitorMaster

    places = []

    def noted(original, _, events):
        places.extend(samples for _, _, samples in events)
        original(events)

    with faults.around(MonitorMaster, "write_events", noted):
        engine = training.start_engine(config)
        history = training.run_windows(engine, windows)
        engine.save_checkpoint(folder)
        history["norms_after"] = training.run_windows(engine, 1, first_window=windows)["norms"]
        engine.destroy()
    return history | {"places": places}


def _train_adaptively(config, windows):
    import torch.distributed as dist

    import deepspeed_acco

    engine = training.start_engine(config)
    counted, told = [], []
    deepspeed_acco.on_window(engine, lambda window: counted.append(window.micro_batches))
    batches = (training.batch(dist.get_rank(), 0, number) for number in range(100))
    for x, y in deepspeed_acco.train_samples(engine, batches, total=windows * SAMPLES):
        engine.backward(engine(x, y))
        time.sleep(0.01 * dist.get_rank())
        engine.step()
        if engine.global_steps > len(told):
            told.append(float(engine.get_global_grad_norm()))
    engine.destroy()
    return counted, told


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_norms_lie_at_the_samples_where_zero1_has_them(ranks, tmp_path, precision):
    """The loss scale of fp16 is too large at first, and doubled later: ZeRO-1 skips some steps."""
    windows, stock = 12, training.ds_config(4, 2.0, precision=precision)
    stock["optimizer"] = {"type": "AdamW", "params": {**training.HYPER, "torch_adam": True}}
    theirs = ranks(2).run(training.train_stock, config=stock, windows=windows, precision=precision)[0]
    sync = _monitored(tmp_path / "sync", training.ds_config(4, 2.0, precision=precision, schedule="sync"))
    ranks(2).run(training.train_stock, config=sync, windows=windows, precision=precision)
    assert (float("inf") in theirs["norms"]) == (precision == "fp16"), "else the comparison says little"
    expected = {(window + 1) * SAMPLES: norm for window, norm in enumerate(theirs["norms"])}
    mine = {at: float(norm) for at, norm in _read(tmp_path / "sync", "ACCO_grad_norm").items()}
    assert mine == pytest.approx(expected, rel=2e-6 if precision == "fp32" else 2e-2)


def test_norms_of_overlapping_commits_are_those_of_the_reference(ranks, tmp_path):
    windows = 6
    config = _monitored(tmp_path / "logs", training.ds_config(4, 0.5))
    history = ranks(2).run(_train_and_save, config=config, windows=windows, folder=str(tmp_path / "saved"))[0]
    expected = oracle.run_reference(schedule="acco", world_size=2, windows=windows, n=4, a=2, clip=0.5)["norms"]
    norms = _by_window(tmp_path / "logs", "grad_norm")
    assert list(norms) == list(range(windows)), "the last one at the checkpoint"
    assert list(norms.values()) == pytest.approx(expected, rel=2e-5)
    assert history["norms"] == [0.0, *list(norms.values())[:-1]]
    assert history["norms_after"] == [norms[windows - 1]]
    assert len({round(norm, 3) for norm in norms.values()}) == windows, "else a shift would not show"
    # W&B drops what lies before the newest place that it was given.
    assert history["places"] == sorted(history["places"])


def test_norms_of_adaptive_windows_lie_at_what_was_computed(ranks, tmp_path):
    config = _monitored(tmp_path, training.ds_config(4, accumulation="adaptive"))
    counted, told = ranks(2).run(_train_adaptively, config=config, windows=5)[0]
    norms = _read(tmp_path, "ACCO_grad_norm")
    ends = list(itertools.accumulate(4 * sum(counts) for counts in counted))
    assert len(ends) >= 3 and list(norms) == ends
    assert [float(norm) for norm in norms.values()][: len(told) - 1] == told[1:]


# ---- the error of the estimate


def _expected_errors(schedule, windows, precision, **arguments):
    """|where training stands during COMMIT t - theta[t+1]| / |theta[t+1] - theta[t]| of the reference, for each t."""
    true, errors = [], []
    dtype = training.DTYPES[precision]

    def keep(reference, report):
        if schedule == "local":  # each rank measures its shard, which it alone knows
            of_ranks = [reference.moved_on(rank) for rank in range(2)]
            stands = [
                torch.cat([flat.split(numel)[rank] for rank, flat in enumerate(flats)])
                for flats, numel in zip(zip(*of_ranks), reference.shard_numels)
            ]
        else:
            stands = {"acco": reference.estimate, "wp": reference.prediction, "dpu": reference.previous}[schedule]
        stands = oracle.flatten(stands)
        if precision != "fp32":
            stands = stands.float().to(dtype).double()
        after, before = oracle.flatten(reference.theta), true[-1]
        errors.append(float((stands - after).norm() / (after - before).norm()))
        true.append(after)

    start = training.make_network().to(dtype)
    groups = oracle.groups_of(start, arguments["groups"])[0]
    true.append(oracle.flatten([oracle.flatten(group) for group in groups]).detach().double())
    oracle.run_reference(
        schedule=schedule, world_size=2, windows=windows, n=4, a=2, precision=precision, keep=keep, **arguments
    )
    return errors


@pytest.mark.parametrize(
    "schedule, precision, groups, clip, tolerance",
    [
        # fp32 rounds weights near 1 to 6e-8, which shows in differences of 1e-2.
        ("acco", "fp32", 2, 0.5, 2e-5),
        ("local", "fp32", 2, 0.5, 2e-5),
        ("wp", "fp32", 1, 0.0, 2e-5),
        ("dpu", "fp32", 2, 0.0, 2e-5),
        # One of 500 weights that falls to the other side when it is rounded to bf16 moves its part by 2**-8.
        ("acco", "bf16", 1, 0.0, 1e-3),
    ],
)
def test_estimate_error_is_that_of_the_reference(ranks, tmp_path, schedule, precision, groups, clip, tolerance):
    windows = 8
    config = _monitored(tmp_path, training.ds_config(4, clip, precision=precision, schedule=schedule))
    ranks(2).run(_train, config=config, groups=groups, windows=windows, precision=precision)
    expected = _expected_errors(schedule, windows, precision, groups=groups, clip=clip)
    mine = _by_window(tmp_path, "estimate_error")
    assert list(mine) == list(range(1, windows)), "COMMIT t is finished in window t + 1"
    for window, error in mine.items():
        assert error == pytest.approx(expected[window - 1], rel=tolerance), window
    if schedule == "dpu":
        assert all(error == pytest.approx(1.0, rel=1e-5) for error in mine.values())
    else:
        assert len({round(error, 4) for error in mine.values()}) > 3, "else the comparison says little"


def test_no_estimate_error_without_estimate_or_step(ranks, tmp_path):
    for name, params in (("sync", {"schedule": "sync"}), ("lr", {"lr": 0.0}), ("warmup", {"overlap_warmup_steps": 2})):
        config = _monitored(tmp_path / name, training.ds_config(4, **params))
        ranks(2).run(_train, config=config, windows=4)
    assert set(_by_window(tmp_path / "sync", "micro_batches")) == {0, 1, 2, 3}
    assert not _by_window(tmp_path / "sync", "estimate_error")
    assert not _by_window(tmp_path / "lr", "estimate_error")
    assert set(_by_window(tmp_path / "warmup", "estimate_error")) == {3}


# ---- the monitor changes nothing


@pytest.mark.parametrize("schedule, precision", [("acco", "bf16+fp32"), ("wp", "fp32")])
def test_monitor_and_lanes_change_no_bit(ranks, tmp_path, schedule, precision):
    def run(lane, folder=None):
        config = training.ds_config(4, 2.0, precision=precision, schedule=schedule, lane=lane)
        if folder:
            config = _monitored(folder, config)
        return ranks(2).run(training.train, config=config, windows=8, precision=precision)

    expected = run("auto")
    for lane in ("inline", "auto"):
        for mine, theirs in zip(run(lane, tmp_path / lane), expected):
            for key in ("losses", "norms", "replicas", "skipped"):
                assert mine[key] == theirs[key], (lane, key)
            for key in ("weights", "live", "after_destroy"):
                assert all(a.equal(b) for a, b in zip(mine[key], theirs[key])), (lane, key)
    # Written with all digits. The inline lane has finished its rounds earlier, but tells at the same moment.
    errors = _read(tmp_path / "auto", "ACCO_estimate_error")
    assert len(errors) == 7
    assert errors == _read(tmp_path / "inline", "ACCO_estimate_error")


def _all_reduces(config):
    from deepspeed_acco.runtime.communicator import Communicator

    engine = training.start_engine(config)
    calls = []

    def counted(original, _, value):
        calls.append(tuple(value.shape))
        original(value)

    with faults.around(Communicator, "all_reduce_sum", counted):
        _loop(engine, 3)
        engine.destroy()
    return len(calls)


def test_without_a_monitor_nothing_is_measured(ranks, tmp_path):
    assert ranks(2).run(_all_reduces, config=training.ds_config(4)) == [6, 6]  # one a round
    assert ranks(2).run(_all_reduces, config=_monitored(tmp_path, training.ds_config(4))) == [9, 9]


def _start_message(config):
    try:
        training.start_engine(config).destroy()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
def test_a_monitor_on_one_rank_is_an_error(tmp_path):
    plain = training.ds_config(4)
    pool = RankPool(2)
    try:
        configs = [{"config": _monitored(tmp_path, plain)}, {"config": plain}]
        for message in pool.run(_start_message, per_rank=configs):
            assert "the data-parallel ranks differ" in message and "monitor: True on ranks 0; False" in message
    finally:
        pool.close()


# ---- times


def _train_with_slow_rounds(config, round_s, rest_s, windows):
    from deepspeed_acco.runtime.communicator import Communicator

    engine = training.start_engine(config)

    def slow(original, _, whole, **options):
        time.sleep(round_s)
        original(whole, **options)

    with faults.around(Communicator, "all_gather", slow):
        record = _loop(engine, windows, rest_s=rest_s)
        record["round_s"], record["exposed_s"] = engine.optimizer.lane_times().round_s, 0.0
        engine.destroy()
    return record


@pytest.mark.parametrize("lane, rest_s", [("auto", 0.06), ("auto", 0.0), ("inline", 0.0)])
def test_times(ranks, tmp_path, lane, rest_s):
    """Rounds of at least 50 ms, behind phases of 2 * ``rest_s`` + little."""
    config = _monitored(tmp_path, training.ds_config(4, lane=lane))
    record = ranks(2).run(_train_with_slow_rounds, config=config, round_s=0.05, rest_s=rest_s, windows=5)[0]
    exposed, rounds, hidden = (_by_window(tmp_path, name) for name in ("exposed_wait_ms", "round_ms", "hidden_share"))
    assert set(exposed) == set(rounds) == set(hidden) == set(range(5))
    assert sum(rounds.values()) == pytest.approx(record["round_s"] * 1e3)
    for window in range(1, 5):
        wall_ms = record["wall_s"][window] * 1e3
        assert 100 <= rounds[window], "two rounds"
        assert 0 <= exposed[window] <= wall_ms
        assert 0 <= hidden[window] <= 1
        assert hidden[window] == pytest.approx(max(0.0, 1 - exposed[window] / rounds[window]))
        if lane == "inline":
            assert exposed[window] == rounds[window] <= wall_ms
        elif not rest_s:
            assert exposed[window] > 50, "nothing to hide behind"
    if rest_s:
        assert sorted(hidden[window] for window in range(1, 5))[2] > 0.7


def _train_with_timers(config, windows):
    from deepspeed.utils import logger

    # Newer versions of DeepSpeed print the line, older ones log it, and some of these show warnings alone.
    printed, level = io.StringIO(), logger.level
    handler = logging.StreamHandler(printed)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with redirect_stdout(printed):
            engine = training.start_engine(config)
            _loop(engine, windows)
            times = engine.optimizer.lane_times()
            known = sorted(name for name in engine.timers.get_timers() if name.startswith("acco"))
            sums_ms = {"acco_exposed_wait": times.exposed_s * 1e3, "acco_round": times.round_s * 1e3}
            engine.destroy()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = re.findall(r"time \(ms\) \| acco_exposed_wait: ([\d.]+) \| acco_round: ([\d.]+)", printed.getvalue())
    return known, [tuple(map(float, line)) for line in lines], sums_ms


@pytest.mark.parametrize("lane", ["auto", "inline"])
def test_wall_clock_breakdown(ranks, lane):
    config = {**training.ds_config(4, lane=lane), "wall_clock_breakdown": True}
    (known, lines, sums_ms), (_, other_lines, _) = ranks(2).run(_train_with_timers, config=config, windows=4)
    assert known == list(sums_ms)
    assert len(lines) == 4 and not other_lines, "a line a window, on rank 0"
    for column, total_ms in zip(zip(*lines), sums_ms.values()):
        assert sum(column) == pytest.approx(total_ms, abs=0.05), "each is logged with two digits"
    for known, lines, _ in ranks(2).run(_train_with_timers, config=training.ds_config(4, lane=lane), windows=2):
        assert not known and not lines


# ---- profilers


def _profiled_ranges(config, windows, sees_all_threads):
    import deepspeed_acco

    settings = {}
    if sees_all_threads:
        settings["experimental_config"] = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    engine = training.start_engine(config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **settings) as profiler:
        _loop(engine, windows)
        with deepspeed_acco.true_weights(engine):  # the last round ends inside the profile
            pass
    engine.destroy()
    return sorted(event.name for event in profiler.events() if event.name.startswith("ACCO"))


@pytest.mark.parametrize("schedule, kinds", [("acco", ["COMMIT", "ESTIMATE"]), ("wp", ["PREDICT"])])
def test_profiler_ranges(ranks, schedule, kinds):
    """torch's profiler sees a thread that it was not started in only when told to."""
    rounds = [f"{kind} {window}" for kind in kinds for window in range(3)]
    around_rounds = [f"ACCO {name}" for name in rounds]
    around_waits = [f"ACCO wait {name}" for name in rounds]
    for lane, sees_all_threads, expected in (
        ("auto", True, around_rounds + around_waits),
        ("auto", False, around_waits),
        ("inline", False, around_rounds),
    ):
        config = training.ds_config(4, schedule=schedule, lane=lane)
        for names in ranks(2).run(_profiled_ranges, config=config, windows=3, sees_all_threads=sees_all_threads):
            assert names == sorted(expected), (lane, sees_all_threads)


# ---- TensorBoard, docs


def test_tensorboard(ranks, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    config = training.ds_config(4)
    config["tensorboard"] = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    record = ranks(2).run(_train, config=config, windows=4)[0]
    accumulator = EventAccumulator(str(tmp_path / "run"))
    accumulator.Reload()
    assert {f"Train/ACCO/{name}" for name in EVENTS} <= set(accumulator.Tags()["scalars"])
    scalars = accumulator.Scalars("Train/ACCO/micro_batches")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(samples, 4) for samples in record["samples"]]
    # The layout that comes along shows each of them but the bytes, beside a loss and the learning rate.
    (layout,) = accumulator.Tensors("custom_scalars__config__")
    charts = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category[0].chart
    patterns = [pattern for chart in charts for pattern in chart.multiline.tag]
    written = {*accumulator.Tags()["scalars"], "train/loss"}
    shown = {tag for tag in written for pattern in patterns if re.match(pattern, tag)}
    assert written - shown == {"Train/ACCO/sent_bytes", "Train/ACCO/received_bytes"}
    assert all(any(re.match(pattern, tag) for tag in written) for pattern in patterns)


def test_docs(ranks, tmp_path):
    """The snippet writes exactly the events of the table."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "monitor.md").read_text()
    section = text.split("\n## Events\n")[1].split("\n## ")[0]
    snippet = json.loads("{" + re.search(r"```json\n(.*?)```", section, re.S)[1] + "}")
    assert snippet["csv_monitor"]["enabled"]
    snippet["csv_monitor"]["output_path"] = str(tmp_path)
    documented = re.findall(r"^\| `(Train/ACCO/\w+)`", section, re.M)
    assert documented == [f"Train/ACCO/{name}" for name in EVENTS]
    ranks(2).run(_train, config={**training.ds_config(4), **snippet}, windows=3)
    written = {path.stem for path in tmp_path.glob("*/Train_ACCO_*.csv")}
    assert written == {name.replace("/", "_") for name in documented}
