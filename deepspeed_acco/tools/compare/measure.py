# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes figures of what the runs of a comparison recorded: medians with intervals, ratios, and results.json."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy

from ...algorithm.schedules import SCHEDULES
from ...algorithm.step_time import WARM_UP_STEPS, step_s
from ...engine.recorder_format import RankHeader
from ..machine import describe_machine
from ..rank_files import RankFile
from ..typed_json import read_line, read_lines
from .configs import REFERENCE, measures_reference
from .options import Comparison
from .results import (
    Configuration,
    Interval,
    LossInterval,
    Model,
    Pass,
    Point,
    Ratio,
    Reference,
    Results,
    Saving,
    Split,
    Versions,
)
from .verdict import verdict

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval
SEED = 20_240_602
NOTE_OF_STOCK = "all that is not computation: communication, optimizer, overhead"


# ---- one run


@dataclass(frozen=True)
class MeasuredRun:
    """Holds one finished run of one configuration; times in seconds of the timed steps: those after the warm-up into
    which no evaluation or checkpoint fell.

    Attributes:
        number: of the pass, from 1.
        folder: relative to the comparison's.
        header: rank 0's, with the ``a`` of the last step.
        steps: optimizer steps of the whole run.
        step_s: [timed], each the mean over the ranks.
        exposed_s: [timed] likewise, what was waited for rounds; None without ACCO.
        round_s: [timed] likewise, the rounds.
        compute_s: the slowest rank's median time outside the engine's step.
        fastest_round_s: the median round of the rank that waits least for the others; None without ACCO.
        estimate_s: the median ESTIMATE of the rank that waits least for the others; None without any.
        commit_s: likewise the median round at a window's end.
        samples: [timed], of all ranks together.
        samples_per_s_alone: what the ranks compute together where nothing communicates, by ``outside`` of the step.
        batch: samples of every step of the run, all ranks together; None with fixed windows, which have one size.
        sent_bytes: what a rank sends in a median step, the mean over the ranks; None where it was not counted.
        interface_bytes: likewise what a host sends, the mean over the hosts.
        peak_bytes: of each rank, after the warm-up.
        curve: the validations, as the script wrote them.
    """

    number: int
    folder: str
    header: RankHeader
    steps: int
    step_s: numpy.ndarray
    exposed_s: numpy.ndarray | None
    round_s: numpy.ndarray | None
    compute_s: float
    fastest_round_s: float | None
    estimate_s: float | None
    commit_s: float | None
    samples: numpy.ndarray
    samples_per_s_alone: float
    batch: list[int] | None
    sent_bytes: float | None
    interface_bytes: float | None
    peak_bytes: list[float | None]
    curve: list[Point]


def summarize_run(number: int, folder: str, ranks: Sequence[RankFile], curve: list[Point]) -> MeasuredRun:
    """Returns the figures of one run from what its ranks recorded.

    Raises:
        ValueError: no step is left to be timed.
    """
    header = ranks[0].header
    count = min(len(rank.steps) for rank in ranks)
    batch = _batch(ranks, count)
    timed = [
        index
        for index in range(WARM_UP_STEPS, count)
        if all(rank.steps[index].step_s is not None and not rank.steps[index].looked for rank in ranks)
        and (batch is None or batch[index])
    ]
    if not timed:
        raise ValueError(
            f"none of the {count} steps can be timed: the first {WARM_UP_STEPS} and those with an evaluation or a "
            "checkpoint are left out. Train for more steps"
        )

    def table(key: str) -> numpy.ndarray:
        """Returns [ranks, timed]; NaN where it is not known."""
        return numpy.array([[getattr(rank.steps[index], key) for index in timed] for rank in ranks], dtype=float)

    is_acco = header.schedule is not None
    outside = numpy.median(table("step_s") - table("inside_s"), axis=1)
    samples = numpy.array([header.samples_per_step if batch is None else batch[i] for i in timed])
    own_samples = header.n * header.micro_batch
    last_a = ranks[0].steps[-1].a
    return MeasuredRun(
        number=number,
        folder=folder,
        header=header if last_a is None else replace(header, a=last_a),
        steps=count,
        step_s=table("step_s").mean(axis=0),
        exposed_s=table("exposed_s").mean(axis=0) if is_acco else None,
        round_s=table("round_s").mean(axis=0) if is_acco else None,
        compute_s=float(outside.max()),
        fastest_round_s=float(numpy.median(table("round_s"), axis=1).min()) if is_acco else None,
        estimate_s=_least_median(table("estimate_s")),
        commit_s=_least_median(_commits(table)),
        samples=samples,
        samples_per_s_alone=float((own_samples / numpy.maximum(outside, 1e-9)).sum()),
        batch=batch,
        sent_bytes=_median_of_known(table("sent_bytes").mean(axis=0)),
        interface_bytes=_median_over_hosts(table("interface_bytes")),
        peak_bytes=[_peak(rank) for rank in ranks],
        curve=curve,
    )


def _batch(ranks: Sequence[RankFile], count: int) -> list[int] | None:
    """Returns the samples of each step, all ranks together; None with fixed windows."""
    steps = zip(*(rank.steps[:count] for rank in ranks))
    batch = [[line.samples for line in of_step if line.samples is not None] for of_step in steps]
    return [sum(own) for own in batch] if all(len(own) == len(ranks) for own in batch) else None


def _peak(rank: RankFile) -> float | None:
    peaks = [line.peak_bytes for line in rank.steps[WARM_UP_STEPS:]]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if len(known) == len(peaks) else None


def _median_of_known(values: numpy.ndarray) -> float | None:
    known = values[~numpy.isnan(values)]
    return float(numpy.median(known)) if len(known) else None


def _median_over_hosts(table: numpy.ndarray) -> float | None:
    """Returns the median over the columns of the mean of the rows that are known, one of each host; None without."""
    of_hosts = table[~numpy.isnan(table).any(axis=1)]
    return float(numpy.median(of_hosts.mean(axis=0))) if len(of_hosts) else None


def _commits(table: Callable[[str], numpy.ndarray]) -> numpy.ndarray:
    """Returns the rounds at a window's end, in seconds: what is left of the rounds of a line when its ESTIMATE is taken
    out; NaN where those were not one of each kind."""
    rounds, estimate_s = table("rounds"), table("estimate_s")
    has_estimate = ~numpy.isnan(estimate_s)
    commit_s = table("round_s") - numpy.where(has_estimate, estimate_s, 0.0)
    return numpy.where(rounds == 1 + has_estimate, commit_s, numpy.nan)


def _least_median(table: numpy.ndarray) -> float | None:
    """Returns the smallest of the rows' medians; None where nothing is known."""
    medians = [median for median in map(_median_of_known, table) if median is not None]
    return min(medians, default=None)


def read_curve(folder: Path) -> list[Point]:
    """Returns the validations of a run's metrics.jsonl; none without the file.

    Raises:
        ValueError: broken; says where.
    """
    path = folder / "metrics.jsonl"
    return [read_line(Point, line) for line in read_lines(path)] if path.is_file() else []


# ---- statistics


def _resampled_medians(passes: Sequence[numpy.ndarray], chosen: numpy.ndarray, random) -> numpy.ndarray:
    """Returns [RESAMPLES, slots]: the median of steps drawn anew from the pass that ``chosen`` names there."""
    medians = numpy.empty(chosen.shape)
    for number, steps in enumerate(passes):
        places = chosen == number
        drawn = random.integers(len(steps), size=(int(places.sum()), len(steps)))
        medians[places] = numpy.median(steps[drawn], axis=1)
    return medians


def _spread(middle: float, resampled: numpy.ndarray) -> Interval:
    low, high = numpy.percentile(resampled, INTERVAL)
    return Interval(median=float(middle), low=float(low), high=float(high))


def median_of_passes(passes: Sequence[numpy.ndarray]) -> Interval:
    """Returns the median of the passes' medians, with a 95 % bootstrap interval: passes are drawn anew with
    replacement, and in each of them its values.

    Args:
        passes: of each pass its values.
    """
    random = numpy.random.default_rng(SEED)
    chosen = random.integers(len(passes), size=(RESAMPLES, len(passes)))
    resampled = numpy.median(_resampled_medians(passes, chosen, random), axis=1)
    return _spread(statistics.median(float(numpy.median(values)) for values in passes), resampled)


def ratio_of_passes(above: Sequence[numpy.ndarray], below: Sequence[numpy.ndarray]) -> Interval:
    """Returns the median over the passes of median(above) / median(below), both of the same pass, so that what drifts
    from pass to pass cancels; the interval as in :func:`median_of_passes`."""
    random = numpy.random.default_rng(SEED)
    chosen = random.integers(len(above), size=(RESAMPLES, len(above)))
    resampled = _resampled_medians(above, chosen, random) / _resampled_medians(below, chosen, random)
    middle = statistics.median(float(numpy.median(a) / numpy.median(b)) for a, b in zip(above, below))
    return _spread(middle, numpy.median(resampled, axis=1))


def verdict_of(speedup: Interval) -> str:
    """Returns ``no difference shown`` when the interval holds 1."""
    if speedup.low is not None and speedup.low > 1:
        return "faster"
    return "slower" if speedup.high is not None and speedup.high < 1 else "no difference shown"


def bound_s(
    schedule: str | None,
    compute_s: float,
    round_s: float,
    n: int,
    a: int | None,
    estimate_s: float | None = None,
    commit_s: float | None = None,
) -> float | None:
    """Returns the shortest step that a schedule can have: each round beside the computation that it runs behind.

    Args:
        round_s: R, of every round.
        estimate_s: of an ESTIMATE, where it is another one: a quantized one.
        commit_s: likewise of the round at a window's end.
    """
    row = SCHEDULES.get(schedule or "")
    if row is None:
        return None
    phase_a_s = compute_s * a / n if a is not None else 0.0
    end_s, phase_b_s = (round_s if own is None else own for own in (commit_s, estimate_s))
    return step_s(row, phase_a_s, compute_s - phase_a_s, end_s, phase_b_s)


# ---- results.json


def results_of(
    comparison: Comparison, finished: Mapping[str, Sequence[MeasuredRun]], failed: Mapping[str, str]
) -> Results:
    """Returns the content of results.json.

    Args:
        finished: of each configuration, and of the reference, the finished runs, in the order of the passes.
        failed: why, of each that failed.
    """
    reference = next((name for name, config in comparison.configs.items() if measures_reference(config)), REFERENCE)
    runs = {name: finished.get(name, []) for name in comparison.configs}
    alone = None if reference in failed else _alone(finished.get(reference, []))
    configs = [
        _configuration(name, file, runs[name], alone, failed.get(name)) for name, file in comparison.files.items()
    ]
    ratios, manager = _ratios(configs, runs)
    header = next((run.header for some in (finished.get(reference, []), *runs.values()) for run in some), None)
    script = comparison.script[-1]
    results = Results(
        command=shlex.join(["ds_acco", *sys.argv[1:]]),
        date=date.today().isoformat(),
        machine=describe_machine(),
        script=os.path.relpath(script) if Path(script).is_relative_to(Path.cwd()) else script,
        arguments=comparison.arguments,
        network=comparison.network,
        emulated_ms=comparison.emulated_ms,
        tokens_per_sample=comparison.tokens_per_sample,
        passes=comparison.passes,
        reference=Reference(failed=failed.get(reference)) if alone is None else alone.as_reference(),
        configs=configs,
        ratios=ratios,
        manager=manager,
        verdict=[],
    )
    if header is not None:
        results = replace(
            results,
            world_size=header.world_size,
            device=header.device,
            model=Model(
                numel=header.numel,
                weight_bytes=header.weight_bytes,
                comm_bytes=header.comm_bytes,
                accumulation_bytes=header.accumulation_bytes,
            ),
            n=header.n,
            samples_per_step=header.samples_per_step,
            versions=Versions(torch=header.torch, deepspeed=header.deepspeed),
        )
    return replace(results, verdict=verdict(results))


@dataclass(frozen=True)
class _Alone:
    """Holds C, R and what the ranks compute together, measured one after the other."""

    compute_s: float
    round_s: float
    micro_batch_s: float
    samples_per_s: float

    def as_reference(self) -> Reference:
        """Returns the ``Reference`` of results.json."""
        return Reference(
            compute_s=self.compute_s,
            round_s=self.round_s,
            micro_batch_s=self.micro_batch_s,
            samples_per_s_alone=self.samples_per_s,
        )


def _alone(runs: Sequence[MeasuredRun]) -> _Alone | None:
    rounds = [run.fastest_round_s for run in runs if run.fastest_round_s is not None]
    if not rounds:
        return None
    compute_s = statistics.median(run.compute_s for run in runs)
    return _Alone(
        compute_s=compute_s,
        round_s=statistics.median(rounds),
        micro_batch_s=compute_s / runs[0].header.n,
        # By the median of times, as C is: of two runs it is their mean.
        samples_per_s=1 / statistics.median(1 / run.samples_per_s_alone for run in runs),
    )


def _configuration(
    name: str, file: str, runs: Sequence[MeasuredRun], alone: _Alone | None, failed: str | None
) -> Configuration:
    config = Configuration(name=name, file=file, failed=failed, runs=[_pass(run) for run in runs])
    if not runs:
        return config
    header = runs[0].header
    config = replace(
        config,
        optimizer=header.optimizer,
        schedule=header.schedule,
        stage=header.stage,
        accumulation=header.accumulation,
        estimate_comm=header.estimate_comm,
        commit_comm=header.commit_comm,
        a=header.a,
    )
    if failed:
        return config
    estimates = [run.estimate_s for run in runs if run.estimate_s is not None]
    commits = [run.commit_s for run in runs if run.commit_s is not None]
    sent = [run.sent_bytes for run in runs if run.sent_bytes is not None]
    on_interface = [run.interface_bytes for run in runs if run.interface_bytes is not None]
    config = replace(
        config,
        step_s=median_of_passes([run.step_s for run in runs]),
        samples_per_step=statistics.median(float(numpy.median(run.samples)) for run in runs),
        samples_per_s=median_of_passes([run.samples / run.step_s for run in runs]),
        estimate_s=statistics.median(estimates) if estimates else None,
        commit_s=statistics.median(commits) if commits else None,
        sent_bytes=statistics.median(sent) if sent else None,
        interface_bytes=statistics.median(on_interface) if on_interface else None,
        hidden_share=_hidden_share(runs),
        peak_bytes=_highest_peaks(runs),
        final_val_loss=_final_val_loss(runs),
    )
    return config if alone is None else _beside(config, header, runs, alone)


def _pass(run: MeasuredRun) -> Pass:
    return Pass(
        number=run.number,
        folder=run.folder,
        steps=run.steps,
        timed_steps=len(run.step_s),
        step_s=float(numpy.median(run.step_s)),
        curve=run.curve,
        batch=run.batch,
    )


def _highest_peaks(runs: Sequence[MeasuredRun]) -> list[float | None]:
    """Returns the highest peak memory of each rank over the runs, in bytes; none where one is not known."""
    highest: list[float | None] = []
    for of_rank in zip(*(run.peak_bytes for run in runs)):
        known = [peak for peak in of_rank if peak]
        if len(known) < len(of_rank):
            return []
        highest.append(max(known))
    return highest


def _final_val_loss(runs: Sequence[MeasuredRun]) -> LossInterval | None:
    last = [run.curve[-1].val_loss for run in runs if run.curve]
    known = [loss for loss in last if loss is not None]
    if not known or len(known) < len(last):
        return None
    found = median_of_passes([numpy.array([loss]) for loss in known])
    return LossInterval(median=found.median, low=found.low, high=found.high)


def _exposed_s(runs: Sequence[MeasuredRun]) -> float | None:
    """Returns the exposed wait of a median step, in seconds; None without ACCO."""
    exposed = [float(numpy.median(run.exposed_s)) for run in runs if run.exposed_s is not None]
    return statistics.median(exposed) if exposed else None


def _hidden_share(runs: Sequence[MeasuredRun]) -> float | None:
    """Returns the hidden part of the rounds' time, of all timed steps together; None without ACCO."""
    sums = [
        (float(run.exposed_s.sum()), float(run.round_s.sum()))
        for run in runs
        if run.exposed_s is not None and run.round_s is not None
    ]
    if not sums:
        return None
    exposed_s, round_s = map(sum, zip(*sums))
    return max(0.0, 1 - exposed_s / round_s) if round_s > 0 else 0.0


def _beside(config: Configuration, header: RankHeader, runs: Sequence[MeasuredRun], alone: _Alone) -> Configuration:
    """Adds what is known only beside C and R. The ideal of an adaptive configuration is that no rank ever waits: its
    step then takes as long as all ranks together need for its samples, each at its own speed."""
    assert config.step_s is not None and config.samples_per_s is not None
    whole_s, compute_s = config.step_s.median, alone.compute_s
    bound: float | None
    if config.is_adaptive:
        bound = compute_s = whole_s * config.samples_per_s.median / alone.samples_per_s
    else:
        estimate_s = config.estimate_s if config.has_quantized_estimate else None
        commit_s = config.commit_s if config.has_quantized_commit else None
        bound = bound_s(header.schedule, compute_s, alone.round_s, header.n, header.a, estimate_s, commit_s)
    exposed_s = _exposed_s(runs)
    if exposed_s is None:
        split = Split(compute_s=compute_s, exposed_s=whole_s - compute_s, overhead_s=0.0, note=NOTE_OF_STOCK)
    else:
        split = Split(compute_s=compute_s, exposed_s=exposed_s, overhead_s=whole_s - compute_s - exposed_s)
    return replace(
        config,
        bound_s=bound,
        of_bound=whole_s / bound if bound else None,
        idle_share=max(0.0, 1 - compute_s / whole_s),
        split=split,
    )


def _ratios(
    configs: Sequence[Configuration], runs: Mapping[str, Sequence[MeasuredRun]]
) -> tuple[list[Ratio], list[Saving]]:
    """Compares ACCO configurations with stock ones, each pair that did not fail, by the time that a sample takes."""
    ratios, manager = [], []
    complete = [config for config in configs if config.step_s]
    for config in filter(lambda config: config.is_acco, complete):
        for baseline in filter(lambda config: not config.is_acco, complete):
            slow, fast = ([run.step_s / run.samples for run in runs[one.name]] for one in (baseline, config))
            speedup = ratio_of_passes(slow, fast)
            saved = 1 - 1 / speedup.median
            ratios.append(
                Ratio(config=config.name, baseline=baseline.name, speedup=speedup, verdict=verdict_of(speedup))
            )
            manager.append(
                Saving(
                    config=config.name,
                    baseline=baseline.name,
                    saved_share=saved,
                    saved_hours_per_1000_accelerator_hours=1000 * saved,
                    idle_share=config.idle_share,
                    hidden_share=config.hidden_share,
                )
            )
    return ratios, manager
