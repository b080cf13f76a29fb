# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Every benchmark with its smallest settings, as its command says it, and what it writes."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from deepspeed_acco.algorithm.reference import Reference, ReferenceHyper
from deepspeed_acco.tools.launch import shaped_hosts
from tests.support.launcher import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
LIMIT_S = 870  # for up to six runs, each of them as long as DeepSpeed takes to start
pytestmark = pytest.mark.timeout(LIMIT_S + 30)
TINY = ("--preset", "tiny", "--seq_len", "8")
needs_hosts = pytest.mark.skipif(shaped_hosts.why_not() is not None, reason=str(shaped_hosts.why_not()))


def run(command, **variables) -> str:
    """Returns what it printed; from another folder than the checkout, where a benchmark finds its package itself."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}  # conftest.py says where operators lie
    environment.pop("PYTHONPATH", None)
    environment |= variables
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def benchmark(name, tmp_path, *arguments) -> dict:
    """Returns the JSON that the benchmark wrote; it names its origin."""
    out = tmp_path / "results.json"
    run([BENCHMARKS / f"{name}.py", *arguments, "--out", out])
    results = json.loads(out.read_text())
    assert " cores, " in results["machine"] and "torch " in results["machine"]
    (command,) = results.get("commands") or [results["command"]]
    assert command == " ".join(["python", f"benchmarks/{name}.py", *map(str, arguments), "--out", str(out)])
    return results


def test_every_benchmark_is_here():
    names = {path.stem for path in BENCHMARKS.glob("[!_]*.py")}
    tested = {name for name in names if f'benchmark("{name}"' in (ROOT / "tests/benchmarks/test_smoke.py").read_text()}
    assert tested == names


@pytest.mark.full
def test_stability(tmp_path):
    results = benchmark("stability", tmp_path, "--beta1", 0.5)
    limits = {row["schedule"]: row["largest_lr_times_curvature"] for row in results["rows"]}
    assert limits["sync"] == pytest.approx(6.0, abs=0.01)  # heavy ball: 2 (1 + beta) / (1 - beta)
    assert all(0 < limit <= limits["sync"] for limit in limits.values()) and len(limits) == 11


@pytest.mark.full
@pytest.mark.native
def test_estimate_error(tmp_path):
    results = benchmark("estimate_error", tmp_path, "--numel", 1000, "--turns", 1)
    assert [row["weights"] for row in results["rows"]] == ["float32", "bfloat16"]
    assert all(row["commit_ns_per_param"] > 0 and row["error_ns_per_param"] > 0 for row in results["rows"])


@pytest.mark.full  # convergence and the error of the estimate train the same example
def test_estimate_bits(tmp_path):
    results = benchmark("estimate_bits", tmp_path, "--steps", 1, "--seeds", 1, "--modes", "sync", "2", *TINY)
    sync, two_bits = (run["val_loss"] for run in results["runs"])
    (row,) = results["summary"]
    assert row["mode"] == "2" and row["estimate_error"] > 0 and 0 < row["share_changed"] <= 1
    assert row["percent_above_sync"] == [pytest.approx(100 * (two_bits / sync - 1), abs=0.001)]


@pytest.mark.full
def test_quantization_error(tmp_path):
    rows = benchmark("quantization_error", tmp_path, "--steps", 2, *TINY)["rows"]
    late = {row["sent_as"]: row["late_percent"] for row in rows}
    for bits in (8, 4):
        assert 0 < late[f"{bits} bits, levels of roots"] < late[f"{bits} bits, levels of values"]


@pytest.mark.full
@pytest.mark.native
def test_overlap(tmp_path):
    shape = ("--width", 32, "--depth", 1, "--seq_len", 8, "--batch", 1)
    few = ("--turns", 1, "--windows", 1, "--delays", 0, 3, "--configs", "acco", "sync")
    results = benchmark("overlap", tmp_path, "--device", "cpu", *shape, *few)
    rounds = {(row["config"], row["delay_over_c"]): row.get("round_ms") for row in results["rows"]}
    compute_ms = next(row["step_ms"] for row in results["rows"] if row["config"] == "bare")
    assert set(rounds) == {("acco", 0.0), ("acco", 3.0), ("sync", 0.0), ("sync", 3.0), ("bare", 0.0)}
    for name in ("acco", "sync"):
        assert rounds[name, 3.0] > rounds[name, 0.0] + compute_ms, "the delay is in the round"
    assert (tmp_path / "results.png").stat().st_size > 1000


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_kernel_resources(tmp_path):
    few = ("--sources", "local_prediction", "--architectures", "sm_90")
    rows = {row["kernel"]: row for row in benchmark("kernel_resources", tmp_path, *few)["rows"]}
    wide = rows["predict_kernel, all operands aligned"]
    assert wide["variants"] == 9 and 16 <= wide["registers"][0] <= wide["registers"][1] <= 255
    assert all(row["spilled_bytes"] == 0 for row in rows.values())
    assert rows["roots_kernel"]["shared_bytes"] > 0


SASS = """
		Function : _ZN4acco4cuda12adamw_kernelILb1EEEv
        /*0080*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0090*/                   @!P0 LDG.E.U16.CONSTANT R9, desc[UR4][R6.64+0x2] ;
        /*00a0*/                   LDG.E.EF.LTC128B R9, desc[UR4][R6.64] ;
        /*00b0*/                   LDS.128 R4, [R2] ;
        /*00c0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
		Function : _ZN4acco4cuda12roots_kernelEv
        /*0080*/                   STG.E.S8 desc[UR4][R2.64], R4 ;
"""


def test_widths_of_accesses_are_read_from_instructions(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("kernel_resources")
    found = {module.plain_name(name): widths for name, widths in module.accesses_of(SASS).items()}
    wide = found["adamw_kernel, all operands aligned"]
    assert module.of_kind(wide, "LDG") == {"16": 1, "32": 1, "128": 1}
    assert module.of_kind(wide, "STG") == {"64": 1}
    assert found["roots_kernel"] == {("STG", 8): 1}


@pytest.mark.full
def test_exits(tmp_path):
    results = benchmark("exits", tmp_path, "--runs", 1)
    assert results["runs_of_each"] == 1 and results["ranks_with_an_exit_code"]["acco"] == []


@pytest.mark.full
def test_convergence(tmp_path):
    arguments = ("--configs", "zero1", "acco", "--seeds", 1, "--steps", 1, *TINY)
    results = benchmark("convergence", tmp_path, *arguments)
    zero1, acco = results["runs"]
    assert zero1["step"] == [0, 1] and zero1["samples"] == [0, 256]
    assert all(math.isfinite(loss) for loss in zero1["val_loss"]) and zero1["val_loss"][0] == acco["val_loss"][0]
    (percent,) = results["summary"][1]["percent"]
    assert percent == pytest.approx(100 * (acco["val_loss"][-1] / zero1["val_loss"][-1] - 1), abs=0.001)
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_equal_clock(tmp_path):
    """Twice the time a step is half the steps; a training of so many that is not there is asked for."""
    step_s = {"local": 1.0, "zero1": 2.0, "zero0": 2.5, "wp": None}  # the last one failed
    timed = [{"name": name, "step_s": time and {"median": time}} for name, time in step_s.items()]
    times = {"configs": timed, "reference": {"round_s": 0.8, "compute_s": 1.0}, "command": "ds_acco compare"}
    trained = [("local", 150, 1, 2.5), ("local", 150, 2, 2.7), ("zero1", 75, 1, 3.0), ("zero1", 60, 1, 3.5)]
    setting = {"ranks": 2, "batch_factor": 1, "lr": 1e-3, "precision": "fp32", "preset": "small", "seq_len": 64}
    runs = [
        setting | {"config": name, "steps": steps, "seed": seed, "step": [0, steps], "val_loss": [5.0, loss]}
        for name, steps, seed, loss in trained
    ]
    for name, content in (("times", times), ("trained", {"runs": runs})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    inputs = ("--times", tmp_path / "times.json", "--convergence", tmp_path / "trained.json")
    rows = {row["config"]: row for row in benchmark("equal_clock", tmp_path, *inputs)["rows"]}
    local, zero0, zero1 = (rows.pop(name) for name in ("local", "zero0", "zero1"))
    assert (local["steps"], local["val_loss"], local["curve_s"]) == (150, 2.6, [0.0, 150.0])
    assert (zero1["steps"], zero1["val_loss"], zero1["curve_s"]) == (75, 3.0, [0.0, 150.0])
    assert (zero0["steps"], zero0["val_loss"], zero0["network"], rows) == (60, 3.5, "R = 0.80 C", {})
    assert (tmp_path / "results.png").stat().st_size > 10_000
    (tmp_path / "trained.json").write_text(json.dumps({"runs": runs[:2]}))
    with pytest.raises(AssertionError, match="--lr 0.001 --steps 75 --configs zero1"):
        benchmark("equal_clock", tmp_path, *inputs)


@pytest.mark.full
def test_adaptive_quality(tmp_path):
    arguments = ("--seeds", 1, "--steps", 2, "--slowness", 2, *TINY)
    results = benchmark("adaptive_quality", tmp_path, *arguments)
    adaptive, *fixed = results["runs"]
    assert adaptive["config"] == "acco_adaptive" and {run["config"] for run in fixed} == {"zero1"}
    assert len(results["above_zero1_at_the_same_batch"]["percent"]) == 1
    assert all(math.isfinite(run["val_loss"][-1]) for run in results["runs"])


@pytest.mark.full
def test_paired_kernels_of_the_example(tmp_path):
    results = benchmark("paired_kernels", tmp_path, "--pairs", 1, "--steps", 2, "--skip", "two_hosts", *TINY)
    (row,) = results["rows"]
    ratio = row["native_s"][0] / row["torch_s"][0]
    assert row["median_ratio_native_to_torch"] == pytest.approx(ratio, rel=0.05)


@needs_hosts
@pytest.mark.full
def test_paired_kernels_of_two_hosts(tmp_path):
    tiny = ("--numel", 2000, "--windows", 1, "--micro_batch_ms", 5)
    results = benchmark("paired_kernels", tmp_path, "--pairs", 1, "--skip", "example", *tiny)
    step, alone = results["rows"]
    assert step["native_s"][0] > 8 * 0.005 and alone["torch_s"][0] > 0


@needs_hosts
@pytest.mark.full
def test_sweep(tmp_path):
    tiny = ("--numel", 200_000, "--windows", 1, "--n", 4, "--rate", "20mbit", "--round_ms", 400)
    several = ("--ranks-per-host", 2, "--configs", "acco_int4", "zero0")
    results = benchmark("sweep", tmp_path, "--ratios", 0.5, 2, *several, *tiny)
    assert results["ranks_per_host"] == 2
    slow, fast = results["points"]
    assert slow["compute_s"] == pytest.approx(0.8, rel=0.3) and fast["compute_s"] == pytest.approx(0.2, rel=0.6)
    assert slow["round_over_compute"] < fast["round_over_compute"]
    assert slow["acco_int4"].keys() == {"step_s", "predicted_s", "error"}
    assert results["predicted_crossings"].keys() == {"acco_int4"}
    assert (tmp_path / "results.png").stat().st_size > 10_000


@needs_hosts
@pytest.mark.full
def test_ranks_per_host(tmp_path):
    tiny = ("--numel", 200_000, "--windows", 1, "--n", 2, "--rate", "20mbit", "--micro_batch_ms", 200)
    results = benchmark("ranks_per_host", tmp_path, "--ranks-per-host", 2, "--configs", "acco", "flat", "zero0", *tiny)
    (row,) = results["rows"]
    assert row["ranks_per_host"] == 2 and row["acco"]["step_s"] > 0.4
    # Two rounds, each with half of the gradients and half of the weights in 16 bits; without levels twice as much.
    assert row["acco"]["interface_bytes"] == pytest.approx(4 * 200_000, rel=0.2)
    assert row["flat"]["interface_bytes"] > 1.5 * row["acco"]["interface_bytes"]
    assert row["fastest_stage_over"].keys() == {"acco", "flat"}
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full) for name in ("adaptive_quality", "convergence")] + ["sweep_75mbit_2x2"],
)
def test_committed_results_are_drawn_again_without_a_measurement(name, tmp_path):
    out = tmp_path / f"{name}.json"
    shutil.copy(RESULTS / f"{name}.json", out)
    run([BENCHMARKS / f"{name.partition('_75')[0]}.py", "--draw", "--out", out])
    assert out.read_text() == (RESULTS / f"{name}.json").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


# ---- what ds_acco compare measures


def compare(tmp_path, *arguments) -> dict:
    command = ["-m", "deepspeed_acco.tools.cli", "compare", "--out", tmp_path / "out", *arguments]
    run(command, PYTHONPATH=str(ROOT))
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize(("folder", "n"), [("configs", 8), ("configs/n10", 10)])
def test_the_committed_configs_train_the_same(folder, n):
    """So that any of a folder may be compared with any other."""
    configs = {path.stem: json.loads(path.read_text()) for path in (BENCHMARKS / folder).glob("*.json")}
    differing = ("optimizer", "zero_optimization")
    common = {name: {k: v for k, v in config.items() if k not in differing} for name, config in configs.items()}
    assert len(common) >= 8 and all(config == common["acco"] for config in common.values())
    assert common["acco"]["gradient_accumulation_steps"] == n
    assert {config["optimizer"]["params"]["lr"] for config in configs.values()} == {1e-4}
    stages = {name: config["zero_optimization"]["stage"] for name, config in configs.items() if "zero" in name}
    assert all(int(name.removeprefix("zero")[0]) == stage for name, stage in stages.items())
    schedules = {name: config["optimizer"]["params"].get("schedule", "zero") for name, config in configs.items()}
    assert all(name.startswith(schedule) for name, schedule in schedules.items())


@pytest.mark.full
def test_ranks_of_different_speed(tmp_path):
    """The command for adaptive windows; the reference tells what the ranks compute alone: 10 and 5 samples a second."""
    script = ROOT / "deepspeed_acco" / "tools" / "launch" / "emulated_accelerator.py"
    results = compare(
        tmp_path,
        *(BENCHMARKS / "configs" / "acco_adaptive.json", "--script", script, "--num_accelerators", 2, "--passes", 1),
        *("--", "--micro_batch_ms", 100, "--slowness", 1, 2, "--numel", 2000, "--steps", 5),
    )
    assert results["reference"]["samples_per_s_alone"] == pytest.approx(15, rel=0.2)
    (adaptive,) = results["configs"]
    assert adaptive["samples_per_s"]["median"] > 0 and adaptive["runs"][0]["batch"]


@needs_hosts
@pytest.mark.full
def test_two_hosts(tmp_path):
    """The command behind the figures of two hosts: what a step takes, its bound, and what is sent."""
    configs = [BENCHMARKS / "configs" / f"{name}.json" for name in ("acco", "zero1")]
    results = compare(
        tmp_path,
        *(*configs, "--hosts", 2, "--rate", "100mbit", "--emulate-compute", 50, "--numel", 1_000_000),
        *("--steps", 5, "--passes", 1),
    )
    acco, zero1 = results["configs"]
    compute_s, round_s = (results["reference"][key] for key in ("compute_s", "round_s"))
    # At least: how much longer is the machine's other work. The link lets 256 kB of two halves of 2 MB pass at once.
    assert compute_s > 8 * 0.05 and round_s > (2_000_000 - 256_000) / 12.5e6
    assert acco["bound_s"] == pytest.approx(2 * max(compute_s / 2, round_s)) and acco["step_s"]["median"] > 8 * 0.05
    assert acco["sent_bytes"] == pytest.approx(2 * 2_000_000, rel=0.05)  # two rounds, in each of them two halves
    assert zero1["step_s"]["median"] > 8 * 0.05 and zero1["sent_bytes"] is None
    assert acco["interface_bytes"] == pytest.approx(1.03 * acco["sent_bytes"], rel=0.04)  # with headers
    assert zero1["interface_bytes"] == pytest.approx(1.03 * 1.5 * 2_000_000, rel=0.06)  # an all-reduce, a gather


@pytest.mark.full
def test_virtual_ranks(tmp_path):
    few = ("--schedules", "sync", "acco:fraction=0.75", "local", "--ranks", 2, 8, "--seeds", 1)
    results = benchmark("virtual_ranks", tmp_path, *few, "--steps", 2, "--batch", 8, *TINY)
    kinds = [(run["schedule"], run["ranks"]) for run in results["runs"]]
    assert kinds == [("sync", 0), ("acco:fraction=0.75", 0), ("local", 2), ("local", 8)]
    sync, *others = results["runs"]
    for run, row in zip(others, results["summary"][1:], strict=True):
        assert row["percent"] == [pytest.approx(100 * (run["val_loss"] / sync["val_loss"] - 1), abs=0.001)]
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.parametrize("schedule", ["sync", "acco", "local", "wp", "dpu"])
def test_virtual_ranks_train_as_the_reference(schedule, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import virtual_ranks

    numel, ranks, n = 600, 8, 2  # blocks of 256 and a shorter one; more ranks than keep all of their distance
    generator = torch.Generator().manual_seed(1)
    start, samples = (torch.randn(*shape, numel, generator=generator) for shape in ((), (32,)))

    def gradients(weights, tokens):
        of_samples = samples.to(weights.dtype)[tokens[:, :, 0]]
        return ((weights[:, None] * of_samples).sin() * of_samples).mean(1)

    state = virtual_ranks.State(start, torch.zeros(numel), torch.zeros(numel))
    run = virtual_ranks.Run(gradients, lambda weights: weights, state, virtual_ranks.Options(), ranks)
    hyper = ReferenceHyper(0.0, state.beta1, state.beta2, state.eps, state.weight_decay)
    reference = Reference([start], [hyper], schedule, ranks, clip_grad=state.clip_grad, shard_numels=[numel])
    for _ in range(6):
        tokens = torch.randint(len(samples), (n * ranks, 1), generator=generator)
        of_ranks = tokens.view(n, ranks, 1).transpose(0, 1) if schedule == "acco" else tokens.view(ranks, n, 1)

        def gradient(weights, rank, window, micro_batch):
            return [gradients(weights[0][None], of_ranks[rank, micro_batch].view(1, 1, 1))[0] / n]  # noqa: B023

        hyper.lr += 1e-3
        run.state = replace(run.state, lr=hyper.lr)
        getattr(run, schedule)(tokens)
        reference.run_window(gradient, n, n // 2)
        torch.testing.assert_close(run.state.theta.double(), reference.theta[0], rtol=0, atol=2e-6)
    assert (run.state.theta - start).abs().max() > 0.01
