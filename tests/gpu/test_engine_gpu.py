# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Training on a device: against the float64 reference, and bit for bit against itself in another order of time."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspeed_acco.algorithm.window import phase_a_micro_batches
from deepspeed_acco.algorithm.wire import COMMIT_COMMS
from deepspeed_acco.tools.launch import launcher
from tests.engine import test_adaptive_windows as adaptive
from tests.engine.test_equality import check_equal
from tests.engine.test_precision import TOLERANCE
from tests.support import oracle, training
from tests.support.checkpoints import check_resumed, resume, start, whole_state
from tests.support.launcher import ROOT, rank_environment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]

SCHEDULES = ("acco", "local", "wp", "dpu", "sync")
EXACT = ("losses", "norms", "replicas", "skipped", "lr", "scale")


EQUAL = [  # schedule, ranks, clip, groups, n, fraction
    *(("acco", 1, 2.0, 2, 5, 0.25), ("acco", 2, 0.0, 1, 4, 0.5), ("acco", 2, 2.0, 2, 6, 0.75)),
    *(("local", 1, 0.0, 1, 4, 0.5), ("local", 2, 2.0, 2, 1, 0.5), ("local", 2, 0.0, 2, 5, 0.5)),
    *(("wp", 1, 2.0, 1, 4, 0.5), ("wp", 2, 0.0, 2, 1, 0.5)),
    *(("dpu", 2, 2.0, 1, 2, 0.5), ("sync", 2, 0.0, 2, 4, 0.5)),
]


@pytest.mark.parametrize(("schedule", "world_size", "clip", "groups", "n", "fraction"), EQUAL)
def test_equals_the_reference(gpu_ranks, schedule, world_size, clip, groups, n, fraction):
    config = training.ds_config(n, clip, schedule=schedule, estimate_fraction=fraction)
    records = gpu_ranks(world_size).run(training.train, config=config, windows=20, groups=groups)
    a = phase_a_micro_batches(n, fraction) if n > 1 else 1
    common = dict(world_size=world_size, windows=20, n=n, a=a, clip=clip, groups=groups)
    reference = oracle.run_reference(schedule=schedule, **common)
    check_equal(records, reference, 20, delay=0 if schedule == "sync" else 1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_estimate_equals_the_reference(gpu_ranks, world_size, bits):
    config = training.ds_config(4, estimate_comm=f"int{bits}")
    records = gpu_ranks(world_size).run(training.train, config=config, windows=12)
    reference = oracle.run_reference(schedule="acco", world_size=world_size, windows=12, n=4, a=2, estimate_bits=bits)
    # A value near the boundary of two levels may fall to either side: a level, not a schedule.
    assert oracle.distance(records[0]["weights"], reference["weights"]) < 1e-3
    assert all(record["replicas"] == records[0]["replicas"] for record in records)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("schedule", "bits"), [("acco", 4), ("acco", None), ("local", None), ("wp", None), ("sync", None)]
)
def test_quantized_commits_equal_the_reference(gpu_ranks, world_size, schedule, bits):
    params = {"estimate_comm": f"int{bits}"} if bits else {}
    config = training.ds_config(4, schedule=schedule, commit_comm="int8", **params)
    records = gpu_ranks(world_size).run(training.train, config=config, windows=6)
    commit_bits = (COMMIT_COMMS["int8"].gradient, COMMIT_COMMS["int8"].change)
    common = dict(world_size=world_size, windows=6, n=4, a=2 if schedule == "acco" else 4)
    reference = oracle.run_reference(schedule=schedule, estimate_bits=bits, commit_bits=commit_bits, **common)
    assert oracle.distance(records[0]["weights"], reference["weights"]) < 2e-3  # ties, as above
    for record in records[1:]:
        assert all(a.equal(b) for a, b in zip(record["after_destroy"], records[0]["after_destroy"]))


@pytest.mark.parametrize("precision", ["bf16", "bf16+fp32", "fp16"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sixteen_bit(gpu_ranks, schedule, precision, capsys):
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule)
    (record,) = gpu_ranks(1).run(training.train, config=config, windows=16, precision=precision)
    scales = None
    if precision == "fp16":
        scales = [2.0**17, *record["scale"][:-1]]
        assert record["skipped"][-1] > 0, "the dynamic scale must start too high for this test"
    common = dict(world_size=1, windows=16, n=4, a=2, precision=precision, scales=scales, clip=2.0)
    distances = {}
    for name in SCHEDULES:
        # On the device, whose products of matrices are rounded in an order of their own.
        reference = oracle.run_reference(schedule=name, device="cuda", **common)
        distances[name] = oracle.distance(record["weights"], reference["weights"])
    with capsys.disabled():
        print(f"\n{precision} {schedule}: distance to " + ", ".join(f"{k} {v:.1e}" for k, v in distances.items()))
    told = str(distances)
    mine = distances.pop(schedule)
    assert mine < TOLERANCE, told
    assert min(distances.values()) > 10 * mine, told


def train_with_sleeps(config, windows, precision, seed):
    """Trains with random sleeps on both streams: before and after each forward, and before, inside and after each
    round."""
    from unittest import mock

    from deepspeed_acco.optim import ops
    from deepspeed_acco.runtime import round as round_
    from deepspeed_acco.runtime.communicator import Communicator

    chance = random.Random(seed)

    def sleeping(function):
        def run(*arguments, **options):
            torch.cuda._sleep(chance.choice([0, 100_000, 3_000_000]))
            result = function(*arguments, **options)
            torch.cuda._sleep(chance.choice([0, 100_000, 3_000_000]))
            return result

        return run

    with (
        mock.patch.object(round_.RoundWork, "run", sleeping(round_.RoundWork.run)),
        mock.patch.object(round_.RoundWork, "pack", sleeping(round_.RoundWork.pack)),
        mock.patch.object(round_.RoundWork, "install", sleeping(round_.RoundWork.install)),
        mock.patch.object(round_, "adamw_commit", sleeping(ops.adamw_commit)),
        mock.patch.object(round_, "adamw_commit_change", sleeping(ops.adamw_commit_change)),
        mock.patch.object(Communicator, "all_gather", sleeping(Communicator.all_gather)),
        mock.patch.object(training.Network, "forward", sleeping(training.Network.forward)),
    ):
        return training.train(config, windows, groups=2, precision=precision)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("schedule", "precision", "params"),
    [
        *(("acco", "bf16", {}), ("acco", "fp16", {}), ("acco", "bf16+fp32", {"estimate_comm": "int4"})),
        *(("local", "bf16", {}), ("local", "fp32", {}), ("wp", "fp16", {}), ("dpu", "bf16", {}), ("sync", "fp32", {})),
        *(("acco", "bf16", {"commit_comm": "int8"}), ("local", "fp32", {"commit_comm": "int8"})),
    ],
)
def test_sleeps_on_both_streams_change_no_bit(gpu_ranks, world_size, schedule, precision, params):
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule, **params)
    inline = training.ds_config(4, 2.0, precision=precision, schedule=schedule, lane="inline", **params)
    common = dict(windows=12, precision=precision)
    expected = gpu_ranks(world_size).run(training.train, config=inline, groups=2, **common)
    for seed in (1, 2):
        for record, plain in zip(
            gpu_ranks(world_size).run(train_with_sleeps, config=config, seed=seed, **common), expected
        ):
            for key in EXACT:
                assert record[key] == plain[key], key
            for key in ("weights", "live", "after_destroy"):
                assert all(mine.equal(theirs) for mine, theirs in zip(record[key], plain[key])), key


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("schedule", ["acco", "local", "wp"])
def test_looking_changes_nothing(gpu_ranks, world_size, schedule):
    config = training.ds_config(4, 2.0, precision="bf16", schedule=schedule)
    common = dict(config=config, windows=12, precision="bf16")
    plain = gpu_ranks(world_size).run(training.train, **common)
    looked = gpu_ranks(world_size).run(training.train, look="look_in_every_way", **common)
    for record, other in zip(looked, plain):
        assert record["losses"] == other["losses"]
        assert all(mine.equal(theirs) for mine, theirs in zip(record["weights"], other["weights"]))


def _looks_on_another_stream(config, windows):
    """Every look, and the norm, on a stream of its own, which training's stream does not wait for by itself."""
    from deepspeed_acco.runtime import round as round_

    other, plain_run = torch.cuda.Stream(), round_.RoundWork.run

    def slow(*arguments, **options):
        result = plain_run(*arguments, **options)
        torch.cuda._sleep(20_000_000)
        return result

    round_.RoundWork.run = slow

    def look(engine, window, micro_batch):
        if micro_batch == 1:
            with torch.cuda.stream(other):
                engine.optimizer.driver.finish()

    engine = training.start_engine(config)
    try:
        history = training.run_windows(engine, windows, "bf16", look=look)
        history["weights"] = training.true_master_weights(engine)
    finally:
        engine.destroy()
        round_.RoundWork.run = plain_run
    return history


def test_a_round_finished_under_another_stream(gpu_ranks):
    config = training.ds_config(4, precision="bf16", schedule="acco")
    (plain,) = gpu_ranks(1).run(training.train, config=config, windows=8, precision="bf16")
    (looked,) = gpu_ranks(1).run(_looks_on_another_stream, config=config, windows=8)
    assert looked["losses"] == plain["losses"]
    assert all(mine.equal(theirs) for mine, theirs in zip(looked["weights"], plain["weights"]))


@pytest.mark.parametrize(("schedule", "n"), [("acco", 2), ("local", 1)])
def test_adaptive_windows_in_the_reference(gpu_ranks, schedule, n):
    config = adaptive.ds_config(n, 2.0, schedule=schedule)
    speeds = [{"slowness": [1, 3]}, {"slowness": [5, 2]}]
    records = gpu_ranks(2).run(adaptive.train, per_rank=speeds, config=config, windows=12)
    adaptive.check(records, adaptive.replay(records[0], schedule, 2, n, 1, clip=2.0))


def _counts_beside_slow_rounds(config, windows, micro_batch_s, round_s):
    """Micro-batches and rounds of a given length on the device; returns the counts of the windows."""
    from unittest import mock

    import deepspeed_acco
    from deepspeed_acco.runtime.round import RoundWork

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        begin.record()
        torch.cuda._sleep(100_000_000)
        end.record()
        end.synchronize()
    cycles_per_s = 1e11 / begin.elapsed_time(end)

    def sleeping(function, seconds):
        def run(*arguments, **options):
            torch.cuda._sleep(int(seconds * cycles_per_s))
            return function(*arguments, **options)

        return run

    counts = []
    with (
        mock.patch.object(RoundWork, "run", sleeping(RoundWork.run, round_s)),
        mock.patch.object(training.Network, "forward", sleeping(training.Network.forward, micro_batch_s)),
    ):
        engine = training.start_engine(config)
        deepspeed_acco.on_window(engine, lambda window: counts.append((window.micro_batches[0], window.in_phase_a[0])))
        while engine.global_steps < windows:
            engine.backward(engine(*training.batch_for(engine, 0, engine.global_steps, 0)))
            engine.step()
        engine.destroy()
    return counts


def test_adaptive_windows_are_as_long_as_on_a_cpu(gpu_ranks):
    """A round of 70 ms is over in the fourth micro-batch of 20 ms, or in the third where the host takes its time, and
    the phase ends with it."""
    config = adaptive.ds_config(2, schedule="acco")
    (counts,) = gpu_ranks(1).run(_counts_beside_slow_rounds, config=config, windows=8, micro_batch_s=0.02, round_s=0.07)
    assert all(in_a in (3, 4) and count - in_a in (3, 4) for count, in_a in counts[3:-1]), counts


@pytest.mark.parametrize(
    ("world_size", "schedule", "precision", "commit_comm"),
    [
        *((1, "acco", "bf16+fp32", "full"), (2, "acco", "fp16", "full"), (2, "local", "bf16", "full")),
        *((1, "wp", "fp32", "full"), (2, "sync", "bf16", "full")),
        *((2, "acco", "bf16", "int8"), (2, "local", "bf16", "int8"), (1, "wp", "fp32", "int8")),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(gpu_ranks, world_size, schedule, precision, commit_comm, tmp_path):
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule, commit_comm=commit_comm)
    arguments = dict(config=config, precision=precision, groups=2, folder=str(tmp_path))
    check_resumed(gpu_ranks(world_size).run(resume, **arguments))


def _save(config, folder):
    engine = start(config)
    training.run_windows(engine, 5)
    engine.save_checkpoint(folder)
    state = whole_state(engine)
    engine.destroy()
    return state


def _load(config, folder):
    engine = start(config, seed=9)
    engine.load_checkpoint(folder)
    state = whole_state(engine)
    history = training.run_windows(engine, 4, first_window=5)
    engine.destroy()
    return state, history["losses"]


@pytest.mark.parametrize("saved_on", ["cpu", "cuda"])
def test_checkpoints_go_from_device_to_device(gpu_ranks, ranks, saved_on, tmp_path):
    config = training.ds_config(4, 2.0, schedule="acco")
    pools = {"cpu": ranks(1), "cuda": gpu_ranks(1)}
    loaded_on = "cuda" if saved_on == "cpu" else "cpu"
    (saved,) = pools[saved_on].run(_save, config=config, folder=str(tmp_path))
    ((loaded, losses),) = pools[loaded_on].run(_load, config=config, folder=str(tmp_path))
    ((_, expected),) = pools[saved_on].run(_load, config=config, folder=str(tmp_path))
    for name, tensors in saved["states"].items():
        assert all(mine.equal(theirs) for mine, theirs in zip(loaded["states"][name], tensors)), name
    assert losses == pytest.approx(expected, rel=1e-4)


def _without_waiting(config, windows, warmup):
    """Trains on batches that are there, and calls every wait of the host for the device an error after some windows."""
    engine = training.start_engine(config)
    dtype = next(engine.module.parameters()).dtype
    n = engine.gradient_accumulation_steps()
    batches = [training.batch_for(engine, 0, 0, micro_batch, dtype) for micro_batch in range(n)]
    try:
        for window in range(windows):
            torch.cuda.set_sync_debug_mode("error" if window >= warmup else "default")
            for x, y in batches:
                engine.backward(engine(x, y))
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.destroy()


@pytest.mark.parametrize(
    ("schedule", "params"),
    [
        *(("acco", {}), ("acco", {"estimate_comm": "int4"}), ("local", {}), ("wp", {}), ("dpu", {}), ("sync", {})),
        *(("acco", {"commit_comm": "int8"}), ("wp", {"commit_comm": "int8"})),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_host_never_waits_for_the_device(gpu_ranks, schedule, params, precision):
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule, **params)
    gpu_ranks(1).run(_without_waiting, config=config, windows=8, warmup=3)


def _memory(config, width):
    import deepspeed

    import deepspeed_acco  # noqa: F401

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    x = torch.randn(8, width, device=engine.device, dtype=next(module.parameters()).dtype)
    for _ in range(3):
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(x).square().mean())
            engine.step()
    torch.cuda.synchronize()
    numel = sum(parameter.numel() for parameter in module.parameters())
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    own = engine.optimizer.own_bytes()
    engine.destroy()
    return numel, held, peak, own


@pytest.mark.parametrize(
    ("schedule", "n", "commit_comm"),
    [("acco", 2, "full"), ("local", 1, "full"), ("sync", 2, "full"), ("sync", 2, "int8")],
)
def test_memory_is_what_is_said(gpu_ranks, schedule, n, commit_comm, capsys):
    config = training.ds_config(n, precision="bf16", schedule=schedule, commit_comm=commit_comm)
    ((numel, held, peak, own),) = gpu_ranks(1).run(_memory, config=config, width=2048)
    said = 2 * numel + 12 * numel + own  # weights, master and both moments on one rank, own buffers
    with capsys.disabled():
        figures = [f"{count / numel:.2f}" for count in (held, peak, said)]
        print(f"\n{schedule}: {', '.join(figures)} bytes a parameter held, at the peak, and said")
    assert held < 1.02 * said + 2**22
    assert peak < 1.1 * said + 2**24, "no copy of the model is made on the way"


SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
import deepspeed
from tests.support import training
engine = training.start_engine(training.ds_config(2, precision="bf16", schedule="acco"))
training.run_windows(engine, 3, "bf16")
x, y = training.batch_for(engine, 0, 0, 0, torch.bfloat16)
engine.backward(engine(x, y))
engine.step()
engine(x, y)  # the ESTIMATE is in flight
if "raise" in sys.argv:
    raise RuntimeError("of the user's own")
if "destroy" in sys.argv:
    engine.destroy()
print("reached the end", flush=True)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("destroy", 0), ("raise", 1)])
def test_leaving_is_clean(native, tmp_path, how, code):
    script = Path(tmp_path) / "leave.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    environment = rank_environment() | {"DS_ACCELERATOR": "cuda", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.free_port())}
    done = subprocess.run(
        [sys.executable, str(script), how], env=environment, capture_output=True, text=True, timeout=120
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert ("reached the end" in output) == (how != "raise")
    assert ("of the user's own" in output) == (how == "raise")
    assert "terminate called" not in output and "Exception ignored" not in output, output
