# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the verdict of a comparison: sentences for somebody who reads nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...algorithm.schedules import SCHEDULES, Schedule
from ..words import Unit, listed, loss, memory_unit, number, percent, time_unit, wire_unit
from .results import Configuration, Interval, Ratio, Results

PASSES_FOR_95 = 6  # the median of fewer lies outside all of them more often than in 5 % of the cases: 2 * 0.5^passes
LITTLE = 0.05  # of C: less communication than this is hardly worth hiding, less overhead not worth a sentence
ONE_SEED = "one seed: all passes run the same command"


def verdict(results: Results) -> list[str]:
    """Returns the sentences of what was measured, as figures alone tell it: ``results.verdict`` is not asked."""
    acco = [config for config, _ in results.measured if config.is_acco]
    stock = [(config, step_s) for config, step_s in results.measured if not config.is_acco]
    best = min(stock, key=lambda pair: pair[1].median)[0] if stock else None
    pairs = [] if best is None else [_Pair(config, best, results) for config in acco]
    sentences = [sentence for pair in pairs for sentence in pair.headline()]
    if not pairs:
        sentences.append(
            "Nothing is compared: that takes at least one JSON with ACCO and one of DeepSpeed's own optimizers, "
            "and both must run"
        )
    sentences += [f"{config.name} failed: {config.failed}" for config in results.configs if config.failed]
    if results.reference.failed:
        sentences.append(f"The reference (schedule sync) failed: {results.reference.failed}")
    if results.reference.times:
        sentences.append(_regime(*results.reference.times, step_unit(results)))
    sentences += [sentence for pair in pairs for sentence in pair.details()]
    sentences += _quality(results)
    sentences += _memory(acco, best, results)
    sentences += _on_the_wire(results)
    passes = max((len(config.runs) for config, _ in results.measured), default=0)
    if 0 < passes < PASSES_FOR_95:
        sentences.append(
            f"The intervals rest on {passes} {'pass' if passes == 1 else 'passes'}; it takes {PASSES_FOR_95} "
            "until they can be trusted to 95 %"
        )
    return [sentence if sentence.endswith((".", "%)")) else sentence + "." for sentence in sentences]


def step_unit(results: Results) -> Unit:
    """Returns the one unit that times of steps have in all sentences, tables and pictures."""
    return time_unit([*(step_s.median for _, step_s in results.measured), results.reference.compute_s])


def schedules(fits: Callable[[Schedule], bool]) -> list[str]:
    """Returns the names of the schedules that ``fits`` accepts."""
    return [name for name, schedule in SCHEDULES.items() if fits(schedule)]


def two_phases() -> list[str]:
    """Returns the schedules with two rounds a step."""
    return schedules(lambda row: row.overlaps and row.has_two_phases)


def one_phase() -> list[str]:
    """Returns the schedules with one round a step, behind the whole of it."""
    return schedules(lambda row: row.overlaps and not row.has_two_phases)


def _regime(compute_s: float, round_s: float, unit: Unit) -> str:
    measured = (
        f"Computing the gradients of a step takes C = {unit.words(compute_s)}, one round of communication with nothing "
        f"beside it R = {unit.words(round_s)}: R = {number(round_s / compute_s)} C"
    )
    two, one = listed(two_phases()), listed(one_phase())
    if round_s <= compute_s / 2:
        return f"{measured}. There {two}, with two rounds a step, can hide all of it (R <= C/2), and so can {one}"
    if round_s <= compute_s:
        return f"{measured}. There {one} can hide all of it, {two} with two rounds a step only a part (R > C/2)"
    return (
        f"{measured}. Communication takes longer than computation: no schedule can hide all of it, and a step of {two} "
        "with its two rounds takes longer than one that overlaps nothing"
    )


@dataclass(frozen=True)
class _Pair:
    """Compares one ACCO configuration with ``best``, the fastest of DeepSpeed's own."""

    config: Configuration
    best: Configuration
    results: Results

    @property
    def _ratio(self) -> Ratio | None:
        names = (self.config.name, self.best.name)
        return next((ratio for ratio in self.results.ratios if (ratio.config, ratio.baseline) == names), None)

    def headline(self) -> list[str]:
        """Says which of the two is faster, and what that saves; nothing where they have no ratio."""
        ratio = self._ratio
        if ratio is None or ratio.speedup is None:
            return []
        name = self.config.name
        said = f"{number(ratio.speedup.median)} times"
        interval = f"95 % interval {number(ratio.speedup.low)} to {number(ratio.speedup.high)}"
        stock = f"{self.best.name}, the fastest of DeepSpeed's own here"
        if ratio.verdict == "no difference shown":
            return [f"No difference shown between {name} and {stock}: {self._speeds()}, {said} ({interval})"]
        sentence = f"{name} is {ratio.verdict} than {stock}: {self._speeds()}, {said} as fast ({interval})"
        if ratio.verdict == "slower":
            return [sentence]
        saved = 1 - 1 / ratio.speedup.median
        hours = f"{number(1000 * saved, 0)} of every 1000 accelerator-hours"
        return [sentence, f"{name} saves {percent(saved)} of the time: {hours}"]

    def _speeds(self) -> str:
        if self.config.is_adaptive:
            own, other = (number(_median(one.samples_per_s), 1) for one in (self.config, self.best))
            return f"{own} samples/s against {other}"
        unit = step_unit(self.results)
        own, other = (unit.words(_median(one.step_s)) for one in (self.config, self.best))
        return f"{own} a step against {other}"

    def details(self) -> list[str]:
        """Says what the figures rest on, and why the configuration is not faster."""
        config, best, unit = self.config, self.best, step_unit(self.results)
        name, sentences = config.name, []
        if config.is_adaptive:
            sentences.append(
                f"{name}'s windows are adaptive: a median step has {number(config.samples_per_step, 0)} samples, "
                f"nominal are {number(self.results.samples_per_step, 0)}. So speed is compared per sample; choose the "
                "learning rate for that batch"
            )
        if config.has_quantized_estimate and config.estimate_s is not None:
            sentences.append(
                f"{name}'s ESTIMATE ({config.estimate_comm}) takes {unit.words(config.estimate_s)} in its own runs; "
                "its bound is made with that"
            )
        if config.has_quantized_commit and config.commit_s is not None:
            sentences.append(
                f"{name}'s COMMIT ({config.commit_comm}) takes {unit.words(config.commit_s)} in its own runs; "
                "its bound is made with that"
            )
        if config.idle_share is None or config.bound_s is None or config.of_bound is None:
            return sentences
        sentences.append(
            f"The accelerators compute nothing for {percent(config.idle_share)} of the time with {name}, for "
            f"{percent(best.idle_share)} with {best.name}; {percent(config.hidden_share)} of {name}'s communication "
            "is hidden"
        )
        if config.of_bound < 1 - LITTLE:
            sentences.append(
                f"{name} took less than its bound of {unit.words(config.bound_s)}: the machine was not equally fast "
                "in all runs, so repeat this with nothing else running"
            )
            return sentences
        reasons = self._reasons(config.bound_s)
        is_faster = self._ratio is not None and self._ratio.verdict == "faster"
        if reasons and (not is_faster or config.of_bound > 1 + LITTLE):
            sentences.append(f"Why {name} is not faster{' still' if is_faster else ''}: {'; '.join(reasons)}")
        return sentences

    def _reasons(self, bound_s: float) -> list[str]:
        config, best, split, unit = self.config, self.best, self.config.split, step_unit(self.results)
        if config.row is not None and config.row.blocks:
            return [f"{config.schedule} overlaps nothing"]
        if split is None or self.results.reference.times is None:
            return []
        compute_s, round_s = self.results.reference.times
        reasons = []
        if round_s < LITTLE * compute_s:
            reasons.append(f"there is little to hide, a round takes {percent(round_s / compute_s)} of the computation")
        if best.step_s and bound_s * self._to_nominal() >= best.step_s.median:
            reasons.append(f"even its bound of {unit.words(bound_s)} is no shorter than a step of {best.name}")
        elif not config.is_adaptive and bound_s > compute_s * (1 + LITTLE):
            reasons.append(f"at R = {number(round_s / compute_s)} C its bound is {unit.words(bound_s)}, not C")
        unhidden_s = bound_s - split.compute_s  # what the bound itself lets be waited for
        if split.exposed_s - unhidden_s > LITTLE * split.compute_s:
            waits, allowed = unit.words(split.exposed_s), unit.words(unhidden_s)
            reasons.append(f"it waits {waits} a step for rounds; its bound allows {allowed}")
        if split.overhead_s > LITTLE * split.compute_s:
            reason = f"{unit.words(split.overhead_s)} of its step are neither computing alone nor waiting"
            if self.results.device == "cpu" and self.results.emulated_ms is None:
                reason += ": the thread that communicates and updates shares the cores with the computation"
            reasons.append(reason)
        return reasons

    def _to_nominal(self) -> float:
        """Returns the factor from a time per step to one per step of ``best``: 1 unless windows are adaptive."""
        own, other = self.config.samples_per_step, self.best.samples_per_step
        return other / own if own and other else 1.0


def _median(interval: Interval | None) -> float | None:
    return interval.median if interval else None


def _quality(results: Results) -> list[str]:
    if results.emulated_ms is not None:
        return ["The accelerator was emulated: times, network and memory are real, losses are not, and say nothing"]
    known = [config for config, _ in results.measured if config.last_val_loss is not None]
    if not known:
        return [
            "Nothing is said of quality: no run wrote a metrics.jsonl with validation losses, finite to the last, into "
            "its folder"
        ]
    beside = next((config for config in known if not config.is_acco), None)
    sentences = []
    for config in (config for config, _ in results.measured if config.is_acco):
        if config.last_val_loss is None:
            sentences.append(f"Nothing is said of the quality of {config.name}: its last validation loss is not known")
            continue
        sentence = f"The final validation loss of {config.name} is {loss(config.last_val_loss)}"
        if beside is not None and beside.last_val_loss:
            difference = 100 * (config.last_val_loss / beside.last_val_loss - 1)
            sentence += f", that of {beside.name} {loss(beside.last_val_loss)} ({difference:+.2f} %, {ONE_SEED})"
        sentences.append(f"{sentence}, {_after(config, beside)}")
    return sentences


def _after(config: Configuration, beside: Configuration | None) -> str:
    """Says after how much data the last losses were taken."""
    own, other = (None if one is None else _last_samples(one) for one in (config, beside))
    if other is None or own == other:
        return "after equal tokens"
    if own is None:
        return "after as many steps"
    return f"after {own:,.0f} samples and {other:,.0f}: at equal tokens only the curves compare them"


def _last_samples(config: Configuration) -> float | None:
    last = [run.curve[-1].samples for run in config.runs if run.curve]
    known = [samples for samples in last if samples is not None]
    return statistics.median(known) if known and len(known) == len(last) else None


def _memory(acco: Sequence[Configuration], best: Configuration | None, results: Results) -> list[str]:
    if best is None or not best.peaks:
        return []
    unit = memory_unit(peak for config in results.running for peak in config.peaks)
    return [
        f"{config.name} needs at most {unit.words(max(config.peaks))} a rank, {best.name} {unit.words(max(best.peaks))}"
        for config in acco
        if config.peaks
    ]


def _on_the_wire(results: Results) -> list[str]:
    known = [(config.name, config.interface_bytes) for config, _ in results.measured]
    unit = wire_unit(sent for _, sent in known)
    said = [f"{unit.number(sent)} with {name}" for name, sent in known if sent is not None]
    return [f"{unit.name} sent by a host in a step, with all headers: {listed(said)}"] if said else []
