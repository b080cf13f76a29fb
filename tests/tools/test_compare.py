# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""``ds_acco compare`` without a process: its figures against hand-made truths, its order, resuming, and its errors."""

import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest

import deepspeed_acco
from deepspeed_acco.algorithm.schedules import SCHEDULES
from deepspeed_acco.engine.recorder_format import RECORD_RUN, RankHeader, RankStep
from deepspeed_acco.tools import cli
from deepspeed_acco.tools.check.reading import batch_of
from deepspeed_acco.tools.compare import configs, folder, measure, runs
from deepspeed_acco.tools.compare import options as comparison
from deepspeed_acco.tools.compare.results import Interval, LossInterval, Point, Reference, read_results, write_results
from deepspeed_acco.tools.compare.verdict import verdict
from deepspeed_acco.tools.launch import launcher as launches
from deepspeed_acco.tools.launch import shaped_hosts as hosts
from deepspeed_acco.tools.rank_files import RankFile
from deepspeed_acco.tools.typed_json import written

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"


# ---- statistics


def test_the_interval_of_one_pass_is_that_of_a_median():
    values = numpy.random.default_rng(3).normal(10.0, 1.0, 900)
    found = measure.median_of_passes([values])
    assert found.median == numpy.median(values)
    # The median of m normal values has a standard error of sqrt(pi / 2) sigma / sqrt(m).
    expected = 2 * 1.96 * math.sqrt(math.pi / 2) / math.sqrt(900)
    assert found.high - found.low == pytest.approx(expected, rel=0.2)
    assert found.low < found.median < found.high
    assert measure.median_of_passes([values]) == found, "seeded"


def test_the_interval_of_passes_without_noise_is_their_range():
    found = measure.median_of_passes([numpy.full(9, value) for value in (1.0, 7.0, 2.0)])
    assert found == Interval(median=2.0, low=1.0, high=7.0)  # 7 of 27 draws have a median of 1, as many of 7


def test_a_drift_from_pass_to_pass_cancels_in_the_ratio():
    random = numpy.random.default_rng(4)
    drift = (1.0, 3.0, 10.0)
    slow = [factor * random.normal(1.3, 0.001, 50) for factor in drift]
    fast = [factor * random.normal(1.0, 0.001, 50) for factor in drift]
    found = measure.ratio_of_passes(slow, fast)
    assert found.median == pytest.approx(1.3, abs=1e-3)
    assert found.high - found.low < 3e-3


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "no difference shown"), (1.2, "faster"), (0.8, "slower")])
def test_verdicts_over_many_comparisons(factor, expected):
    random = numpy.random.default_rng(5)
    found = []
    for _ in range(60):
        passes = random.normal(1.0, 0.02, (2, 6, 1))  # what a run has of its own
        slow, fast = passes + random.normal(0.0, 0.05, (2, 6, 20))
        found.append(measure.verdict_of(measure.ratio_of_passes(list(factor * slow), list(fast))))
    assert found.count(expected) >= 54


@pytest.mark.parametrize(
    ("schedule", "round_s", "a", "expected"),
    [
        ("acco", 0.5, 2, 2.0),  # A = 0.5, B = 1.5
        ("acco", 0.8, 2, 2.3),
        ("acco", 2.5, 4, 5.0),
        ("wp", 0.8, None, 2.0),
        ("dpu", 2.5, None, 2.5),
        ("sync", 0.8, None, 2.8),
        (None, 0.8, None, None),
    ],
)
def test_bounds(schedule, round_s, a, expected):
    assert measure.bound_s(schedule, 2.0, round_s, 8, a) == (expected and pytest.approx(expected))


# ---- from records to figures


def header(schedule, rank=0, **other):
    row = SCHEDULES.get(schedule)
    described = {
        "rank": rank,
        "world_size": 2,
        "optimizer": "ACCO" if schedule else "AdamW",
        "schedule": schedule,
        "stage": 1,
        "numel": 100,
        "weight_bytes": 2,
        "comm_bytes": 2,
        "n": 4,
        "a": 2 if row and row.has_two_phases else None,
        "micro_batch": 8,
        "samples_per_step": 64,
        "device": "cpu",
        "torch": "2",
        "deepspeed": "0.19",
    }
    return RankHeader(**(described | other))


def step(number, step_s, inside_s, round_s=None, exposed_s=None, peak_bytes=1000, looked=False, **other):
    return RankStep(
        step=number,
        step_s=None if number == 1 else step_s,
        inside_s=inside_s,
        round_s=round_s,
        exposed_s=exposed_s,
        rounds=None if round_s is None else 1 + (other.get("estimate_s") is not None),
        peak_bytes=peak_bytes,
        looked=looked,
        **other,
    )


def test_a_run_from_its_records():
    first = [step(1, 0, 1, 1, 1, 9999), step(2, 50, 1, 1, 1, 9999), step(3, 4.0, 1.0, 0.5, 0.1)]
    first += [step(4, 99, 1, 1, 1, looked=True), step(5, 6.0, 1.0, 0.7, 0.3, 1500), step(6, 5.0, 1, 1, 1)]
    second = [step(1, 0, 1, 1, 1), step(2, 50, 1, 1, 1), step(3, 5.0, 1.5, 0.9, 0.3)]
    second += [step(4, 99, 1, 1, 1), step(5, 7.0, 1.5, 1.1, 0.5, 1200), step(6, 5.0, 1, 1, 1, looked=True)]
    records = [RankFile(header("sync", rank), steps) for rank, steps in enumerate((first, second))]
    run = measure.summarize_run(2, "runs/x/2", records, [])
    assert run.steps == 6 and run.step_s.tolist() == [4.5, 6.5]  # steps 3 and 5
    assert run.exposed_s.tolist() == pytest.approx([0.2, 0.4]) and run.round_s.tolist() == pytest.approx([0.7, 0.9])
    assert run.compute_s == pytest.approx(4.5)  # the second rank's: 3.5 and 5.5
    assert run.fastest_round_s == pytest.approx(0.6)  # the first rank's: 0.5 and 0.7
    assert run.peak_bytes == [1500, 1200]


def test_what_an_adaptive_run_computed():
    estimates, sent = (None, None, 1.0, None, 5.0, 3.0), (None, None, 100, 200, 300, 300)
    first = [
        step(i, 4.0, 2.0, 1.0, 0.5, samples=samples, estimate_s=estimate_s, sent_bytes=sent_bytes)
        for i, (samples, estimate_s, sent_bytes) in enumerate(zip((8, 8, 32, 40, 0, 48), estimates, sent), 1)
    ]
    second = [
        step(i, 4.0, 1.0, 1.0, 0.5, samples=samples, estimate_s=2.5, sent_bytes=100)
        for i, samples in enumerate((8, 16, 32, 80, 0, 16), 1)
    ]
    records = [RankFile(header("acco", rank), steps) for rank, steps in enumerate((first, second))]
    run = measure.summarize_run(1, "", records, [])
    assert run.batch == [16, 24, 64, 120, 0, 64]
    assert run.samples.tolist() == [64, 120, 64], "the fifth step, in which nothing was computed, is not timed"
    assert run.samples_per_s_alone == pytest.approx(4 * 8 / 2.0 + 4 * 8 / 3.0)
    assert run.estimate_s == 2.0  # the first rank's, of 1 and 3; the second has 2.5
    assert run.sent_bytes == pytest.approx(150)  # means over the ranks: 100, 150, 200
    fixed = measure.summarize_run(1, "", [RankFile(header("acco"), [step(i, 4.0, 2.0, 1, 0) for i in range(5)])], [])
    assert fixed.batch is None and fixed.samples.tolist() == [64, 64, 64]
    assert (
        fixed.estimate_s is None
        and fixed.commit_s == 1.0
        and fixed.sent_bytes is None
        and fixed.interface_bytes is None
    )


def test_a_commit_is_what_an_estimate_leaves_of_the_rounds():
    """Where a line has one of each kind, or a COMMIT alone; the second rank waits for the first."""
    lines = [(1, 3.0, None), (2, 5.0, 4.0), (2, 1.5, 0.25), (1, 1.0, None), (3, 9.0, 1.0), (0, 0.0, None)]

    def steps(waits_s):
        of_a_line = [(number, rounds, round_s, own) for number, (rounds, round_s, own) in enumerate(lines, 1)]
        return [
            replace(step(number, 4.0, 1.0, round_s + waits_s, 0.5, estimate_s=own), rounds=rounds)
            for number, rounds, round_s, own in of_a_line
        ]

    records = [RankFile(header("acco", rank), steps(waits_s)) for rank, waits_s in enumerate((0.0, 0.5))]
    assert measure.summarize_run(1, "", records, []).commit_s == pytest.approx(1.125)  # of 1.25 and 1


def test_what_a_host_sent():
    """Its first rank tells it; the other two hosts' steps are 100 and 400, 300 and 200, 500 and 600."""
    of_hosts = ((9, 9, 100, 300, 500), (9, 9, 400, 200, 600))
    told = [line for of_host in of_hosts for line in (of_host, (None,) * 5)]
    ranks = [
        RankFile(
            header("acco", rank), [step(i, 4.0, 2.0, 1, 0, interface_bytes=sent) for i, sent in enumerate(line, 1)]
        )
        for rank, line in enumerate(told)
    ]
    assert measure.summarize_run(1, "", ranks, []).interface_bytes == 250  # of 250, 250, 550


def test_too_few_steps_are_explained():
    records = [RankFile(header(None), [step(1, 1, 1), step(2, 1, 1), step(3, 1, 1, looked=True)])]
    with pytest.raises(ValueError, match="none of the 3 steps can be timed.*Train for more steps"):
        measure.summarize_run(1, "", records, [])


# C = 2 s, R = 0.5 s
TIMES = {"sync": (2.5, 0.5, 0.5), "acco": (2.02, 0.02, 0.015), "dpu": (2.02, 0.01, 0.005), None: (2.5, 0.5, None)}
CURVE = [Point(step=11, samples=704, seconds=20.0, val_loss=2.0, loss=2.1)]


def made_run(schedule, number, scale=1.0, curve=(), times=None, lines=None, round_s=0.5, **other):
    step_s, inside_s, exposed_s = TIMES[times or schedule]
    round_s = None if schedule is None else round_s
    steps = [
        step(i, scale * (step_s + 1e-3 * (i % 3)), inside_s, round_s, exposed_s, **(lines or {})) for i in range(1, 12)
    ]
    ranks = [RankFile(header(schedule, rank, **other), steps) for rank in (0, 1)]
    return measure.summarize_run(number, f"runs/{schedule}/{number}", ranks, list(curve))


def made_results(finished, failed=None, emulated_ms=None):
    """Of the finished runs by name; those of ``reference`` are of a derived JSON."""
    names = [name for name in finished if name != "reference"]
    asked = comparison.Comparison(
        configs={name: {} for name in names},
        files={name: f"{name}.json" for name in names},
        script=["train.py"],
        arguments=[],
        passes=2,
        world_size=2,
        slots=2,
        network="this machine",
        hosts=None,
        rate=None,
        hostfile=None,
        emulated_ms=emulated_ms,
        tokens_per_sample=None,
    )
    return measure.results_of(asked, finished, failed or {})


def usual_results(acco_scale=1.0, emulated_ms=None, failed=None):
    finished = {
        "acco": [made_run("acco", 1, acco_scale, CURVE), made_run("acco", 2, acco_scale, CURVE)],
        "zero1": [made_run(None, 1, 1.0, CURVE), made_run(None, 2, 1.0, CURVE)],
        "reference": [made_run("sync", 1), made_run("sync", 2)],
    }
    return made_results(finished, failed, emulated_ms)


def with_round(run, round_s):
    return replace(run, fastest_round_s=round_s)


def test_the_results_of_known_times(tmp_path):
    found = usual_results()
    assert found.reference.compute_s == pytest.approx(2.0, abs=2e-3)
    assert found.reference.round_s == 0.5
    assert found.reference.micro_batch_s == pytest.approx(0.5, abs=1e-3)
    acco, zero1 = found.configs
    assert acco.bound_s == pytest.approx(2.0, abs=2e-3) and zero1.bound_s is None
    assert acco.of_bound == pytest.approx(1.01, abs=2e-3)
    assert acco.split.exposed_s == 0.015 and acco.split.overhead_s == pytest.approx(0.005, abs=2e-3)
    assert zero1.split.exposed_s == pytest.approx(0.5, abs=2e-3) and zero1.split.note
    assert acco.hidden_share == pytest.approx(0.97) and zero1.hidden_share is None
    assert zero1.idle_share == pytest.approx(0.2, abs=1e-3)
    assert acco.peak_bytes == [1000, 1000]
    assert acco.final_val_loss == LossInterval(median=2.0, low=2.0, high=2.0)
    (ratio,), (manager,) = found.ratios, found.manager
    assert ratio.verdict == "faster" and ratio.speedup.median == pytest.approx(2.5 / 2.02, abs=1e-3)
    assert manager.saved_share == pytest.approx(1 - 2.02 / 2.5, abs=1e-3)
    assert manager.saved_hours_per_1000_accelerator_hours == pytest.approx(192, abs=1)
    text = " ".join(found.verdict)
    assert "sent by a host" not in text
    for words in (
        "2.021 s a step against 2.501 s, 1.238 times as fast",
        "R = 0.250 C",
        "acco is faster than zero1",
        "saves 19.2 % of the time: 192 of every 1000",
        "97.0 % of acco's",
        "that of zero1 2.0000 (+0.00 %, one seed: all passes run the same command)",
    ):
        assert words in text, words
    assert "Why" not in text and "2 passes" in text
    path = tmp_path / "results.json"
    write_results(path, found)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN
    assert read_results(path) == found


def test_a_new_row_of_schedules_has_its_bound_and_its_words(monkeypatch):
    """An exact copy of acco's row: whoever asks for a name instead of a property leaves it out."""
    monkeypatch.setitem(SCHEDULES, "twin", replace(SCHEDULES["acco"], name="twin"))
    monkeypatch.setitem(SCHEDULES, "wait", replace(SCHEDULES["sync"], name="wait"))
    lines = {"estimate_s": 0.25}
    finished = {
        "mine": [made_run("twin", 1, times="acco", lines=lines, estimate_comm="int4")],
        "zero1": [made_run(None, 1)],
        "slow": [made_run("wait", 1, 1.7, times="sync")],
        "reference": [with_round(made_run("sync", 1), 2.0)],
    }
    mine, zero1, slow = made_results(finished).configs
    assert mine.a == 2 and mine.bound_s == pytest.approx(3.0, abs=5e-3)  # max(1, 2) + max(1, 0.25)
    assert slow.bound_s == pytest.approx(4.0, abs=5e-3)
    text = " ".join(made_results(finished).verdict)
    assert "mine is faster than zero1" in text and "acco and twin with two rounds a step only a part" in text
    assert "Why slow is not faster: wait overlaps nothing" in text
    config = {"optimizer": {"type": "ACCO", "params": {"schedule": "wait"}}}
    assert configs.measures_reference(config) and not configs.measures_reference({"optimizer": {"type": "ACCO"}})
    config["optimizer"]["params"]["commit_comm"] = "int8"
    assert not configs.measures_reference(config), "its R is not that of a round in full"


def test_files_of_an_earlier_version_are_read():
    """What was written before these dataclasses were: the same keys and values are written again."""
    for name in ("small", "medium"):
        path = ROOT / "benchmarks" / "results" / f"compare_real_{name}.json"
        before, found = json.loads(path.read_text()), read_results(path)
        assert _known(written(found)) == _known(before)
        assert list(written(found)) == list(before)
        newer = {"interface_bytes", "commit_comm", "commit_s"}
        keys = [key for key in written(found)["configs"][0] if key not in newer]
        assert keys == [key for key in before["configs"][0] if key not in newer]
        assert verdict(found)[0].startswith(before["verdict"][0].split(":")[0])


def _known(value):
    """Without what is null."""
    if isinstance(value, dict):
        return {key: _known(part) for key, part in value.items() if part is not None}
    return [_known(part) for part in value] if isinstance(value, list) else value


def test_an_adaptive_configuration_is_compared_per_sample():
    """Its steps take twice as long as ZeRO-1's and have four times the samples: it is twice as fast."""
    curves = [[Point(step=11, samples=samples, seconds=1.0, val_loss=2.0)] for samples in (2816, 704)]
    adaptive = {"accumulation": "adaptive", "lines": {"samples": 128}}
    times_step = 5.0 / TIMES["acco"][0]
    finished = {
        "many": [made_run("acco", number, times_step, curves[0], **adaptive) for number in (1, 2)],
        "zero1": [made_run(None, number, 1.0, curves[1]) for number in (1, 2)],
        "reference": [made_run("sync", 1)],
    }
    found = made_results(finished)
    many, zero1 = found.configs
    assert (many.samples_per_step, zero1.samples_per_step) == (256, 64)
    assert many.samples_per_s.median == pytest.approx(256 / 5.0, rel=2e-3)
    assert zero1.samples_per_s.median == pytest.approx(64 / 2.5, rel=2e-3)
    assert found.ratios[0].speedup.median == pytest.approx(2.0, rel=2e-3)
    assert found.ratios[0].verdict == "faster"
    assert found.manager[0].saved_share == pytest.approx(0.5, abs=2e-3)
    # The two ranks alone compute 2 x 32 samples in C = 2 s, so these 256 would take them 8 s: made up, it is too fast.
    assert found.reference.samples_per_s_alone == pytest.approx(32.0, rel=2e-3)
    assert many.bound_s == pytest.approx(8.0, rel=5e-3) and many.idle_share == 0
    assert many.runs[0].batch == [256] * 11 and zero1.runs[0].batch is None
    text = " ".join(found.verdict)
    assert "many is faster than zero1" in text and "51.2 samples/s against 25.6, 2.000 times as fast" in text
    assert "a median step has 256 samples, nominal are 64" in text and "500 of every 1000" in text
    assert "after 2,816 samples and 704: at equal tokens only the curves" in text


def test_the_bound_with_a_quantized_estimate():
    """R = 2 s where C = 2 s; the ESTIMATE takes 0.25 s: max(1, 2) + max(1, 0.25) s, not 4 s."""
    lines = {"estimate_s": 0.25, "sent_bytes": 3_000_000, "interface_bytes": 6_250_000}
    for estimate_comm, expected in (("int4", 3.0), ("full", 4.0), (None, 4.0)):
        finished = {
            "mine": [made_run("acco", 1, 1.5, lines=lines, estimate_comm=estimate_comm)],
            "zero1": [made_run(None, 1, lines={"interface_bytes": 2_000_000})],
            "zero3": [made_run(None, 1)],
            "reference": [with_round(made_run("sync", 1), 2.0)],
        }
        found = made_results(finished, emulated_ms=1.0)
        assert found.configs[0].bound_s == pytest.approx(expected, abs=5e-3)
        assert (found.configs[0].sent_bytes, found.configs[1].sent_bytes) == (3_000_000, None)
        assert [config.interface_bytes for config in found.configs] == [6_250_000, 2_000_000, None]
        said = "MB sent by a host in a step, with all headers: 6.2 with mine and 2.0 with zero1."
        assert found.verdict[-2] == said, "before the number of passes"
        assert ("ESTIMATE (int4) takes 0.250 s" in " ".join(found.verdict)) == (estimate_comm == "int4")


def test_the_bound_with_a_quantized_commit(tmp_path):
    """R = 2 s where C = 2 s; the COMMIT takes 0.5 s of its own, beside an ESTIMATE of 0.25 s: all is hidden."""
    for commit_comm, with_estimate, waiting in (("int8", 2.0, 2.5), ("full", 3.0, 4.0), (None, 3.0, 4.0)):
        lines = {"estimate_s": 0.25}
        finished = {
            "mine": [
                made_run("acco", 1, 1.5, lines=lines, round_s=0.75, estimate_comm="int4", commit_comm=commit_comm)
            ],
            "blocks": [made_run("sync", 1, 1.5, commit_comm=commit_comm)],
            "zero1": [made_run(None, 1)],
            "reference": [with_round(made_run("sync", 1), 2.0)],
        }
        found = made_results(finished)
        assert [config.bound_s for config in found.configs[:2]] == pytest.approx([with_estimate, waiting], abs=5e-3)
        assert [config.commit_s for config in found.configs] == [0.5, 0.5, None]
        assert ("mine's COMMIT (int8) takes 0.500 s" in " ".join(found.verdict)) == (commit_comm == "int8")
        write_results(tmp_path / "results.json", found)
        assert read_results(tmp_path / "results.json") == found


def test_the_verdict_says_when_acco_loses_and_why():
    found = usual_results(acco_scale=1.5)
    assert found.ratios[0].verdict == "slower"
    text = " ".join(found.verdict)
    assert "acco is slower than zero1" in text and "Why acco is not faster" in text
    assert "shares the cores with the computation" in text and "saves" not in text
    assert "shares the cores" not in " ".join(usual_results(1.5, emulated_ms=1.0).verdict)
    faster = " ".join(usual_results(acco_scale=1.15).verdict)
    assert "acco is faster than zero1" in faster and "Why acco is not faster still: " in faster


def test_the_verdict_says_when_communication_is_too_long_for_acco():
    finished = {
        "acco": [made_run("acco", 1, 3.0)],
        "zero1": [made_run(None, 1)],
        "reference": [with_round(made_run("sync", 1), 2.5)],
    }
    text = " ".join(made_results(finished, emulated_ms=1.0).verdict)
    assert "Communication takes longer than computation" in text
    assert "even its bound of 5.000 s is no shorter than a step of zero1" in text
    assert "losses are not" in text


def test_a_training_that_diverged_has_no_quality(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 11, "samples": 704, "val_loss": NaN, "loss": Infinity}\n')
    curve = measure.read_curve(tmp_path)
    assert curve == [Point(step=11, samples=704)]
    finished = {
        "acco": [made_run("acco", 1, 1.0, curve)],
        "zero1": [made_run(None, 1, 1.0, CURVE)],
        "reference": [made_run("sync", 1)],
    }
    found = made_results(finished)
    assert found.configs[0].final_val_loss is None
    assert "Nothing is said of the quality of acco: its last validation loss is not known." in found.verdict


def test_a_failed_configuration_and_a_failed_reference_are_said():
    found = usual_results(failed={"acco": "it broke", "reference": "no sync"})
    assert found.configs[0].failed == "it broke" and found.configs[0].step_s is None
    assert not found.ratios and not found.manager
    assert found.reference == Reference(failed="no sync")
    assert found.configs[1].step_s and found.configs[1].split is None
    text = " ".join(found.verdict)
    assert "acco failed: it broke." in text and "reference (schedule sync) failed: no sync." in text


def test_the_options_need_no_heavy_package():
    """`ds_acco --help` asks these modules; the package itself stands for what registers with DeepSpeed."""
    code = """
import sys, types
package = sys.modules["deepspeed_acco"] = types.ModuleType("deepspeed_acco")
package.__path__ = [sys.argv[1]]
import deepspeed_acco.tools.compare.command, deepspeed_acco.tools.plan.command, deepspeed_acco.tools.report.command
heavy = {"torch", "deepspeed", "numpy", "matplotlib", "jinja2", "tqdm", "psutil"} & set(sys.modules)
assert not heavy, heavy
"""
    package = str(Path(deepspeed_acco.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- order and JSONs


def test_the_order_turns_round():
    assert runs.order("abc", 3) == [*zip((1, 1, 1), "abc"), *zip((2, 2, 2), "cba"), *zip((3, 3, 3), "abc")]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, (4, 4)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 8}, (2, 8)),
        ({"train_batch_size": 32}, (16, 1)),
        ({"train_micro_batch_size_per_gpu": 3}, (3, 1)),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5}, (3, 5)),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": 2}, (None, 2)),
    ],
)
def test_the_batch_by_deepspeeds_rules(config, expected):
    assert batch_of(config, 2) == expected


@pytest.mark.parametrize("name", ["acco", "zero3", "acco_bf16", "acco_adaptive"])
def test_the_reference_is_the_first_configs_training_by_sync(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    derived = configs.reference_of(name, config)
    expected = json.loads((CONFIGS / "sync.json").read_text())
    if "bf16" in config:
        expected["bf16"] = config["bf16"]
    assert derived == expected and configs.measures_reference(derived) and not configs.measures_reference(config)


# ---- the command, with runs that are only written


class FakeRuns:
    """Stands in for launches.run: writes what the ranks would have written."""

    def __init__(self):
        self.seen = []
        self.stop_at = None

    def __call__(self, script, arguments, folder, place, watch=None, environment=None):
        if len(self.seen) == self.stop_at:
            (folder / "rank0.jsonl").write_text("half")
            raise KeyboardInterrupt
        self.seen.append(f"{folder.parent.name}/{folder.name}")
        config = json.loads(Path(arguments[arguments.index("--deepspeed_config") + 1]).read_text())
        (folder / launches.LOG).write_text("many lines\nValueError: no such thing\n")
        if config.get("broken"):
            return 3
        schedule = config["optimizer"]["params"].get("schedule")
        step_s, inside_s, exposed_s = TIMES[schedule]
        for rank in (0, 1):
            lines = [header(schedule, rank, run=(environment or {})[RECORD_RUN])]
            lines += [step(i, step_s, inside_s, schedule and 0.5, exposed_s) for i in range(1, 6)]
            (folder / f"rank{rank}.jsonl").write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
        return 0


@pytest.fixture
def fake(monkeypatch):
    """The runs, with a report that is only a name."""
    report = types.ModuleType("deepspeed_acco.tools.report.command")
    report.write = lambda path: Path(path).with_name("report.html")
    monkeypatch.setitem(sys.modules, "deepspeed_acco.tools.report.command", report)
    monkeypatch.setattr(deepspeed_acco, "report", report, raising=False)
    runs = FakeRuns()
    monkeypatch.setattr(launches, "run", runs)
    return runs


def command(out, *configs, passes=2, **other):
    options = [f"--{key}={value}" for key, value in other.items()]
    return ["compare", *map(str, configs), "--num_accelerators=2", f"--passes={passes}", f"--out={out}", *options]


BOTH = (CONFIGS / "acco.json", CONFIGS / "zero1.json")


def test_an_interrupted_comparison_goes_on_where_it_was(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    out = tmp_path / "out"
    fake.stop_at = 2
    assert cli.main(command(out, *BOTH)) == 130
    assert "goes on" in capsys.readouterr().err and not (out / "results.json").exists()
    assert fake.seen == ["reference/1", "acco/1"]
    fake.stop_at = None
    assert cli.main(command(out, *BOTH)) == 0
    assert fake.seen == ["reference/1", "acco/1", "zero1/1", "zero1/2", "acco/2", "reference/2"]
    printed = capsys.readouterr()
    assert "acco is faster than zero1" in printed.out and str(out / "report.html") in printed.out
    assert "[6/6] pass 2 reference" in printed.err and "to go" in printed.err
    results = json.loads((out / "results.json").read_text())
    assert [config["name"] for config in results["configs"]] == ["acco", "zero1"]
    assert results["version"] == 1 and results["passes"] == 2 and results["network"] == "this machine"
    assert results["tokens_per_sample"] == 128 and results["world_size"] == 2 and results["emulated_ms"] is None
    assert [run["pass"] for run in results["configs"][0]["runs"]] == [1, 2]
    assert results["script"] == "examples/train_gpt.py", "as seen from here"
    assert cli.main(command(out, *BOTH)) == 0 and len(fake.seen) == 6, "all was finished"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_is_told(fake, monkeypatch, tmp_path, is_terminal):
    """On a terminal in a line that is written anew; else in lines, one a minute while a run lasts."""
    clock = itertools.count()
    monkeypatch.setattr(runs, "time", types.SimpleNamespace(monotonic=lambda: 5.0 * next(clock)))

    def run(*arguments, watch, **other):
        for _ in range(40):
            watch()
        return fake(*arguments, **other)

    monkeypatch.setattr(launches, "run", run)
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(command(tmp_path / "out", CONFIGS / "sync.json", CONFIGS / "zero1.json", passes=1)) == 0
    told = stream.getvalue()
    assert "[1/2] pass 1 sync: starting | " in told and "[2/2] pass 1 zero1: starting | " in told
    remain = [line.rpartition("\r")[2].strip() for line in told.split("\n")]
    finished = [line for line in remain if "2.500 s a step | " in line]
    assert [line[:19] for line in finished] == ["[1/2] pass 1 sync: ", "[2/2] pass 1 zero1:"]
    assert "about" in finished[0] and "to go" in finished[0] and "to go" not in finished[1]
    shown = told.count("starting")
    if is_terminal:
        assert "\r" in told and not any("starting" in line for line in remain) and remain[-1] == ""
        assert shown > 60, "every second"
    else:
        assert "\r" not in told and all(line.startswith("[") for line in remain if line)
        assert 4 <= shown <= 5.0 * next(clock) / 60, "once a minute"


def test_another_command_for_the_same_folder_names_the_difference(fake, tmp_path, capsys):
    out = tmp_path / "out"
    mine = tmp_path / "acco.json"
    shutil.copy(CONFIGS / "acco.json", mine)
    assert cli.main(command(out, mine, passes=1)) == 0
    count = len(fake.seen)
    changed = json.loads(mine.read_text())
    changed["optimizer"]["params"]["lr"] = 0.5
    for arguments, named in (
        (command(out, mine, passes=2), "passes was 1 and is 2"),
        (command(out, mine, passes=1, seed=4), "arguments[3] was '1' and is '4'"),
        (command(out, mine, CONFIGS / "wp.json", passes=1), "files.wp was None and is"),
        ("rewrite", "configs.acco.optimizer.params.lr was 0.003 and is 0.5"),
    ):
        if arguments == "rewrite":
            mine.write_text(json.dumps(changed))
            arguments = command(out, mine, passes=1)
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert named in error and "Give another --out" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert cli.main(command(tmp_path / "full", mine)) == 2 and "holds no comparison" in capsys.readouterr().err
    assert len(fake.seen) == count


@pytest.mark.parametrize(
    ("options", "ranks", "network"),
    [
        ([], 2, "2 hosts x 1 rank, 200mbit"),
        (["--ranks-per-host", "4"], 8, "2 hosts x 4 ranks, 200mbit"),
        (["--num_accelerators", "4"], 8, "2 hosts x 4 ranks, 200mbit"),
    ],
)
def test_ranks_of_shaped_hosts(monkeypatch, tmp_path, options, ranks, network):
    seen = []

    def prepare(out, asked):
        seen.append(asked)
        raise ValueError("that is enough")

    monkeypatch.setattr(hosts, "why_not", lambda: None)
    monkeypatch.setattr(folder, "prepare", prepare)
    assert cli.main(["compare", *map(str, BOTH), "--hosts", "2", "--rate", "200mbit", *options]) == 2
    (asked,) = seen
    assert (asked.world_size, asked.network) == (ranks, network)
    assert asked.slots == (int(options[1]) if options else None) and comparison.host_count(asked) == 2


def test_a_listed_sync_is_the_reference(fake, tmp_path):
    out = tmp_path / "out"
    assert cli.main(command(out, CONFIGS / "sync.json", CONFIGS / "zero1.json", passes=1)) == 0
    assert fake.seen == ["sync/1", "zero1/1"]
    results = json.loads((out / "results.json").read_text())
    assert results["reference"]["round_s"] == 0.5 and results["configs"][0]["name"] == "sync"


def test_a_failing_configuration_does_not_stop_the_others(fake, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({**json.loads((CONFIGS / "wp.json").read_text()), "broken": True}))
    out = tmp_path / "out"
    assert cli.main(command(out, BOTH[0], broken, BOTH[1])) == 1
    assert fake.seen.count("broken/1") == 1 and "broken/2" not in fake.seen and "zero1/2" in fake.seen
    results = json.loads((out / "results.json").read_text())
    failed = results["configs"][1]["failed"]
    assert "exit code 3" in failed and "log.txt" in failed and "ValueError: no such thing" in failed
    assert results["ratios"][0]["verdict"] == "faster" and "broken failed" in capsys.readouterr().out
    assert cli.main(command(out, BOTH[0], broken, BOTH[1])) == 1
    assert fake.seen.count("broken/1") == 2, "a failed run is tried again"


def test_the_scripts_arguments_are_filled_in(monkeypatch, tmp_path, fake):
    script = tmp_path / "mine.py"
    script.write_text("")
    seen = []

    def run(script, arguments, folder, place, **other):
        seen.append((script, arguments))
        return fake(script, ["--deepspeed_config", arguments[1], *arguments], folder, place, **other)

    monkeypatch.setattr(launches, "run", run)
    given = ["--", "--deepspeed", "{config}", "--logs={out}/logs"]
    assert cli.main([*command(tmp_path / "out", CONFIGS / "sync.json", passes=1), f"--script={script}", *given]) == 0
    config, folder = tmp_path / "out" / "configs" / "sync.json", tmp_path / "out" / "runs" / "sync" / "1"
    assert seen == [([str(script)], ["--deepspeed", str(config), f"--logs={folder}/logs"])]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["script"] == str(script)


def test_the_default_length_is_the_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import argparse

    import text_data

    parser = argparse.ArgumentParser()
    text_data.add_text_arguments(parser)
    assert parser.parse_args([]).seq_len == comparison.EXAMPLE_SEQ_LEN


def changed(tmp_path, **keys):
    path = tmp_path / "_".join(keys) / "other.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**json.loads((CONFIGS / "zero1.json").read_text()), **keys}))
    return path


def test_errors_of_the_user_are_explained(fake, monkeypatch, tmp_path, capsys):
    acco = CONFIGS / "acco.json"
    script = tmp_path / "mine.py"
    script.write_text("")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    twice = tmp_path / "acco.json"
    shutil.copy(acco, twice)
    bare = tmp_path / "bare.json"
    bare.write_text('{"train_batch_size": 8}')
    (tmp_path / "text.json").write_text("no JSON")
    out = tmp_path / "out"
    for arguments, message in (
        (command(out, tmp_path / "no.json"), "no.json is not a file"),
        (command(out, acco, twice), "have the same name, 'acco'"),
        (command(out, tmp_path / "text.json"), "is not JSON"),
        (command(out, bare), "has no optimizer, and the reference"),
        (command(out, acco, changed(tmp_path, gradient_clipping=2.0)), "gradient_clipping is 1 in acco and 2 in"),
        (command(out, acco, changed(tmp_path, bf16={"enabled": True})), "precision (bf16, fp16) is 'fp32' in acco"),
        (command(out, acco, changed(tmp_path, gradient_accumulation_steps=8)), "is 4 in acco and 8 in other"),
        (command(out, acco, changed(tmp_path, train_micro_batch_size_per_gpu=1)), "is 32 in acco and 1 in other"),
        (command(out, acco, seed=-1), "--seed -1 is not allowed; allowed: 0 to 2^63 - 1"),
        (command(out, acco, hosts=2), "--hosts and --rate belong together"),
        (command(out, acco, rate="1gbit"), "--hosts and --rate belong together"),
        (command(out, acco, hosts=2, rate="fast"), "--rate 'fast' is not allowed; allowed: a rate as tc spells it"),
        (command(out, acco, hosts=1, rate="1gbit"), "--hosts 1 is not allowed; allowed: 2 to 99"),
        (command(out, acco, hosts=2, rate="1gbit"), "need root"),
        (command(out, acco, hostfile=tmp_path / "none"), "is not a file; give DeepSpeed's hostfile"),
        (command(out, acco, numel=5), "--numel is the size of the emulated model"),
        (command(out, acco, script=tmp_path / "none.py"), "none.py is not a file"),
        (command(out, acco, script=script, steps=4), "--steps and --seed are the example's"),
        ([*command(out, acco, emulate_compute=5), "--", "--preset", "tiny"], "trains a model of its own"),
    ):
        arguments = [argument.replace("emulate_compute", "emulate-compute") for argument in arguments]
        assert cli.main(arguments) == 2, message
        assert message in capsys.readouterr().err
    for arguments, message in (
        (command(out, acco, passes=0), "argument --passes: '0' is not allowed; allowed: a whole number >= 1"),
        (["compare"], "required: CONFIG"),
        (["compare", str(acco), "--emulate-compute", "soon"], "'soon' is not allowed"),
        (["env", "--", "--fast"], "env takes nothing behind --: --fast"),
        (["compare", str(acco), "--out=--"], "--out=-- is not allowed"),
        (["compare", str(acco), "--\x1b[31m"], "unrecognized arguments: --\ufffd[31m"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not fake.seen and not out.exists()


def odd(tmp_path, change):
    """A JSON of ACCO with a change: a function of its contents, or a text in its place."""
    config = json.loads((CONFIGS / "acco.json").read_text())
    path = tmp_path / "odd.json"
    if callable(change):
        change(config)
        path.write_text(json.dumps(config))
    else:
        path.write_text(change)
    return path


def params(**keys):
    return lambda config: config["optimizer"]["params"].update(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[1]", "it holds [1]; allowed: an object"),
        ('{"a": 1, "a": 2}', "the key 'a' stands 2 times in one object"),
        ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
        ('{"gradient_clipping": 1e999}', "1e999 is too large for a number"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "is nested too deeply"),
        ('{"train_batch_size": 8, "a": ' + "[" * 60 + "]" * 60 + "}", "is nested too deeply; allowed: 50 levels"),
        (lambda c: c.update(optimizer=None), "optimizer = None is not allowed; allowed: an object"),
        (lambda c: c.update(optimizer=[]), "optimizer = [] is not allowed; allowed: an object"),
        (lambda c: c["optimizer"].update(params=[1]), "optimizer.params = [1] is not allowed; allowed: an object"),
        (lambda c: c["optimizer"].update(type="Acco"), "optimizer.type = 'Acco' is not allowed; allowed: \"ACCO\""),
        (lambda c: c["optimizer"].pop("type"), "optimizer.type = None"),
        (lambda c: c["optimizer"].update(type="ACCO "), "optimizer.type = 'ACCO '"),
        (lambda c: c.update(zero_optimization={"stage": 2}), "zero_optimization.stage = 2 is not allowed; allowed: 1."),
        (lambda c: c.update(bf16=True), "bf16 = True is not allowed; allowed: an object"),
        (lambda c: c.update(fp16={"enabled": "x"}), "fp16.enabled = 'x' is not allowed; allowed: true or false"),
        (
            lambda c: c.update(train_batch_size="x"),
            "train_batch_size = 'x' is not allowed; allowed: a whole number >= 1",
        ),
        (
            lambda c: c.update(gradient_accumulation_steps=0),
            "gradient_accumulation_steps = 0 is not allowed; allowed: a whole number",
        ),
        (
            lambda c: c.update(train_batch_size=7),
            "train_batch_size = 7 is not allowed; allowed: train_micro_batch_size_per_gpu x",
        ),
        (lambda c: c.update(gradient_clipping="1"), "gradient_clipping = '1' is not allowed; allowed: a number >= 0"),
        (lambda c: c.update(zero_optimization={"stage": 9}), "zero_optimization.stage = 9 is not allowed"),
        (params(lr="x"), "optimizer.params.lr = 'x' is not allowed; allowed: a number >= 0"),
        (params(schedule="acc"), 'allowed: "auto", "acco", "local"'),
        (params(nonsense=1), "unknown key optimizer.params.nonsense"),
        (params(lr="auto"), "optimizer.params.lr = 'auto' is not allowed; allowed: a number >= 0"),
        (
            lambda c: c.update(bf16={"enabled": "auto"}),
            'bf16.enabled is "auto", which HF Trainer and Accelerate fill in',
        ),
        (lambda c: c["zero_optimization"].update(stages=1), "DeepSpeed refuses it: ValidationError"),
        ((CONFIGS / "acco_auto.json").read_text(), "(and 11 more: ds_acco check "),
    ],
)
def test_odd_jsons_are_refused_before_anything_starts(fake, tmp_path, capsys, change, message):
    path, out = odd(tmp_path, change), tmp_path / "out"
    assert cli.main(command(out, path)) == 2
    error = capsys.readouterr().err
    assert message in error and f"CONFIG {path}" in error and error.count("\n") == 1
    assert not fake.seen and not out.exists()


def test_what_is_left_to_a_trainer_is_compared_with_its_script(fake, tmp_path):
    """The same words are refused where nobody fills them in."""
    script = tmp_path / "trainer.py"
    script.write_text("")
    both = (CONFIGS / "acco_auto.json", CONFIGS / "zero1_auto.json")
    assert cli.main(command(tmp_path / "out", *both, script=script, passes=1)) == 0
    assert fake.seen == ["reference/1", "acco_auto/1", "zero1_auto/1"]


@pytest.mark.parametrize("name", ["a\x1b[31m.json", "a\u202eb.json", "..json"])
def test_names_that_would_steer_a_terminal_or_leave_the_folder(fake, tmp_path, capsys, name):
    shutil.copy(CONFIGS / "acco.json", tmp_path / name)
    assert cli.main(command(tmp_path / "out", tmp_path / name)) == 2
    error = capsys.readouterr().err
    assert "allowed: what can be printed" in error and error.strip().isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-oProxyCommand=id slots=2", "line 1 is '-oProxyCommand=id slots=2'; allowed: a host and its ranks"),
        ("a slots=2\nroot@-x slots=2", "line 2 is 'root@-x slots=2'"),
        ("a slots=2\n\x1b[2J slots=2", r"line 2 is '\x1b[2J slots=2'"),
        ("a slots=99999", "line 1 is 'a slots=99999'; allowed: 1 to 1024 slots"),
        ("a slots=2\na slots=2", "line 2 names a again"),
        ("a", "line 1 is 'a'; allowed"),
        ("# nobody", "it names no host"),
    ],
)
def test_hostfiles_that_are_refused(fake, tmp_path, capsys, text, message):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    arguments = ["compare", str(BOTH[0]), "--hostfile", str(hostfile), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert f"--hostfile {hostfile}: {message}" in capsys.readouterr().err and not fake.seen


def test_hosts_by_name_and_address(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(folder, "prepare", lambda out, asked: seen.append(asked))
    monkeypatch.setattr(runs, "run_all", lambda *_: (_ for _ in ()).throw(RuntimeError("that is enough")))
    hostfile = tmp_path / "hosts"
    hostfile.write_text("worker-1 slots=4\n# spare\n10.0.0.2   slots=2  # old\nme@fe80::1%eth0 slots=2\n")
    assert cli.main(["compare", str(BOTH[0]), "--hostfile", str(hostfile), "--out", str(tmp_path / "out")]) == 1
    assert (seen[0].world_size, seen[0].network) == (8, f"hostfile {hostfile}, 3 hosts")


# ---- two at once, and what a killed one leaves


def test_a_second_comparison_in_the_same_folder_is_refused(fake, monkeypatch, tmp_path, capsys):
    out, second = tmp_path / "out", []

    def run(*arguments, **other):
        if not second:
            second.append(cli.main(command(out, *BOTH)))
            assert f"--out {out} is in use by process {os.getpid()} on " in capsys.readouterr().err
        return fake(*arguments, **other)

    monkeypatch.setattr(launches, "run", run)
    assert cli.main(command(out, *BOTH, passes=1)) == 0
    assert second == [2] and fake.seen == ["reference/1", "acco/1", "zero1/1"], "the first one is not disturbed"
    assert cli.main(command(out, *BOTH, passes=1)) == 0, "it is free again"


def test_what_a_killed_comparison_left_running_is_ended(fake, tmp_path, capsys):
    out = tmp_path / "out"
    environment = {**os.environ, "DEEPSPEED_ACCO_RUN": str(out / "runs" / "acco" / "1")}
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
    assert cli.main(command(out, *BOTH, passes=1)) == 0
    assert f"go on: {left.pid}. They are ended now" in capsys.readouterr().err
    assert left.poll() is not None


GUARDED = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import processes
with processes.guarded(Path(sys.argv[2]), is_elsewhere=False):
    script = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('here', flush=True)"
    command = [sys.executable, "-c", script + "; time.sleep(600)"]
    environment = {"LOCAL_RANK": "0", "DEEPSPEED_ACCO_RUN": sys.argv[2]}
    rank = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE)
    rank.stdout.readline()
    print(rank.pid, flush=True)
    time.sleep(600)
"""


def test_ranks_end_when_who_started_them_is_killed(tmp_path):
    room = Path(launches.__file__).parent
    command = [sys.executable, "-c", GUARDED, str(room), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        rank = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{rank}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_figures_of_another_run_are_not_taken(fake, monkeypatch, tmp_path, capsys):
    """An earlier run's rank on another host wrote the file."""
    out = tmp_path / "out"

    def run(*arguments, environment, **other):
        return fake(*arguments, environment={RECORD_RUN: "an earlier one"}, **other)

    monkeypatch.setattr(launches, "run", run)
    assert cli.main(command(out, *BOTH, passes=1)) == 1
    failed = json.loads((out / "results.json").read_text())["configs"][0]["failed"]
    assert "rank0.jsonl was written by run 'an earlier one', and this is run '" in failed
    monkeypatch.setattr(launches, "run", fake)
    assert cli.main(command(out, *BOTH, passes=1)) == 0
    file = out / "runs" / "acco" / "1" / "rank1.jsonl"
    head, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(head) | {"run": "a later one"}) + "\n" + rest)
    assert cli.main(command(out, *BOTH, passes=1)) == 1
    assert "was written by run 'a later one'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "command.json").write_text("{"), "command.json is damaged: "),
        (lambda out: (out / "command.json").write_text("[1]"), "command.json is damaged: it holds [1]"),
        (lambda out: (out / "runs/acco/1/done.json").write_text(""), "To measure it again remove "),
        (lambda out: (out / "runs/acco/1/rank0.jsonl").write_text(""), "rank0.jsonl is empty"),
        (lambda out: (out / "runs/acco/1/rank0.jsonl").write_text('{"a": 1}'), "there is no key 'rank'"),
        (lambda out: [path.unlink() for path in (out / "runs/acco/1").glob("*[!e].*")], "was not written"),
    ],
)
def test_a_damaged_folder_is_told(fake, tmp_path, capsys, damage, message):
    out = tmp_path / "out"
    assert cli.main(command(out, *BOTH, passes=1)) == 0
    damage(out)
    capsys.readouterr()
    assert cli.main(command(out, *BOTH, passes=1)) == 1 + ("damaged" in message)
    assert message in capsys.readouterr().err


def test_without_a_checkout_the_script_is_asked_for(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison, "EXAMPLE", Path("nowhere.py"))
    assert cli.main(command(tmp_path / "out", *BOTH)) == 2
    assert "--script is missing" in capsys.readouterr().err


def test_what_shaped_hosts_lack_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else name)
    assert hosts.why_not().startswith("tc not found. Install iproute2")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "need Linux" in hosts.why_not()


@pytest.mark.parametrize("rate", ["300mbit", "1gbit", "2.5gbit", "10mbps", "512Kibit"])
def test_rates(rate):
    assert hosts.check_rate(rate) == rate
