# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""From the records of a comparison's runs to its figures: medians with intervals, ratios, and the verdict in words."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from ...algorithm.schedules import SCHEDULES
from ...algorithm.step_time import WARM_UP_STEPS, step_s
from ..launch.launcher import Record

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval
SEED = 20_240_602
PASSES_FOR_95 = 6  # the median of fewer lies outside all of them more often than in 5 % of the cases: 2 * 0.5^passes
CURVE_KEYS = ("step", "samples", "seconds", "val_loss", "loss")
MODEL_KEYS = ("numel", "weight_bytes", "comm_bytes", "accumulation_bytes")
NOTE_OF_STOCK = "all that is not computation: communication, optimizer, overhead"


@dataclass(frozen=True)
class Run:
    """One finished run of one configuration; times in seconds of the timed steps: those after the warm-up into which
    no evaluation or checkpoint fell.

    Attributes:
        number: of the pass, from 1.
        folder: relative to the comparison's.
        header: rank 0's (recorder.py).
        steps: optimizer steps of the whole run.
        step_s: [timed], each the mean over the ranks.
        exposed_s: [timed] likewise, what was waited for rounds; None without ACCO.
        round_s: [timed] likewise, the rounds.
        compute_s: the slowest rank's median time outside the engine's step.
        fastest_round_s: the median round of the rank that waits least for the others; None without ACCO.
        estimate_s: the median ESTIMATE of the rank that waits least for the others; None without any.
        samples: [timed], of all ranks together.
        samples_per_s_alone: what the ranks compute together where nothing communicates, by ``outside`` of the step.
        batch: samples of every step of the run, all ranks together; None with fixed windows, which have one size.
        sent_bytes: what a rank sends in a median step, the mean over the ranks; None where it was not counted.
        peak_bytes: of each rank, after the warm-up.
        curve: the validations, as the script wrote them.
    """

    number: int
    folder: str
    header: dict[str, Any]
    steps: int
    step_s: numpy.ndarray
    exposed_s: numpy.ndarray | None
    round_s: numpy.ndarray | None
    compute_s: float
    fastest_round_s: float | None
    estimate_s: float | None
    samples: numpy.ndarray
    samples_per_s_alone: float
    batch: list[int] | None
    sent_bytes: float | None
    peak_bytes: list[int | None]
    curve: list[dict[str, Any]]


def summarise_run(number: int, folder: str, records: Sequence[Record], curve: list[dict[str, Any]]) -> Run:
    """Raises ValueError when no step is left to be timed."""
    count = min(len(record.steps) for record in records)
    batch = _batch(records, count)
    timed = [
        index
        for index in range(WARM_UP_STEPS, count)
        if all(record.steps[index]["step_s"] is not None and not record.steps[index]["looked"] for record in records)
        and (batch is None or batch[index])
    ]
    if not timed:
        raise ValueError(
            f"none of the {count} steps can be timed: the first {WARM_UP_STEPS} and those with an evaluation or a "
            "checkpoint are left out. Train for more steps"
        )

    def table(key: str) -> numpy.ndarray:
        """[ranks, timed]; NaN where it is not known."""
        return numpy.array([[record.steps[index].get(key) for index in timed] for record in records], dtype=float)

    is_acco = records[0].header["schedule"] is not None
    outside = numpy.median(table("step_s") - table("inside_s"), axis=1)
    samples = numpy.array([records[0].header["samples_per_step"] if batch is None else batch[i] for i in timed])
    own_samples = records[0].header["n"] * records[0].header["micro_batch"]
    last = [[line["peak_bytes"] for line in record.steps[WARM_UP_STEPS:]] for record in records]
    return Run(
        number=number,
        folder=folder,
        header={**records[0].header, "a": records[0].steps[-1].get("a", records[0].header["a"])},
        steps=count,
        step_s=table("step_s").mean(axis=0),
        exposed_s=table("exposed_s").mean(axis=0) if is_acco else None,
        round_s=table("round_s").mean(axis=0) if is_acco else None,
        compute_s=float(outside.max()),
        fastest_round_s=float(numpy.median(table("round_s"), axis=1).min()) if is_acco else None,
        estimate_s=_least_median(table("estimate_s")),
        samples=samples,
        samples_per_s_alone=float((own_samples / numpy.maximum(outside, 1e-9)).sum()),
        batch=batch,
        sent_bytes=_median_of_known(table("sent_bytes").mean(axis=0)),
        peak_bytes=[None if None in peaks else max(peaks) for peaks in last],
        curve=curve,
    )


def _batch(records: Sequence[Record], count: int) -> list[int] | None:
    """The samples of each step, all ranks together; None with fixed windows."""
    own = [[line.get("samples") for line in record.steps[:count]] for record in records]
    if any(None in samples for samples in own):
        return None
    return [sum(of_step) for of_step in zip(*own)]


def _median_of_known(values: numpy.ndarray) -> float | None:
    known = values[~numpy.isnan(values)]
    return float(numpy.median(known)) if len(known) else None


def _least_median(table: numpy.ndarray) -> float | None:
    """Of the rows the smallest median; None where nothing is known."""
    medians = [median for median in map(_median_of_known, table) if median is not None]
    return min(medians, default=None)


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The validations of a run's metrics.jsonl, as examples/train_gpt.py writes it; none without the file."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line.get(key) for key in CURVE_KEYS} for line in lines]


# ---- statistics


def _resampled_medians(passes: Sequence[numpy.ndarray], chosen: numpy.ndarray, random) -> numpy.ndarray:
    """[RESAMPLES, slots]: the median of steps drawn anew from the pass that ``chosen`` names there."""
    medians = numpy.empty(chosen.shape)
    for number, steps in enumerate(passes):
        places = chosen == number
        drawn = random.integers(len(steps), size=(int(places.sum()), len(steps)))
        medians[places] = numpy.median(steps[drawn], axis=1)
    return medians


def _spread(middle: float, resampled: numpy.ndarray) -> dict[str, float]:
    low, high = numpy.percentile(resampled, INTERVAL)
    return {"median": float(middle), "low": float(low), "high": float(high)}


def median_of_passes(passes: Sequence[numpy.ndarray]) -> dict[str, float]:
    """The median of the passes' medians, with a 95 % bootstrap interval: passes are drawn anew with replacement, and
    in each of them its values.

    Args:
        passes: of each pass its values.
    """
    random = numpy.random.default_rng(SEED)
    chosen = random.integers(len(passes), size=(RESAMPLES, len(passes)))
    resampled = numpy.median(_resampled_medians(passes, chosen, random), axis=1)
    return _spread(statistics.median(float(numpy.median(values)) for values in passes), resampled)


def ratio_of_passes(above: Sequence[numpy.ndarray], below: Sequence[numpy.ndarray]) -> dict[str, float]:
    """The median over the passes of median(above) / median(below), both of the same pass, so that what drifts from
    pass to pass cancels; the interval as in :func:`median_of_passes`."""
    random = numpy.random.default_rng(SEED)
    chosen = random.integers(len(above), size=(RESAMPLES, len(above)))
    resampled = _resampled_medians(above, chosen, random) / _resampled_medians(below, chosen, random)
    middle = statistics.median(float(numpy.median(a) / numpy.median(b)) for a, b in zip(above, below))
    return _spread(middle, numpy.median(resampled, axis=1))


def verdict_of(speedup: Mapping[str, float]) -> str:
    """``no difference shown`` when the interval holds 1."""
    if speedup["low"] > 1:
        return "faster"
    return "slower" if speedup["high"] < 1 else "no difference shown"


def bound_s(
    schedule: str | None, compute_s: float, round_s: float, n: int, a: int | None, estimate_s: float | None = None
) -> float | None:
    """The shortest step that a schedule can have: each round beside the computation that it runs behind.

    Args:
        round_s: R, of every round.
        estimate_s: of an ESTIMATE, where it is another one: a quantised one.
    """
    row = SCHEDULES.get(schedule or "")
    if row is None:
        return None
    phase_a_s = compute_s * a / n if a is not None else 0.0
    return step_s(row, phase_a_s, compute_s - phase_a_s, round_s, round_s if estimate_s is None else estimate_s)


# ---- results.json


def summarise(
    files: Mapping[str, str],
    runs: Mapping[str, Sequence[Run]],
    reference: Sequence[Run],
    failed: Mapping[str, str],
    is_emulated: bool,
) -> dict[str, Any]:
    """The part of results.json that comes from the runs.

    Args:
        files: of each configuration the file, as given.
        runs: of each configuration its finished runs, in the order of the passes.
        reference: runs of schedule ``sync``.
        failed: sentences, of configurations that failed and perhaps of ``reference``.
    """
    finished = [run for some in (reference, *runs.values()) for run in some]
    base = _reference(reference, failed.get("reference"))
    configs = [_config(name, files[name], runs[name], base, failed.get(name)) for name in files]
    ratios, manager = _ratios(configs, runs)
    header = finished[0].header if finished else {}
    summary = {
        "world_size": header.get("world_size"),
        "device": header.get("device"),
        "model": {key: header.get(key) for key in MODEL_KEYS},
        "n": header.get("n"),
        "samples_per_step": header.get("samples_per_step"),
        "versions": {key: header.get(key) for key in ("torch", "deepspeed")},
        "reference": base,
        "configs": configs,
        "ratios": ratios,
        "manager": manager,
    }
    summary["verdict"] = verdict(summary, is_emulated)
    return summary


def _reference(runs: Sequence[Run], failed: str | None) -> dict[str, Any]:
    if failed or not runs:
        unknown = dict.fromkeys(("compute_s", "round_s", "micro_batch_s", "samples_per_s_alone"))
        return {**unknown, "failed": failed}
    compute_s = statistics.median(run.compute_s for run in runs)
    round_s = statistics.median(run.fastest_round_s for run in runs)
    return {
        "compute_s": compute_s,
        "round_s": round_s,
        "micro_batch_s": compute_s / runs[0].header["n"],
        # By the median of times, as C is: of two runs it is their mean.
        "samples_per_s_alone": 1 / statistics.median(1 / run.samples_per_s_alone for run in runs),
        "failed": None,
    }


def _config(name: str, file: str, runs: Sequence[Run], base: dict[str, Any], failed: str | None) -> dict[str, Any]:
    header = runs[0].header if runs else {}
    config = {
        "name": name,
        "file": file,
        **{key: header.get(key) for key in ("optimizer", "schedule", "stage", "accumulation", "estimate_comm", "a")},
        "step_s": None,
        "samples_per_step": None,
        "samples_per_s": None,
        "estimate_s": None,
        "sent_bytes": None,
        "bound_s": None,
        "of_bound": None,
        "split": None,
        "hidden_share": None,
        "idle_share": None,
        "peak_bytes": [],
        "failed": failed,
        "runs": [
            {
                "pass": run.number,
                "folder": run.folder,
                "steps": run.steps,
                "timed_steps": len(run.step_s),
                "step_s": float(numpy.median(run.step_s)),
                "curve": run.curve,
                "batch": run.batch,
            }
            for run in runs
        ],
        "final_val_loss": None,
    }
    if failed or not runs:
        return config
    config["step_s"] = median_of_passes([run.step_s for run in runs])
    config["samples_per_step"] = statistics.median(float(numpy.median(run.samples)) for run in runs)
    config["samples_per_s"] = median_of_passes([run.samples / run.step_s for run in runs])
    estimates = [run.estimate_s for run in runs if run.estimate_s is not None]
    config["estimate_s"] = statistics.median(estimates) if estimates else None
    sent = [run.sent_bytes for run in runs if run.sent_bytes is not None]
    config["sent_bytes"] = statistics.median(sent) if sent else None
    peaks = list(zip(*(run.peak_bytes for run in runs)))
    config["peak_bytes"] = [max(of_rank) for of_rank in peaks] if all(map(all, peaks)) else []
    last_losses = [run.curve[-1]["val_loss"] for run in runs if run.curve]
    if last_losses and None not in last_losses:
        config["final_val_loss"] = median_of_passes([numpy.array([loss]) for loss in last_losses])
    exposed_s = None
    if runs[0].exposed_s is not None:
        exposed_s = statistics.median(float(numpy.median(run.exposed_s)) for run in runs)
        exposed, rounds = (sum(float(getattr(run, key).sum()) for run in runs) for key in ("exposed_s", "round_s"))
        config["hidden_share"] = max(0.0, 1 - exposed / rounds) if rounds > 0 else 0.0
    if base["compute_s"] is not None:
        _add_reference(config, header, base, exposed_s)
    return config


def is_adaptive(config: Mapping[str, Any]) -> bool:
    """Whether its steps differ in size, so that only times per sample can be compared with another's."""
    return config["accumulation"] == "adaptive"


def _add_reference(config, header, base, exposed_s: float | None) -> None:
    """What is known only beside C and R. The ideal of an adaptive configuration is that no rank ever waits: its step
    then takes as long as all ranks together need for its samples, each at its own speed."""
    step_s, compute_s = config["step_s"]["median"], base["compute_s"]
    if is_adaptive(config):
        config["bound_s"] = compute_s = step_s * config["samples_per_s"]["median"] / base["samples_per_s_alone"]
    else:
        estimate_s = config["estimate_s"] if config["estimate_comm"] not in (None, "full") else None
        given = (header["schedule"], compute_s, base["round_s"], header["n"], header["a"])
        config["bound_s"] = bound_s(*given, estimate_s)
    config["of_bound"] = step_s / config["bound_s"] if config["bound_s"] else None
    config["idle_share"] = max(0.0, 1 - compute_s / step_s)
    if exposed_s is None:
        config["split"] = {
            "compute_s": compute_s,
            "exposed_s": step_s - compute_s,
            "overhead_s": 0.0,
            "note": NOTE_OF_STOCK,
        }
    else:
        rest_s = step_s - compute_s - exposed_s
        config["split"] = {"compute_s": compute_s, "exposed_s": exposed_s, "overhead_s": rest_s}


def _ratios(configs, runs: Mapping[str, Sequence[Run]]):
    """Each ACCO configuration beside each stock one, of those that did not fail; by the time that a sample takes."""
    ratios, manager = [], []
    complete = [config for config in configs if config["step_s"]]
    for config in complete:
        for baseline in complete:
            if config["schedule"] is None or baseline["schedule"] is not None:
                continue
            slow, fast = ([run.step_s / run.samples for run in runs[one["name"]]] for one in (baseline, config))
            speedup = ratio_of_passes(slow, fast)
            names = {"config": config["name"], "baseline": baseline["name"]}
            saved = 1 - 1 / speedup["median"]
            ratios.append({**names, "speedup": speedup, "verdict": verdict_of(speedup)})
            manager.append(
                {
                    **names,
                    "saved_share": saved,
                    "saved_hours_per_1000_accelerator_hours": 1000 * saved,
                    "idle_share": config["idle_share"],
                    "hidden_share": config["hidden_share"],
                }
            )
    return ratios, manager


# ---- the verdict

LITTLE = 0.05  # of C: less communication than this is hardly worth hiding, less overhead not worth a sentence


def verdict(summary: dict[str, Any], is_emulated: bool) -> list[str]:
    """Sentences for somebody who reads nothing else."""
    complete = [config for config in summary["configs"] if config["step_s"]]
    acco = [config for config in complete if config["schedule"] is not None]
    stock = [config for config in complete if config["schedule"] is None]
    sentences = []
    best = min(stock, key=lambda config: config["step_s"]["median"], default=None)
    if best is None or not acco:
        sentences.append(
            "Nothing is compared: that takes at least one JSON with ACCO and one of DeepSpeed's own optimizers, "
            "and both must run"
        )
    else:
        for config in acco:
            sentences += _headline(config, best, summary)
    sentences += [f"{config['name']} failed: {config['failed']}" for config in summary["configs"] if config["failed"]]
    if summary["reference"]["failed"]:
        sentences.append(f"The reference (schedule sync) failed: {summary['reference']['failed']}")
    if summary["reference"]["compute_s"] is not None:
        sentences.append(_regime(summary["reference"]))
    if best is not None:
        for config in acco:
            sentences += _details(config, best, summary, is_emulated)
    sentences += _quality(acco, stock, is_emulated)
    sentences += _memory(acco, best)
    passes = max((len(config["runs"]) for config in complete), default=0)
    if 0 < passes < PASSES_FOR_95:
        sentences.append(
            f"The intervals rest on {passes} {'pass' if passes == 1 else 'passes'}; it takes {PASSES_FOR_95} "
            "until they can be trusted to 95 %"
        )
    return [sentence if sentence.endswith((".", "%)")) else sentence + "." for sentence in sentences]


def _regime(base: dict[str, Any]) -> str:
    compute_s, round_s = base["compute_s"], base["round_s"]
    measured = (
        f"Computing the gradients of a step takes C = {compute_s:.3g} s, one round of communication with nothing "
        f"beside it R = {round_s:.3g} s: R = {round_s / compute_s:.2f} C"
    )
    if round_s <= compute_s / 2:
        return f"{measured}. There acco, with two rounds a step, can hide all of it (R <= C/2), and so can wp and dpu"
    if round_s <= compute_s:
        return f"{measured}. There wp and dpu can hide all of it, acco with its two rounds a step only a part (R > C/2)"
    return (
        f"{measured}. Communication takes longer than computation: no schedule can hide all of it, and acco, with two "
        "rounds a step, takes longer than one that does not overlap at all"
    )


def _ratio(config, best, summary) -> dict[str, Any]:
    return next(r for r in summary["ratios"] if (r["config"], r["baseline"]) == (config["name"], best["name"]))


def _round(value: float) -> str:
    """Three digits: 0.0234, 1.23, 4,280."""
    return f"{float(f'{value:.3g}'):,g}"


def _headline(config, best, summary) -> list[str]:
    """One ACCO configuration beside the fastest of DeepSpeed's own."""
    ratio = _ratio(config, best, summary)
    speedup, name = ratio["speedup"], config["name"]
    interval = f"95 % interval {speedup['low']:.3g} to {speedup['high']:.3g}"
    times = f"{config['step_s']['median']:.3g} s a step against {best['step_s']['median']:.3g} s"
    if is_adaptive(config):
        own, other = (_round(one["samples_per_s"]["median"]) for one in (config, best))
        times = f"{own} samples/s against {other}"
    stock = f"{best['name']}, the fastest of DeepSpeed's own here"
    if ratio["verdict"] == "no difference shown":
        return [f"No difference shown between {name} and {stock}: {times}, {speedup['median']:.3g} times ({interval})"]
    said = f"{name} is {ratio['verdict']} than {stock}: {times}, {speedup['median']:.3g} times as fast ({interval})"
    if ratio["verdict"] == "slower":
        return [said]
    saved = 1 - 1 / speedup["median"]
    return [said, f"{name} saves {saved:.0%} of the time: {1000 * saved:.0f} of every 1000 accelerator-hours"]


def _details(config, best, summary, is_emulated) -> list[str]:
    """What it rests on, and why it is not faster."""
    name, sentences = config["name"], []
    if is_adaptive(config):
        sentences.append(
            f"{name}'s windows are adaptive: a median step has {config['samples_per_step']:.0f} samples, nominal are "
            f"{summary['samples_per_step']}. So speed is compared per sample; choose the learning rate for that batch"
        )
    if config["estimate_comm"] not in (None, "full") and config["estimate_s"] is not None:
        sentences.append(
            f"{name}'s ESTIMATE ({config['estimate_comm']}) takes {config['estimate_s']:.3g} s in its own runs; its "
            "bound is made with that"
        )
    if config["idle_share"] is not None:
        sentences.append(
            f"The accelerators compute nothing for {config['idle_share']:.0%} of the time with {name}, for "
            f"{best['idle_share']:.0%} with {best['name']}; {config['hidden_share']:.0%} of {name}'s communication "
            "is hidden"
        )
        if config["of_bound"] < 1 - LITTLE:
            sentences.append(
                f"{name} took less than its bound of {config['bound_s']:.3g} s: the machine was not equally fast "
                "in all runs, so repeat this with nothing else running"
            )
            return sentences
        reasons = _reasons(config, best, summary, is_emulated)
        is_faster = _ratio(config, best, summary)["verdict"] == "faster"
        if reasons and (not is_faster or config["of_bound"] > 1 + LITTLE):
            sentences.append(f"Why {name} is not faster{' still' if is_faster else ''}: {'; '.join(reasons)}")
    return sentences


def _reasons(config, best, summary, is_emulated) -> list[str]:
    base, split = summary["reference"], config["split"]
    compute_s, round_s = base["compute_s"], base["round_s"]
    nominal = best["samples_per_step"] / config["samples_per_step"]  # 1 unless adaptive
    reasons = []
    if config["schedule"] == "sync":
        return ["sync overlaps nothing"]
    if round_s < LITTLE * compute_s:
        reasons.append(f"there is little to hide, a round takes {round_s / compute_s:.1%} of the computation")
    if config["bound_s"] * nominal >= best["step_s"]["median"]:
        reasons.append(f"even its bound of {config['bound_s']:.3g} s is no shorter than a step of {best['name']}")
    elif not is_adaptive(config) and config["bound_s"] > compute_s * (1 + LITTLE):
        reasons.append(f"at R = {round_s / compute_s:.2f} C its bound is {config['bound_s']:.3g} s, not C")
    compute_s = split["compute_s"]
    unhidden_s = config["bound_s"] - compute_s  # what the bound itself lets be waited for
    if split["exposed_s"] - unhidden_s > LITTLE * compute_s:
        reasons.append(f"it waits {split['exposed_s']:.3g} s a step for rounds; its bound allows {unhidden_s:.3g}")
    if split["overhead_s"] > LITTLE * compute_s:
        reason = f"{split['overhead_s']:.3g} s of its step are neither computing alone nor waiting"
        if summary["device"] == "cpu" and not is_emulated:
            reason += ": the thread that communicates and updates shares the cores with the computation"
        reasons.append(reason)
    return reasons


def _quality(acco, stock, is_emulated) -> list[str]:
    if is_emulated:
        return ["The accelerator was emulated: times, network and memory are real, losses are not, and say nothing"]
    if not any(config["final_val_loss"] for config in (*acco, *stock)):
        return ["Nothing is said of quality: no run wrote a metrics.jsonl with validation losses into its folder"]
    sentences = []
    beside = next((config for config in stock if config["final_val_loss"]), None)
    for config in acco:
        if config["final_val_loss"]:
            loss = config["final_val_loss"]["median"]
            sentence = f"The final validation loss of {config['name']} is {loss:.4f}"
            if beside is not None:
                other = beside["final_val_loss"]["median"]
                sentence += f", that of {beside['name']} {other:.4f} ({loss / other - 1:+.2%})"
            sentences.append(f"{sentence}, {_after(config, beside)}")
    return sentences


def _after(config, beside) -> str:
    """After how much data the last losses were taken."""
    own, other = (_last_samples(one) if one is not None else None for one in (config, beside))
    if other is None or own == other:
        return "after equal tokens"
    if own is None:
        return "after as many steps"
    return f"after {own:,.0f} samples and {other:,.0f}: at equal tokens only the curves compare them"


def _last_samples(config) -> float | None:
    known = [run["curve"][-1]["samples"] for run in config["runs"] if run["curve"]]
    return statistics.median(known) if known and None not in known else None


def _memory(acco, best) -> list[str]:
    if best is None or not best["peak_bytes"]:
        return []
    of_best = max(best["peak_bytes"])
    return [
        f"{config['name']} needs at most {max(config['peak_bytes']) / 1e6:.0f} MB a rank, {best['name']} "
        f"{of_best / 1e6:.0f} MB"
        for config in acco
        if config["peak_bytes"]
    ]
