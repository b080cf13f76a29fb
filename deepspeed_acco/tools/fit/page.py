# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Writes what was found out of a log: one page of plain words, and the same figures for ``--json``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...algorithm.schedules import AUTO, DEFAULT, DEFAULT_OF_ONE
from ..plan import model as plan
from ..plan.advice import COARSEST, COARSEST_OF_BOTH, WORTH_IT, seconds
from ..plan.command import DTYPE_BYTES, columns
from ..words import counted
from .estimate import Estimate, Observed
from .log import Log
from .run_facts import Run
from .verdict import NO, YES, Verdict

_VERSION = 1  # of --json


@dataclass(frozen=True)
class Page:
    """Holds all that is said of a log; ``steps`` are those of the training to come, None where nobody said."""

    name: str
    log: Log
    about: Run
    seen: Observed
    ways: Sequence[Estimate]
    in_vain: Sequence[str]
    verdict: Verdict
    steps: float | None

    # ---- text

    def text(self) -> str:
        """Returns one page of plain words."""
        parts = [self._head(), self._table(), self._answer(), self._limits()]
        return "\n\n".join(parts)

    def _head(self) -> str:
        log, seen, about = self.log, self.seen, self.about
        counts = ((log.timer_lines, "timers"), (len(log.samples_per_s), "throughput"))
        read = [f"{counted(number, 'line')} of {what}" for number, what in counts]
        lines = [
            f"PREDICTION from the log of a run, not a measurement of ACCO: {self.name}",
            f"Read: {counted(log.lines, 'line')}; {', '.join(read)}; {counted(len(log.steps), 'whole step')}. "
            f"{seen.steps} of {'these steps' if log.steps else 'the lines of throughput'} count",
            "Known: " + "; ".join(self._known()),
            f"A step of {about.stage} took {seconds(seen.step_s)}, measured; the halves of the log differ by "
            f"{100 * seen.drift:.2g} %",
        ]
        for number, way in enumerate(self.ways):
            lines += ["or, read otherwise:"] if number else []
            lines.append(f"C = {seconds(way.inputs.work.compute_s)}: {way.compute_from}")
            lines.append(f"R = {seconds(way.round_s)}, so R/C = {self._ratio(way):.3g}: from {way.network_from}")
        lines += [f"{words[0].upper()}{words[1:]}." for words in self.in_vain]
        return "\n".join(_wrapped(line) for line in lines)

    def _known(self) -> list[str]:
        facts, model = self.about.facts, self.about.model
        words = {
            "params": f"{model.numel:,} parameters",
            "dtype": f"of {model.weight_bytes} bytes",
            "stage": self.about.stage,
            "ranks": counted(self.about.ranks, "rank"),
            "hosts": "on " + counted(self.about.hosts, "host"),
            "n": f"n = {self.about.n}",
            "micro_batch": f"micro-batches of {self.about.micro_batch}",
            "backend": self.about.backend,
            "overlaps": f"overlap_comm {'on' if self.about.overlaps else 'off'}",
        }
        return [f"{said} ({facts[name].source})" for name, said in words.items() if name in facts]

    def _ratio(self, way: Estimate) -> float:
        return way.round_s / way.inputs.work.compute_s

    def _table(self) -> str:
        heads = ["", "s/step", "of yours", "GiB/rank"]
        measured = [f"{self.about.stage}, yours, measured", f"{self.seen.step_s:.4g}", "1.00", ""]
        rows = [heads, measured]
        for row in self._predicted():
            yours = ", yours, predicted" if row.name == self.about.stage else ""
            is_default = row.name == self._default()
            label = row.name + yours + (f' (what "{AUTO}" takes)' if is_default else "")
            share = row.step_s / self.seen.step_s
            rows.append([label, f"{row.step_s:.4g}", f"{share:.2f}", f"{row.memory_bytes / 2**30:.3g}"])
        return columns(rows) + "\nGiB/rank: model states, without activations"

    def _default(self) -> str:
        return (DEFAULT if self.about.n > 1 else DEFAULT_OF_ONE).name

    def _predicted(self) -> list[plan.Prediction]:
        """Returns the rows: the run's stage, ZeRO-1 and the fastest one, and ACCO's modes, by the surest estimate."""
        inputs = self.ways[0].inputs
        other = self.verdict.other
        stages = [self.about.stage, "zero1", *([other.name] if other else [])]
        modes = [DEFAULT.name, COARSEST.name, COARSEST_OF_BOTH.name] if self.about.n > 1 else []
        names = dict.fromkeys([*stages, *modes, DEFAULT_OF_ONE.name, self.verdict.mode])
        rows = [plan.predict(name, inputs.model, inputs.cluster, inputs.work) for name in names]
        return [replace(row, step_s=self.verdict.step_s) if row.name == self.verdict.mode else row for row in rows]

    def _answer(self) -> str:
        verdict, measured = self.verdict, self.seen.step_s
        between = f"{seconds(verdict.low_s)} to {seconds(verdict.high_s)}"
        step = f"{verdict.mode} is predicted to take {seconds(verdict.step_s)} a step ({between})"
        if verdict.word == NO:
            lines = [f"NO: {self._why_not()}"]
        elif verdict.word == YES:
            lines = [f"YES: {step}, {measured / verdict.step_s:.2f}x the speed of yours. Set {self._keys()}."]
        else:
            lines = [f"TOO CLOSE TO CALL: {step}, yours took {seconds(measured)}. Measure: `ds_acco compare`."]
        lines.append(self._saved())
        other = verdict.other
        if verdict.word != NO and other is not None and other.step_s < measured:
            lines.append(
                f"Without ACCO {other.name} is predicted to take {seconds(other.step_s)}, with {_gib(other)} of model "
                "states."
            )
        if verdict.word != NO:
            lines += self._prices()
        lines.append(f"More, from the same C and R: `{self._plan()}`")
        return "\n".join(_wrapped(line) for line in lines)

    def _prices(self) -> list[str]:
        """Returns what the mode costs, and what a log's reader has to know before it is set."""
        mode, said = plan.modes()[self.verdict.mode], []
        if mode.is_quantized:
            said.append(f"{mode.name} sends rounded values: measure your loss with it.")
        if not mode.schedule.has_two_phases:
            said.append(f"{mode.name} takes gradients at predicted weights, and its loss is higher: measure yours.")
        if self.about.offloads:
            said.append("Your optimizer is offloaded. ACCO's is not: its state has to fit on the device.")
        return said

    def _plan(self) -> str:
        """Returns the command line with which the plan has the same figures, by the surest way."""
        way, model = self.ways[0], self.about.model
        names = {size: name for name, size in reversed(DTYPE_BYTES.items())}
        dtypes = {"dtype": model.weight_bytes, "comm-dtype": model.comm_bytes}
        dtypes |= {"accumulation-dtype": model.accumulation_bytes}
        words = [
            "ds_acco plan",
            f"--params {model.numel}",
            f"--ranks {self.about.ranks}",
            f"--hosts {self.about.hosts}",
        ]
        words += [f"--{option} {names[size]}" for option, size in dtypes.items()]
        words += [f"--backend {self.about.backend}", f"--n {self.about.n}"]
        words += [f"--round-ms {way.round_s * 1e3:.4g}", f"--micro-batch-ms {way.inputs.work.micro_batch_s * 1e3:.4g}"]
        return " ".join([*words, f"--update-ns {way.inputs.work.update_s_per_parameter * 1e9:.4g}"])

    def _keys(self) -> str:
        mode = plan.modes()[self.verdict.mode]
        keys: dict[str, Any] = {"schedule": mode.schedule.name}
        keys |= {"estimate_comm": mode.estimate_comm} if mode.wire.estimate else {}
        keys |= {"commit_comm": mode.commit_comm} if mode.wire.commit else {}
        if self.verdict.estimate_fraction is not None:
            keys["estimate_fraction"] = float(f"{self.verdict.estimate_fraction:.3g}")
        return json.dumps(keys)

    def _why_not(self) -> str:
        verdict, compute_s = self.verdict, self.ways[0].inputs.work.compute_s
        memory = plan.memory_bytes(verdict.mode, self.about.model, self.about.ranks)
        limit = self.ways[0].inputs.cluster.memory_bytes
        if memory > limit:
            return f"the model states of {verdict.mode} take {memory / 2**30:.3g} GiB of {limit / 2**30:.3g}."
        if self.seen.step_s < WORTH_IT * compute_s and not self.ways[0].is_inferred:
            return (
                f"nothing to win. Your step takes {seconds(self.seen.step_s)}, its computation {seconds(compute_s)}: "
                "no schedule is faster than that."
            )
        other = verdict.other
        if other is not None and other.step_s < min(self.seen.step_s, WORTH_IT * verdict.step_s):
            return (
                f"{other.name} alone would do. It is predicted to take {seconds(other.step_s)}, with {_gib(other)} of "
                f"model states; {verdict.mode} {seconds(verdict.step_s)}."
            )
        return f"{verdict.mode} is predicted to take {seconds(verdict.step_s)}, yours took {seconds(self.seen.step_s)}."

    def _saved(self) -> str:
        measured = self.seen.step_s
        saved = measured - self.verdict.step_s
        verb = "Saved" if saved >= 0 else "Lost"
        said = f"{verb} against yours: {seconds(abs(saved))} of {seconds(measured)} a step"
        said += f" ({100 * abs(saved) / measured:.0f} %)"
        hours = self._hours()
        if hours is None:
            return f"{said}. --steps or --hours of your training gives accelerator-hours."
        whole, least, most = (_in_short(value) for value in hours)
        return (
            f"{said}. In {self.steps:,.0f} steps on {counted(self.about.ranks, 'accelerator')} that is {whole} "
            f"accelerator-hours saved ({least} to {most}), of {_in_short(self.steps_hours(measured))}."
        )

    def steps_hours(self, step_s: float) -> float:
        """Returns accelerator-hours of so many seconds in every step."""
        return (self.steps or 0.0) * step_s * self.about.ranks / 3600

    def _hours(self) -> tuple[float, float, float] | None:
        """Returns accelerator-hours saved, and the least and the most of them."""
        if self.steps is None:
            return None
        verdict = self.verdict
        bounds = (verdict.step_s, verdict.high_s, verdict.low_s)
        whole, least, most = (self.steps_hours(self.seen.step_s - step_s) for step_s in bounds)
        return whole, least, most

    def _limits(self) -> str:
        about = self.about
        lines = [
            "What a log cannot tell: whether rank 0 waited for a slower rank or for the network, which look alike "
            "here; the time between steps, for data, which no timer has."
        ]
        if about.backend == "nccl":
            lines.append(
                "On GPUs the timers show how long the training stream was busy or waited. Communication beside it is "
                "in none of them, and no figure of this prediction was ever checked against GPUs."
            )
        else:
            lines.append("On CPUs rounds take cores from the computation beside them.")
        if self.ways[0].is_inferred:
            lines.append(
                "C is inferred, since no timer holds computation alone: all that DeepSpeed does beside the predicted "
                "communication counts as computation. ACCO may be much faster than predicted, or slower."
            )
        lines.append(
            "Surer, in 20 steps: `ds_acco plan --calibrate CONFIG --script train.py` measures C and R, and `ds_acco "
            "compare` the steps themselves."
        )
        return "\n".join(_wrapped(line) for line in lines)

    # ---- JSON

    def report(self) -> dict[str, Any]:
        """Returns the figures for ``--json``; times in seconds."""
        verdict, hours = self.verdict, self._hours()
        other = verdict.other
        return {
            "version": _VERSION,
            "prediction": True,
            "log": {
                "lines": self.log.lines,
                "timer_lines": self.log.timer_lines,
                "throughput_lines": len(self.log.samples_per_s),
                "whole_steps": len(self.log.steps),
            },
            "run": {name: {"value": fact.value, "source": fact.source} for name, fact in self.about.facts.items()},
            "stage": self.about.stage,
            "measured": {"steps": self.seen.steps, "step_s": self.seen.step_s, "drift": self.seen.drift},
            "ways": [
                {
                    "compute_s": way.inputs.work.compute_s,
                    "compute_from": way.compute_from,
                    "round_s": way.round_s,
                    "network_from": way.network_from,
                    "payload_rate": way.inputs.cluster.payload_rate,
                }
                for way in self.ways
            ],
            "rows": [
                {"name": row.name, "step_s": row.step_s, "memory_bytes": row.memory_bytes} for row in self._predicted()
            ],
            "verdict": {
                "word": verdict.word,
                "mode": verdict.mode,
                "estimate_fraction": verdict.estimate_fraction,
                "step_s": verdict.step_s,
                "low_s": verdict.low_s,
                "high_s": verdict.high_s,
                "other_stage": other and {"name": other.name, "step_s": other.step_s},
                "saved_s": self.seen.step_s - verdict.step_s,
                "saved_hours": None if hours is None else dict(zip(("hours", "least", "most"), hours)),
                "steps": self.steps,
            },
        }


def _gib(row: plan.Prediction) -> str:
    return f"{row.memory_bytes / 2**30:.3g} GiB"


def _in_short(hours: float) -> str:
    return f"{hours:,.0f}" if abs(hours) >= 100 else f"{hours:.3g}"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 116, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
