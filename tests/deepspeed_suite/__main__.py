# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own tests with ACCO in place of every Adam(W) of ZeRO stage 1. Not part of CI.

    python -m tests.deepspeed_suite CHECKOUT --json results.json --schedules stock sync acco -- -k "not 100-"

CHECKOUT is a clone of DeepSpeed's repository, which is not changed; the tests run against the installed DeepSpeed.
``stock`` runs the tests as they are, and the schedules those of them that made an engine of stage 1 with Adam(W). With
``acco`` engines with one micro-batch a window get ``dpu``. A test counts when ACCO was asked for in it.
"""

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.launcher import ROOT, operators_folder

INSIDE = Path(__file__).parent / "inside"
FILES = [  # the others of these folders make no engine of stage 1 with Adam(W) on a CPU, or need CUDA or NVMe
    "runtime/zero/test_zero_tensor_fragment.py",
    "checkpoint/test_zero_optimizer.py",
    "checkpoint/test_universal_checkpoint.py",
    "v1/zero/test_zero.py",
    "v1/zero/test_zero_user_backward.py",
    "v1/zero/test_zero_autocast.py",
    "v1/zero/test_zero_torch_func.py",
    "v1/half_precision/test_bf16.py",
    "runtime/half_precision/test_zero_optim_overflow.py",
    "runtime/half_precision/test_fp16.py",
    "runtime/test_no_sync_ctxt.py",
]
BUILD = """
from deepspeed.accelerator import get_accelerator
from deepspeed_acco.optim import native
import torch
for name in ("FusedAdamBuilder", "CPUAdamBuilder", "ShareMemCommBuilder"):
    get_accelerator().create_op_builder(name).load()
native.prepare(torch.device("cpu"))
"""  # before the tests, whose limits are no limits for a compiler
SCHEDULES = ("stock", "sync", "acco", "local", "dpu", "wp")
STUCK_S = 150  # for a test without any progress
GRACE_S = 30  # for the other ranks after one has failed


class Suite:
    """The runs of one schedule: pytest in a session of its own for each file, begun again behind a test that hung."""

    def __init__(self, checkout: Path, schedule: str, folder: Path, only: set[str] | None, pytest_args: list[str]):
        self.checkout, self.pytest_args = checkout, pytest_args
        self.only = only
        self.results: dict[str, dict] = {}
        self.lines, self.events, self.selection = (
            folder / f"{schedule}.{name}" for name in ("lines", "events", "json")
        )
        search = os.pathsep.join(filter(None, [str(INSIDE), str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = {
            **os.environ,
            "PYTHONPATH": search,
            "PYTHONDONTWRITEBYTECODE": "1",
            "DS_ACCELERATOR": "cpu",
            "LOCAL_SIZE": "4",  # DeepSpeed's number of "devices" on a CPU: tests with more ranks are skipped
            "OMP_NUM_THREADS": "1",
            "DS_UNITTEST_TIMEOUT": "100000",  # ends all of pytest; the limits here end one test
            "HF_HUB_OFFLINE": "1",
            "ACCO_SUITE_SCHEDULE": schedule,
            "ACCO_SUITE_EVENTS": str(self.events),
            "ACCO_SUITE_RESULTS": str(self.lines),
            "ACCO_SUITE_SELECTION": str(self.selection),
        }
        self.environment.setdefault("TORCH_EXTENSIONS_DIR", operators_folder())

    def build_operators(self) -> None:
        environment = {**self.environment, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True, stdout=subprocess.DEVNULL)

    def run(self, file: str) -> None:
        if self.only is not None and not any(name.startswith(f"unit/{file}::") for name in self.only):
            return
        while self._run_until_stuck(file):
            pass

    def _run_until_stuck(self, file) -> bool:
        """Whether pytest has to begin again for the tests behind the one it ended in."""
        self.selection.write_text(
            json.dumps({"done": list(self.results), "only": None if self.only is None else sorted(self.only)})
        )
        self.lines.write_text("")
        self.events.write_text("")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "suite_recorder",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:timeout",
        ]
        command += [f"unit/{file}", *self.pytest_args]
        with open(self.lines.with_suffix(".log"), "a") as log:
            process = subprocess.Popen(
                command,
                cwd=self.checkout / "tests",
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                reason = self._watch(process)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        running = self._read_lines()
        if running is None:
            if process.returncode not in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED):
                raise RuntimeError(f"pytest ended with {process.returncode} for {file}; see {log.name}")
            return False
        raised = [event["reason"] for event in self._events() if event["event"] == "raised"]
        reason = raised[0] if raised else reason or f"pytest ended with {process.returncode}"
        self.results[running] = {"outcome": "hung", "reason": reason, "events": self._events()}
        return True

    def _watch(self, process) -> str:
        """Waits for the end, or for a reason to end it."""
        while process.poll() is None:
            time.sleep(0.5)
            quiet_s = time.time() - max(self.lines.stat().st_mtime, self.events.stat().st_mtime)
            has_failed = any(event["event"] == "raised" for event in self._events())
            if quiet_s > (GRACE_S if has_failed else STUCK_S):
                return f"no progress in {quiet_s:.0f} s"
        return ""

    def _events(self) -> list[dict]:
        lines = self.events.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _read_lines(self) -> str | None:
        """Takes over the results; returns the test that was begun and not ended."""
        running = None
        for line in self.lines.read_text().splitlines():
            result = json.loads(line)
            name = result.pop("id")
            running = name if result["outcome"] == "started" else None
            if running is None:
                self.results[name] = result
        return running


def was_asked(result: dict) -> bool:
    return any(event["event"] == "asked" for event in result["events"])


def made_acco(result: dict) -> bool:
    return any(event.get("optimizer") == "AccoZeroOptimizer" for event in result["events"])


def summary(results: dict[str, dict[str, dict]]) -> str:
    """A table of the files and a list of what did not pass."""
    results = {schedule: results[schedule] for schedule in SCHEDULES if schedule in results}
    schedules = list(results)
    files = sorted({name.split("::")[0].removeprefix("unit/") for tests in results.values() for name in tests})
    lines = ["| file | tests with stage 1 and Adam(W) | " + " | ".join(f"{s} passed" for s in schedules) + " |"]
    lines.append("|---|" + "---|" * (1 + len(schedules)))
    for file in files:
        counted = {
            schedule: [r for name, r in tests.items() if name.startswith(f"unit/{file}::") and was_asked(r)]
            for schedule, tests in results.items()
        }
        if any(counted.values()):
            passed = [str(sum(r["outcome"] == "passed" for r in counted[s])) for s in schedules]
            lines.append(f"| {file} | {len(counted[schedules[0]])} | " + " | ".join(passed) + " |")
    for schedule, tests in results.items():
        asked = {name: r for name, r in tests.items() if was_asked(r)}
        made = sum(made_acco(r) for r in asked.values())
        lines.append(f"\n{schedule}: {len(asked)} counted, an ACCO engine was made in {made} of them")
        failures = collections.defaultdict(list)
        for name, result in asked.items():
            if result["outcome"] != "passed":
                reason = (result["reason"].splitlines() or [""])[0]
                failures[name.split("[")[0].removeprefix("unit/"), result["outcome"], reason[:300]].append(name)
        for (test, outcome, reason), names in failures.items():
            lines.append(f"  {len(names)} {outcome}: {test}\n      {reason}")
        others = collections.Counter(r["outcome"] for name, r in tests.items() if name not in asked)
        lines.append(f"  not counted: {', '.join(f'{n} {outcome}' for outcome, n in sorted(others.items())) or 'none'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.deepspeed_suite", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--schedules", nargs="+", default=["stock", "sync"], choices=SCHEDULES)
    parser.add_argument("--json", type=Path, required=True, help="results; those of other runs in it are kept")
    parser.add_argument("--files", nargs="+", default=FILES, help="relative to the checkout's tests/unit")
    parser.epilog = "What comes after -- goes to pytest."
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for schedule in args.schedules:
            only = None
            if schedule != "stock":
                if "stock" not in results:
                    parser.error(f"--schedules {schedule} needs the results of stock in {args.json}: run stock first")
                only = {name for name, result in results["stock"].items() if was_asked(result)}
            suite = Suite(args.checkout.resolve(), schedule, Path(folder), only, sys.argv[end + 1 :])
            suite.build_operators()
            for file in args.files:
                began = time.time()
                suite.run(file)
                results.setdefault(schedule, {}).update(suite.results)
                args.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                print(f"{schedule} {file} {time.time() - began:.0f} s", flush=True)
    print(summary(results), flush=True)


if __name__ == "__main__":
    main()
