# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""``ds_acco compare``: the same script under several DeepSpeed JSONs, in alternation, measured beside each other.

In the folder of a comparison: ``command.json`` (what was asked for), ``configs/`` (the JSONs as they were then),
``runs/NAME/PASS/`` (each run's log and records; ``done.json`` last of all), ``results.json`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from ..launch import launcher as launches
from ..launch import shaped_hosts as hosts
from ..report import figures as pictures
from ..subcommand import INTERRUPTED
from . import verdict as summary
from .options import REFERENCE, Comparison, comparison_of, extra_reference, is_sync

DONE = "done.json"
COMMAND = "command.json"
RESULTS = "results.json"
CONFIGS, RUNS = "configs", "runs"  # folders
_CLEAR = "\r\x1b[2K"  # the terminal's line
LOG_LINES = 3  # of a failed run, in its sentence


# ---- the folder


def prepare(out: Path, comparison: Comparison) -> None:
    """Makes the folder, or finds in it what the same command left.

    Raises:
        ValueError: when it holds something else, with the difference.
    """
    asked = asdict(comparison)
    path = out / COMMAND
    if path.is_file():
        difference = _difference(json.loads(path.read_text()), json.loads(json.dumps(asked)))
        if difference:
            raise ValueError(f"--out {out} holds another comparison: {difference}. Give another --out, or remove it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty and holds no comparison. Give another --out")
    (out / CONFIGS).mkdir(parents=True, exist_ok=True)
    configs = {**comparison.configs, **extra_reference(comparison)}
    for name, config in configs.items():
        (out / CONFIGS / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_whole(path, asked)


def _difference(before: Any, now: Any, key: str = "") -> str:
    """The first difference in words; empty without one."""
    if isinstance(before, dict) and isinstance(now, dict):
        for part in sorted({*before, *now}, key=lambda part: part == "configs"):
            found = _difference(before.get(part), now.get(part), f"{key}.{part}" if key else part)
            if found:
                return found
        if list(before) != list(now):
            return f"the order of {key or 'its parts'} was {list(before)} and is {list(now)}"
        return ""
    return "" if before == now else f"{key} was {before!r} and is {now!r}"


def _write_whole(path: Path, content: Any) -> None:
    """All of the file or nothing: a reader never sees a part."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


# ---- the runs


def order(names: Sequence[str], passes: int) -> list[tuple[int, str]]:
    """(pass, name) of every run: all names in each pass, turned round in every other, so that a drift cancels."""
    return [
        (number, name) for number in range(1, passes + 1) for name in (names if number % 2 else tuple(reversed(names)))
    ]


class _Runs:
    """The runs of a comparison, in their order."""

    def __init__(self, comparison: Comparison, out: Path, place: launches.Place):
        self._comparison = comparison
        self._out = out
        self._place = place
        self.failed: dict[str, str] = {}
        self.finished: dict[str, list[summary.Run]] = {}
        self._spent_s: list[float] = []
        self._begin = time.monotonic()
        self._which, self._following = "", list[str]()
        self._line = _Line()

    def all(self) -> None:
        """Runs what is not finished yet; a configuration that fails is left out from then on."""
        comparison = self._comparison
        names = [*extra_reference(comparison), *comparison.configs]
        runs = order(names, comparison.passes)
        for index, (number, name) in enumerate(runs):
            if name in self.failed:
                continue
            self._which = f"[{index + 1}/{len(runs)}] pass {number} {name}"
            self._following = [later for _, later in runs[index + 1 :]]
            said = self._one(number, name)
            self._line.say(f"{self._which}: {said} | {self._times(self._later() * self._mean_s())}")

    def _later(self) -> int:
        """How many runs come after this one."""
        return sum(name not in self.failed for name in self._following)

    def _mean_s(self) -> float:
        """Of the runs so far; 0 before the first."""
        return sum(self._spent_s) / max(1, len(self._spent_s))

    def _times(self, left_s: float) -> str:
        gone = f"{_minutes(time.monotonic() - self._begin)} gone"
        return f"{gone}, about {_minutes(left_s)} to go" if left_s > 0 else gone

    def _watch(self, folder: Path, begin: float) -> None:
        """Shows how far the run is that began then."""
        whole = next((f" of {run.steps}" for some in self.finished.values() for run in some), "")
        left_s = (1 + self._later()) * self._mean_s() - (time.monotonic() - begin)

        def text() -> str:
            steps = launches.steps_so_far(folder)
            return f"{self._which}: {f'step {steps}{whole}' if steps else 'starting'} | {self._times(left_s)}"

        self._line.show(text)

    def _one(self, number: int, name: str) -> str:
        """Runs it unless it was finished before; returns what there is to say of it."""
        relative = f"{RUNS}/{name}/{number}"
        folder = self._out / relative
        was_finished = (folder / DONE).is_file()
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
            )
            self._spent_s.append(time.monotonic() - begin)
            if code:
                return self._fail(name, folder, f"the launcher ended with exit code {code}")
        try:
            records = launches.read(folder, self._comparison.world_size)
            run = summary.summarise_run(number, relative, records, summary.read_curve(folder))
        except ValueError as cause:
            return self._fail(name, folder, str(cause))
        self.finished.setdefault(name, []).append(run)
        if not was_finished:
            _write_whole(folder / DONE, {"seconds": round(self._spent_s[-1], 1)})
        steps = summary.median_of_passes([run.step_s])
        return f"{steps['median']:.3g} s a step{' (finished before)' if was_finished else ''}"

    def _fail(self, name: str, folder: Path, why: str) -> str:
        log = folder / launches.LOG
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
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


class _Line:
    """What is told of the progress: on a terminal one line that is written anew every second, else one a minute."""

    def __init__(self):
        self._is_terminal = sys.stderr.isatty()
        self._last_s = time.monotonic()

    def show(self, text: Callable[[], str]) -> None:
        """Of a state that passes; not every one is shown."""
        now = time.monotonic()
        if now - self._last_s < (1 if self._is_terminal else 60):
            return
        self._last_s = now
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(_CLEAR + text()[:width], end="", file=sys.stderr, flush=True)
        else:
            self.say(text())

    def say(self, text: str) -> None:
        """What stays."""
        print((_CLEAR if self._is_terminal else "") + text, file=sys.stderr, flush=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once; more of them do not disturb the cleaning up."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is ignored, and stays so
        numbers.append(signal.SIGHUP)

    def interrupt(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the command


def run(options: argparse.Namespace) -> int:
    """Returns 0, 1 when a configuration failed, 2 for bad arguments, 130 when interrupted."""
    try:
        comparison = comparison_of(options)
        extra_reference(comparison)
        pictures.require_matplotlib()  # now, not after all the runs
        prepare(options.out, comparison)
    except ValueError as cause:
        print(f"ds_acco compare: {cause}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as cause:
        print(f"ds_acco compare: {cause}", file=sys.stderr)
        return 1
    try:
        with interruptible():
            runs = run_all(comparison, options.out, options.hostfile)
            return _finish(comparison, options.out, runs)
    except KeyboardInterrupt:
        print("ds_acco compare: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as cause:
        print(f"ds_acco compare: {cause}", file=sys.stderr)
        return 1


def run_all(comparison: Comparison, out: Path, hostfile: Path | None) -> _Runs:
    """Runs what is not finished yet in the folder that :func:`prepare` made.

    Raises:
        RuntimeError: the shaped hosts could not be made.
    """
    shaped = hosts.ShapedHosts(comparison.hosts, comparison.rate) if comparison.hosts else nullcontext()
    with shaped as entered:
        place = launches.Place(
            world_size=comparison.world_size,
            slots=comparison.slots,
            hostfile=hostfile,
            hosts=entered,
            is_cpu=comparison.hosts is not None or comparison.emulated_ms is not None,
        )
        runs = _Runs(comparison, out, place)
        runs.all()
    return runs


def _finish(comparison: Comparison, out: Path, runs: _Runs) -> int:
    """Writes results.json and report.html and prints the verdict."""
    from ..report import command as report

    path, results = write_results(comparison, out, runs)
    page = report.write(path)
    print("\n".join(results["verdict"]))
    print(f"{path}\n{page}")
    return 1 if runs.failed else 0


def write_results(comparison: Comparison, out: Path, runs: _Runs) -> tuple[Path, dict[str, Any]]:
    """results.json: its path and content."""
    path, results = out / RESULTS, results_of(comparison, runs.finished, runs.failed)
    _write_whole(path, results)
    return path, results


def results_of(comparison: Comparison, finished, failed: Mapping[str, str]) -> dict[str, Any]:
    """The content of results.json."""
    reference = next((name for name, config in comparison.configs.items() if is_sync(config)), REFERENCE)
    failed = {**failed, **({REFERENCE: failed[reference]} if reference in failed else {})}
    runs = {name: finished.get(name, []) for name in comparison.configs}
    script = comparison.script[-1]
    measured = summary.summarise(
        comparison.files, runs, finished.get(reference, []), failed, comparison.emulated_ms is not None
    )
    return {
        "version": 1,
        "command": shlex.join(["ds_acco", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "script": os.path.relpath(script) if Path(script).is_relative_to(Path.cwd()) else script,
        "arguments": comparison.arguments,
        "network": comparison.network,
        "emulated_ms": comparison.emulated_ms,
        "tokens_per_sample": comparison.tokens_per_sample,
        "passes": comparison.passes,
        **measured,
    }
