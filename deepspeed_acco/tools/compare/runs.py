# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Goes through the runs of a comparison in their order."""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ...engine.recorder_format import RECORD_RUN
from .. import rank_files
from ..launch import launcher as launches
from ..launch import shaped_hosts as hosts
from ..typed_json import load, read
from ..words import printable, time_unit
from .folder import CONFIGS, DONE, RUNS
from .measure import MeasuredRun, median_of_passes, read_curve, summarize_run
from .options import Comparison, extra_reference
from .results import write_whole

LOG_LINES = 3  # of a failed run, in its sentence


def run_all(comparison: Comparison, out: Path, hostfile: Path | None) -> ComparisonRuns:
    """Runs what is not finished yet in the folder that :func:`prepare` made.

    Raises:
        RuntimeError: the shaped hosts could not be made.
    """
    rate = comparison.rate
    shaped = nullcontext() if comparison.hosts is None or rate is None else hosts.ShapedHosts(comparison.hosts, rate)
    with shaped as entered, _Progress(len(_names(comparison)) * comparison.passes) as progress:
        place = launches.Ranks(
            world_size=comparison.world_size,
            slots=comparison.slots,
            hostfile=hostfile,
            hosts=entered,
            is_cpu=comparison.hosts is not None or comparison.emulated_ms is not None,
        )
        runs = ComparisonRuns(comparison, out, place, progress)
        runs.run_all()
    return runs


@dataclass(frozen=True)
class _Done:
    """Holds what ``done.json`` says of a finished run: how long it took, and the id that its files carry."""

    seconds: float
    run: str | None = None


def _names(comparison: Comparison) -> list[str]:
    return [*extra_reference(comparison), *comparison.configs]


def order(names: Sequence[str], passes: int) -> list[tuple[int, str]]:
    """Returns (pass, name) of every run: all names in each pass, every other turned round, so that a drift cancels."""
    return [
        (number, name) for number in range(1, passes + 1) for name in (names if number % 2 else tuple(reversed(names)))
    ]


class ComparisonRuns:
    """Goes through the runs of a comparison in their order.

    Attributes:
        failed: why, of each configuration that failed.
        finished: the runs of each configuration that has any.
    """

    def __init__(self, comparison: Comparison, out: Path, place: launches.Ranks, progress: _Progress):
        self._comparison = comparison
        self._out = out
        self._place = place
        self.failed: dict[str, str] = {}
        self.finished: dict[str, list[MeasuredRun]] = {}
        self._spent_s: list[float] = []
        self._begin = time.monotonic()
        self._which, self._following = "", list[str]()
        self._progress = progress

    def run_all(self) -> None:
        """Runs what is not finished yet; a configuration that fails is left out from then on."""
        runs = order(_names(self._comparison), self._comparison.passes)
        for index, (number, name) in enumerate(runs):
            if name not in self.failed:
                self._which = f"[{index + 1}/{len(runs)}] pass {number} {name}"
                self._following = [later for _, later in runs[index + 1 :]]
                said = self._run_one(number, name)
                self._progress.say(f"{self._which}: {said} | {self._times(self._later() * self._mean_s())}")
            self._progress.advance()

    def _later(self) -> int:
        """Returns how many runs come after this one."""
        return sum(name not in self.failed for name in self._following)

    def _mean_s(self) -> float:
        """Returns the mean seconds of the runs so far; 0 before the first."""
        return sum(self._spent_s) / max(1, len(self._spent_s))

    def _times(self, left_s: float) -> str:
        gone = f"{_minutes(time.monotonic() - self._begin)} gone"
        return f"{gone}, about {_minutes(left_s)} to go" if left_s > 0 else gone

    def _watch(self, folder: Path, begin: float) -> None:
        """Shows how far the run is that began at that time."""
        whole = next((f" of {run.steps}" for some in self.finished.values() for run in some), "")
        left_s = (1 + self._later()) * self._mean_s() - (time.monotonic() - begin)

        def text() -> str:
            steps = rank_files.steps_so_far(folder)
            return f"{self._which}: {f'step {steps}{whole}' if steps else 'starting'} | {self._times(left_s)}"

        self._progress.show(text)

    def _run_one(self, number: int, name: str) -> str:
        """Goes through one run unless it was finished before; returns what there is to say of it."""
        relative = f"{RUNS}/{name}/{number}"
        folder = self._out / relative
        was_finished, new_id = (folder / DONE).is_file(), uuid.uuid4().hex
        if not was_finished:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            begin = time.monotonic()
            code = launches.run(
                self._comparison.script,
                self._arguments(name, folder),
                folder,
                self._place,
                watch=lambda: self._watch(folder, begin),
                environment={RECORD_RUN: new_id},
            )
            self._spent_s.append(time.monotonic() - begin)
            if code:
                return self._fail(name, folder, f"the launcher ended with exit code {code}")
        try:
            run_id = read(_Done, load(folder / DONE)).run if was_finished else new_id
            ranks = rank_files.read_ranks(folder, self._comparison.world_size, run_id)
            run = summarize_run(number, relative, ranks, read_curve(folder))
        except ValueError as cause:
            again = f". To measure it again remove {folder}" if was_finished else ""
            return self._fail(name, folder, f"{cause}{again}")
        self.finished.setdefault(name, []).append(run)
        if not was_finished:
            write_whole(folder / DONE, asdict(_Done(round(self._spent_s[-1], 1), new_id)))
        step_s = median_of_passes([run.step_s]).median
        return f"{time_unit([step_s]).words(step_s)} a step{' (finished before)' if was_finished else ''}"

    def _fail(self, name: str, folder: Path, why: str) -> str:
        log = folder / launches.LOG
        said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        lines = [line.strip() for line in printable(said).splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line] or lines
        last = " / ".join(dict.fromkeys(errors[-LOG_LINES:]))
        self.failed[name] = f"{why}; the end of {log}: {last}"
        is_last_word = self._comparison.passes == 1 and len(self._comparison.configs) == 1  # the command ends with it
        return "FAILED" if is_last_word else f"FAILED, {self.failed[name]}"

    def _arguments(self, name: str, folder: Path) -> list[str]:
        config = str((self._out / CONFIGS / f"{name}.json").resolve())
        given = self._comparison.arguments
        own = [] if any("{config}" in argument for argument in given) else ["--deepspeed_config", config]
        filled = [a.replace("{out}", str(folder.resolve())).replace("{config}", config) for a in given]
        return [*own, *filled]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Progress:
    """Tells on stderr how far the runs are: on a terminal in one line that is written anew every second, else in one
    line a minute."""

    def __init__(self, runs: int):
        self._bar = tqdm(total=runs, bar_format="{desc} {bar:10}", file=sys.stderr, disable=None, dynamic_ncols=True)
        self._interval_s = 60 if self._bar.disable else 1
        self._told_s = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *raised) -> None:
        self._bar.leave = False  # the line is of no use afterwards
        self._bar.close()

    def advance(self) -> None:
        """Counts a run."""
        self._bar.update()

    def show(self, text: Callable[[], str]) -> None:
        """Shows a state that passes; not every one is shown."""
        now = time.monotonic()
        if now - self._told_s < self._interval_s:
            return
        self._told_s = now
        if self._bar.disable:
            self.say(text())
        else:
            self._bar.set_description_str(text())

    def say(self, text: str) -> None:
        """Prints a line that remains on screen."""
        self._bar.set_description_str("", refresh=False)  # what was shown has passed
        tqdm.write(text, file=sys.stderr)
