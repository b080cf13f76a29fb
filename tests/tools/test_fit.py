# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""``ds_acco fit``: logs that DeepSpeed printed, made ones whose truth is known, and runs whose ACCO step is known.

tests/support/fit_logs.py made those in tests/tools/logs.
"""

import json
import re
from pathlib import Path

import pytest

from deepspeed_acco.tools.cli import main
from deepspeed_acco.tools.fit.log import read_log
from deepspeed_acco.tools.plan import model as plan
from deepspeed_acco.tools.plan.model import Cluster, Model, Work
from tests.support.fit_logs import config_of, made

ROOT = Path(__file__).parents[2]
LOGS = Path(__file__).parent / "logs"
RESULTS = ROOT / "benchmarks" / "results"
MODEL, NUMEL, RANKS = Model(10_000_000), 10_000_000, 2
SAID = ("--params", NUMEL, "--ranks", RANKS, "--hosts", 2, "--backend", "gloo")


def fit(folder: Path, log: str | Path, *options, expect: int = 0):
    """Runs the command on a log or its text; returns what ``--json`` wrote."""
    path = log
    if isinstance(log, str):
        path = folder / "run.log"
        path.write_text(log)
    out = folder / "fit.json"
    out.unlink(missing_ok=True)
    assert main(["fit", str(path), *map(str, options), "--json", str(out)]) == expect
    return json.loads(out.read_text()) if out.exists() else None


def timers(**ms) -> str:
    return "[Rank 0] time (ms)" + "".join(f" | {name}: {value:.2f}" for name, value in ms.items()) + "\n"


def log_of_steps(step_ms: dict, n: int, steps: int = 10, optimizer: dict | None = None, head: str = "") -> str:
    """What DeepSpeed prints; ``step_ms``: fwd and inner of a micro-batch, reduction and step of the last one."""
    text = ""
    for step in range(steps):
        slow = 5 if step == 0 else 1  # the first step loads and builds
        for index in range(n):
            is_last = index == n - 1
            reduction = step_ms["reduction"] if is_last else step_ms.get("every", 0.0)
            at_step = step_ms["step"] if is_last else 0.02
            if is_last and optimizer:
                text += head + timers(**optimizer)
            text += head + timers(
                fwd_microstep=slow * step_ms["fwd"],
                bwd_microstep=slow * step_ms["inner"] + reduction,
                bwd_inner_microstep=slow * step_ms["inner"],
                bwd_allreduce_microstep=reduction,
                step_microstep=at_step,
            )
        text += head + timers(fwd=n * step_ms["fwd"], bwd=n * step_ms["inner"], bwd_inner=1, bwd_allreduce=1, step=1)
    return text


def of_the_plan(stage: str, micro_batch_s: float, rate: float, n: int = 8, update_s: float = 1e-9):
    """The cluster and the work of a run that goes exactly by the plan, and what a step of it then takes."""
    cluster = Cluster(RANKS, rate, 0.0, "gloo", 2, efficiency=1.0)
    work = Work(micro_batch_s, n, update_s)
    return cluster, work, plan.predict(stage, MODEL, cluster, work).step_s


# ---- what DeepSpeed really printed


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero1_0_16_9"])
def test_the_logs_of_deepspeed_are_read_whole(name):
    log = read_log(LOGS / f"{name}.log")
    text = (LOGS / f"{name}.log").read_text()
    assert log.timer_lines == text.count("time (ms)") - text.count("init_optimizer_state") > 0
    assert [len(step.micro_batches) for step in log.steps] == [4] * 10
    for step in log.steps:
        assert all(set(one) == {"fwd", "bwd", "bwd_inner", "bwd_allreduce", "step"} for one in step.micro_batches)
        assert ("optimizer_allgather" in step.optimizer) == (name[4] in "12")
    assert log.facts["ranks"].value == 2 and log.facts["hosts"].value == 1
    for timer in ("fwd", "bwd", "step"):
        said = [float(after.split()[0]) for after in text.split(f"| {timer}_microstep: ")[1:]]
        assert [one[timer] * 1e3 for step in log.steps for one in step.micro_batches] == pytest.approx(said)


def test_what_0_16_says_of_the_run_is_read():
    log = read_log(LOGS / "zero1_0_16_9.log")
    values = {name: fact.value for name, fact in log.facts.items()}
    assert values == {"ranks": 2, "hosts": 1, "stage": 1, "n": 4, "micro_batch": 8, "device": "cpu"}
    config = config_of(1)
    assert log.config == config | {"optimizer": {"type": "AdamW", "params": {"lr": 0.003}}}  # without what it has taken
    assert len(log.samples_per_s) == 4 and all(rate > 0 for rate in log.samples_per_s)


def test_nothing_but_the_size_has_to_be_said_of_a_log_of_0_16(tmp_path, capsys):
    report = fit(tmp_path, LOGS / "zero1_0_16_9.log", "--params", "30k", "--steps", 1000)
    assert report["stage"] == "zero1" and report["run"]["backend"]["value"] == "gloo"
    assert report["run"]["stage"]["source"] == "the JSON in the log"
    assert "4 lines of throughput" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2"])
def test_the_logs_of_today_give_an_answer(tmp_path, capsys, name):
    options = ("--config", LOGS / f"{name}.json", "--params", "30k", "--backend", "gloo", "--hours", 10)
    report = fit(tmp_path, LOGS / f"{name}.log", *options)
    text = capsys.readouterr().out
    assert report["verdict"]["word"].upper() + ":" in text
    measured = report["measured"]["step_s"]
    assert report["verdict"]["steps"] * measured == pytest.approx(10 * 3600)
    saved = report["verdict"]["saved_hours"]
    assert saved["hours"] == pytest.approx(report["verdict"]["saved_s"] / measured * 10 * 2)
    assert saved["least"] <= saved["hours"] <= saved["most"]


def test_stage_3_needs_the_bandwidth(tmp_path, capsys):
    options = ("--config", LOGS / "zero3.json", "--params", "30k", "--backend", "gloo")
    fit(tmp_path, LOGS / "zero3.log", *options, expect=2)
    assert "--bandwidth" in capsys.readouterr().err
    report = fit(tmp_path, LOGS / "zero3.log", *options, "--bandwidth", "10gbit")
    rows = {row["name"]: row["step_s"] for row in report["rows"]}
    assert rows["zero3"] == pytest.approx(report["measured"]["step_s"])
    assert "inferred" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", range(4))
def test_this_version_of_deepspeed_still_prints_so(tmp_path, stage):
    path = tmp_path / "run.log"
    path.write_text(made(stage, steps=4))
    log = read_log(path)
    assert [len(step.micro_batches) for step in log.steps] == [4] * 4
    assert ("optimizer_allgather" in log.steps[0].optimizer) == (stage in (1, 2))


# ---- made logs, of which the truth is known


@pytest.mark.parametrize("n", [1, 8])
def test_a_run_of_stage_0_by_the_plan_comes_out_as_it_went_in(tmp_path, n):
    cluster, work, step_s = of_the_plan("zero0", 0.15, 36e6, n)
    reduction = plan.all_reduce(cluster, 2 * NUMEL).seconds
    times = {"fwd": 50, "inner": 100, "reduction": reduction * 1e3, "step": NUMEL * 1e-9 * 1e3}
    report = fit(tmp_path, log_of_steps(times, n), *SAID, "--stage", 0)
    assert report["measured"]["step_s"] == pytest.approx(step_s, rel=1e-3)
    (way,) = report["ways"]
    assert way["compute_s"] == pytest.approx(work.compute_s, rel=1e-3)
    assert way["round_s"] == pytest.approx(plan.round_s(MODEL, cluster, work), rel=1e-3)


def test_both_ways_to_read_stage_1_agree_where_it_goes_by_the_plan(tmp_path):
    cluster, work, step_s = of_the_plan("zero1", 0.15, 36e6)
    gather = plan.all_gather(cluster, 2 * NUMEL).seconds * 1e3
    update = NUMEL / RANKS * 1e-9 * 1e3
    optimizer = {"optimizer_allgather": gather, "optimizer_gradients": 0.4 * update, "optimizer_step": 0.6 * update}
    reduction = (step_s - work.compute_s) * 1e3 - gather - update
    times = {"fwd": 50, "inner": 100, "reduction": reduction, "step": gather + update}
    report = fit(tmp_path, log_of_steps(times, 8, optimizer=optimizer), *SAID, "--stage", 1)
    for way in report["ways"]:
        assert way["compute_s"] == pytest.approx(work.compute_s, rel=1e-3)
        assert way["round_s"] == pytest.approx(plan.round_s(MODEL, cluster, work), rel=5e-3)
    assert len(report["ways"]) == 2
    rows = {row["name"]: row["step_s"] for row in report["rows"]}
    for name in ("zero1", "acco", "acco-int4", "local"):
        assert rows[name] == pytest.approx(plan.predict(name, MODEL, cluster, work).step_s, rel=5e-3)
    assert report["verdict"]["word"] == "yes"


def test_stage_2_is_read_from_its_all_gather_and_the_whole_step(tmp_path):
    cluster, work, step_s = of_the_plan("zero2", 0.3, 36e6)
    gather = plan.all_gather(cluster, 2 * NUMEL).seconds * 1e3
    update = NUMEL / RANKS * 1e-9 * 1e3
    reduction = (step_s - work.compute_s) * 1e3 / 8 - (gather + update) / 8
    optimizer = {"optimizer_allgather": gather, "optimizer_gradients": 0.4 * update, "optimizer_step": 0.6 * update}
    times = {"fwd": 100, "inner": 200, "reduction": reduction, "every": reduction, "step": gather + update - 0.14}
    report = fit(tmp_path, log_of_steps(times, 8, optimizer=optimizer), *SAID, "--stage", 2)
    assert [way["compute_s"] for way in report["ways"]] == pytest.approx([work.compute_s] * 2, rel=5e-3)
    assert report["ways"][0]["round_s"] == pytest.approx(plan.round_s(MODEL, cluster, work), rel=5e-3)


def test_a_timer_below_its_last_digit_is_no_network_at_all(tmp_path):
    optimizer = {"optimizer_allgather": 0.0, "optimizer_gradients": 0.0, "optimizer_step": 0.0}
    times = {"fwd": 50, "inner": 100, "reduction": 0.0, "step": 0.0}
    report = fit(tmp_path, log_of_steps(times, 8, optimizer=optimizer), *SAID, "--stage", 1)
    assert report["ways"][0]["round_s"] < 1e-4 and report["verdict"]["word"] == "no"


def throughput(step_s: float, samples: int, lines: int = 6) -> str:
    rate = samples / step_s
    return "".join(
        f"[2026-11-25 10:00:00,000] [INFO] [timer.py:264:stop] epoch=0/micro_step={8 * step}/global_step={step}, "
        f"RunningAvgSamplesPerSec={rate}, CurrSamplesPerSec={rate}, MemAllocated=0.0GB, MaxMemAllocated=0.0GB\n"
        for step in range(3, 3 + lines)
    )


def test_throughput_and_a_bandwidth_are_enough(tmp_path):
    cluster, work, step_s = of_the_plan("zero1", 0.15, 36e6)
    said = (*SAID, "--stage", 1, "--n", 8, "--micro-batch-size", 2)
    fit(tmp_path, throughput(step_s, 32), *said, expect=2)
    report = fit(tmp_path, throughput(step_s, 32), *said, "--bandwidth", "300mbit")
    assert report["measured"]["step_s"] == pytest.approx(step_s)
    assert report["ways"][0]["compute_s"] == pytest.approx(work.compute_s, rel=0.01)


def test_time_that_no_timer_has_counts_as_computation(tmp_path):
    times = {"fwd": 50, "inner": 100, "reduction": 400, "step": 10}
    said = (*SAID, "--stage", 0, "--micro-batch-size", 2)
    without = fit(tmp_path, log_of_steps(times, 8), *said)
    with_it = fit(tmp_path, log_of_steps(times, 8) + throughput(2.0, 32), *said)
    assert with_it["measured"]["step_s"] == pytest.approx(2.0)
    more_s = 2.0 - without["measured"]["step_s"]
    assert with_it["ways"][0]["compute_s"] - without["ways"][0]["compute_s"] == pytest.approx(more_s)


def test_evaluations_and_bars_in_between_change_nothing(tmp_path):
    times = {"fwd": 50, "inner": 100, "reduction": 400, "step": 10}
    plain = fit(tmp_path, log_of_steps(times, 8), *SAID, "--stage", 0)
    lines = log_of_steps(times, 8).splitlines()
    lines[40] = lines[40].replace("fwd_microstep: 50.00", "fwd_microstep: 5000.00")  # before it there was an evaluation
    text = "\n".join(f" 17%|x | 64/384 [00:00<00:00]\r{line}" for line in lines)
    other = fit(tmp_path, text, *SAID, "--stage", 0)
    assert other["log"]["whole_steps"] == plain["log"]["whole_steps"] == 10
    assert other["verdict"]["step_s"] == pytest.approx(plain["verdict"]["step_s"], rel=0.01)


def test_older_names_and_a_beginning_that_is_cut_off(tmp_path):
    times = {"fwd": 50, "inner": 100, "reduction": 400, "step": 10}
    text = log_of_steps(times, 8, head="[2023-01-01 10:00:00,000] [INFO] [logging.py:69:log_dist] ")
    new = fit(tmp_path, text, *SAID, "--stage", 0)
    old = text.replace("fwd", "forward").replace("bwd", "backward").replace("[Rank 0]", "[Rank 0] rank=0")
    cut = "".join(old.splitlines(keepends=True)[5:])
    report = fit(tmp_path, cut, *SAID, "--stage", 0)
    assert report["log"]["whole_steps"] == 10 and report["measured"]["steps"] == 7
    assert report["verdict"]["step_s"] == pytest.approx(new["verdict"]["step_s"])


# ---- the answer


def test_yes_no_and_too_close(tmp_path, capsys):
    def word(reduction: float, *options) -> str:
        times = {"fwd": 50, "inner": 100, "reduction": reduction, "step": 0.1}
        return fit(tmp_path, log_of_steps(times, 8), *SAID, "--stage", 0, *options)["verdict"]["word"]

    assert word(550) == "yes"
    assert 'Set {"schedule": "acco", "estimate_fraction": 0.' in " ".join(capsys.readouterr().out.split())
    assert word(90) == "too close to call"
    assert "ds_acco compare" in capsys.readouterr().out
    assert word(5) == "no"
    assert "nothing to win" in capsys.readouterr().out
    assert word(550, "--device-memory", "100MB") == "no"
    assert "GiB of 0.0931" in capsys.readouterr().out


def test_halves_that_differ_make_it_too_close(tmp_path):
    def report(second: float) -> dict:
        halves = [{"fwd": fwd, "inner": 2 * fwd, "reduction": 400, "step": 0.1} for fwd in (50, second)]
        return fit(tmp_path, "".join(log_of_steps(half, 8) for half in halves), *SAID, "--stage", 0)

    assert report(50)["verdict"]["word"] == "yes"
    assert report(65)["verdict"]["word"] == "too close to call"


def test_another_stage_that_would_do_is_named(tmp_path, capsys):
    """Stage 1 with a slow reduction of its own: by its all-gather hardly anything is to be hidden."""
    optimizer = {"optimizer_allgather": 0.5, "optimizer_gradients": 0.1, "optimizer_step": 1.0}
    times = {"fwd": 50, "inner": 100, "reduction": 300, "step": 2.0}
    report = fit(tmp_path, log_of_steps(times, 8, optimizer=optimizer), *SAID, "--stage", 1)
    assert report["verdict"]["word"] == "no"
    assert "alone would do" in capsys.readouterr().out


def test_the_plan_that_the_page_names_says_the_same(tmp_path, capsys):
    times = {"fwd": 50, "inner": 100, "reduction": 550, "step": 10}
    report = fit(tmp_path, log_of_steps(times, 8), *SAID, "--stage", 0)
    text = " ".join(capsys.readouterr().out.split())
    words = text.split("`ds_acco ")[1].split("`")[0].split()
    assert main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    rows = {row["name"]: row["step_s"] for row in json.loads((tmp_path / "plan.json").read_text())["rows"]}
    for row in report["rows"]:
        if row["name"] != report["verdict"]["mode"]:
            assert rows[row["name"]] == pytest.approx(row["step_s"], rel=1e-3)


# ---- runs whose ACCO step is known

PAPER = ROOT / "docs" / "how-to" / "is-it-for-me.md"
KNOWN_RUNS = re.findall(
    r"^\| (two_hosts_\w+) \| 2 x (\d) \| (zero\d), (timers|throughput) "
    r"\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| (\S+) % \|$",
    PAPER.read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=" ".join(row), marks=pytest.mark.full if number % 4 else ())
        for number, row in enumerate(KNOWN_RUNS)
    ],
)
def test_runs_on_two_shaped_hosts_are_as_far_off_as_the_paper_says(tmp_path, row):
    name, in_host, stage, kind, mode, *figures = row
    results = json.loads((RESULTS / f"{name}.json").read_text())
    n, ranks, numel = results["n"], results["world_size"], results["model"]["numel"]
    step_s = {config["name"].replace("_", "-"): config["step_s"]["median"] for config in results["configs"]}
    assert ranks == 2 * int(in_host)
    said = ["--params", numel, "--ranks", ranks, "--hosts", 2, "--backend", "gloo", "--stage", stage[-1]]
    if kind == "timers":
        micro_ms = results["reference"]["compute_s"] / n * 1e3
        update_ms = numel * 1e-6
        reduction = (step_s[stage] - results["reference"]["compute_s"]) * 1e3 - update_ms
        log = log_of_steps(
            {"fwd": micro_ms / 3, "inner": micro_ms * 2 / 3, "reduction": reduction, "step": update_ms}, n
        )
    else:
        log = throughput(step_s[stage], results["samples_per_step"])
        said += ["--n", n, "--micro-batch-size", results["samples_per_step"] // n // ranks]
        said += ["--bandwidth", results["network"].rsplit(" ", 1)[-1]]
    report = fit(tmp_path, log, *said)
    predicted = {row["name"]: row["step_s"] for row in report["rows"]}[mode]
    off = 100 * (predicted / step_s[mode] - 1)
    assert [f"{step_s[mode]:.3f}", f"{predicted:.3f}", f"{off:+.1f}"] == figures
    assert report["verdict"]["word"] != "no", "ACCO was faster in every one of them"


def test_the_paper_has_runs():
    assert len(KNOWN_RUNS) == 14


# ---- bad input


@pytest.mark.parametrize(
    "text, options, said",
    [
        ("", (), "no step's time in 0 lines"),
        ("epoch 1 loss 2.3\n" * 9, (), "wall_clock_breakdown"),
        ("\x00\x01\x02" * 50, (), "no step's time"),
        (timers(fwd_microstep=1, bwd_microstep=1) * 3, (), "though 3 lines of timers"),
        (log_of_steps({"fwd": 5, "inner": 9, "reduction": 4, "step": 1}, 4, steps=2), ("--stage", 0), "2 whole steps"),
        (log_of_steps({"fwd": 0, "inner": 0, "reduction": 0, "step": 0}, 1), ("--stage", 0), "no time at all"),
        (
            log_of_steps({"fwd": 5, "inner": 9, "reduction": 4, "step": 1}, 4),
            (),
            "the ZeRO stage (--config, or --stage)",
        ),
        (
            log_of_steps({"fwd": 5, "inner": 9, "reduction": 4, "step": 1}, 4),
            ("--stage", 0, "--n", 8),
            "n is 8 by --n, but the steps of the log have 4 micro-batches",
        ),
        (
            log_of_steps({"fwd": 5, "inner": 9, "reduction": 4, "step": 1}, 4),
            ("--stage", 1),
            "no timer optimizer_allgather",
        ),
        (log_of_steps({"fwd": 5, "inner": 9, "reduction": 4, "step": 1}, 4), ("--ranks", 1, "--stage", 0), "one rank"),
        (log_of_steps({"fwd": 5, "inner": 9, "reduction": 4, "step": 1}, 4), ("--hosts", 3, "--stage", 0), "3 hosts"),
        (
            throughput(1e-3, 32),
            ("--stage", 1, "--n", 8, "--micro-batch-size", 2, "--bandwidth", "1mbit"),
            "are predicted to take",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(tmp_path, capsys, text, options, said):
    assert fit(tmp_path, text, *SAID, *options, expect=2) is None
    error = capsys.readouterr().err
    assert error.startswith("ds_acco fit: ") and said in error and error.count("\n") == 1


AUTOTP = {"tensor_parallel": {"autotp_size": 2}}


def test_a_config_that_is_no_plain_zero_is_refused(tmp_path, capsys):
    text = log_of_steps({"fwd": 5, "inner": 9, "reduction": 4, "step": 1}, 4)
    fit(tmp_path, text, *SAID, "--config", ROOT / "ds_configs" / "acco.json", expect=2)
    assert '"type": "ACCO"' in capsys.readouterr().err
    (cut := tmp_path / "cut.json").write_text(json.dumps({"zero_optimization": {"stage": 1}} | AUTOTP))
    fit(tmp_path, text, *SAID, "--config", cut, expect=2)
    assert "tensor_parallel.autotp_size = 2; allowed: data parallelism alone" in capsys.readouterr().err
    fit(tmp_path, text, *SAID, "--config", ROOT / "ds_configs" / "none.json", expect=2)
    assert "is not a file" in capsys.readouterr().err
    fit(tmp_path, tmp_path, *SAID, expect=2)
    assert "is not a file" in capsys.readouterr().err


def test_steps_and_hours_exclude_each_other_and_none_of_them_is_zero(tmp_path):
    for words in (["--steps", "0"], ["--hours", "0"], ["--steps", "5", "--hours", "5"]):
        with pytest.raises(SystemExit) as ended:
            main(["fit", str(tmp_path / "run.log"), *words])
        assert ended.value.code == 2


def test_values_that_a_trainer_fills_in_are_asked_for(tmp_path, capsys):
    text = log_of_steps({"fwd": 50, "inner": 100, "reduction": 400, "step": 1}, 4)
    report = fit(tmp_path, text, *SAID, "--config", ROOT / "ds_configs" / "zero1_auto.json", "--stage", 0)
    assert report["run"]["n"] == {"value": 4, "source": "lines of a step"}
    hf = "***** Running training *****\n  Number of trainable parameters = 124,439,808\n"
    words = ("--ranks", 2, "--hosts", 2, "--backend", "gloo", "--stage", 0)
    assert fit(tmp_path, hf + text, *words)["run"]["params"]["value"] == 124_439_808
