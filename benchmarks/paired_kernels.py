# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Whole training steps with the native kernels and with the PyTorch path, in alternation.

    python benchmarks/paired_kernels.py --pairs 3 --out benchmarks/results/paired_kernels.json

Twice: the example on two ranks with a larger preset, and two shaped hosts with emulated compute short enough that the
rounds are not hidden (two_hosts.py; needs root and is left out without).
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.example_runs import ROOT, run_example  # noqa: E402

PATHS = ("native", "torch")


def example_step_s(path: str, preset: str, seq_len: int, steps: int) -> float:
    """Seconds of a step, from the second validation to the last: the first steps load and build."""
    arguments = ("--preset", preset, "--seq_len", str(seq_len), "--steps", str(steps))
    lines = run_example("acco", *arguments, DEEPSPEED_ACCO_KERNELS=path)
    return (lines[-1]["seconds"] - lines[1]["seconds"]) / (lines[-1]["step"] - lines[1]["step"])


def two_host_step_s(path: str, rate: str, micro_batch_ms: float) -> tuple[float, float]:
    """Seconds of an acco step, and of a round with nothing beside it."""
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "two_hosts.py"), "--configs", "acco", "--passes", "1"]
        command += ["--rate", rate, "--micro_batch_ms", str(micro_batch_ms), "--windows", "10", "--out", str(out)]
        environment = {**os.environ, "DEEPSPEED_ACCO_KERNELS": path}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        summary = json.loads(out.read_text())
        return summary["rows"][0]["step_s"], summary["round_alone_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--preset", default="medium")
    parser.add_argument("--seq_len", type=int, default=8, help="short, or computing hides the updates")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--micro_batch_ms", type=float, default=40.0)
    parser.add_argument("--skip", nargs="*", default=[], choices=["example", "two_hosts"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measured: dict[str, dict[str, list[float]]] = {}

    def keep(what: str, path: str, seconds: float) -> None:
        measured.setdefault(what, {}).setdefault(path, []).append(seconds)
        print(f"{what} {path}: {seconds:.3f} s", file=sys.stderr, flush=True)

    for pair in range(arguments.pairs):
        for path in PATHS if pair % 2 == 0 else reversed(PATHS):
            if "example" not in arguments.skip:
                what = f"example, preset {arguments.preset}, seq_len {arguments.seq_len}"
                keep(what, path, example_step_s(path, arguments.preset, arguments.seq_len, arguments.steps))
            if "two_hosts" not in arguments.skip and os.geteuid() == 0:
                step, alone = two_host_step_s(path, arguments.rate, arguments.micro_batch_ms)
                keep(f"two hosts, {arguments.rate}, 8 x {arguments.micro_batch_ms:g} ms", path, step)
                keep(f"two hosts, {arguments.rate}, one round alone", path, alone)
    rows = []
    for what, by_path in measured.items():
        ratios = [native / torch for native, torch in zip(by_path["native"], by_path["torch"])]
        rows.append(
            {
                "what": what,
                **{f"{path}_s": [round(seconds, 4) for seconds in by_path[path]] for path in PATHS},
                "median_ratio_native_to_torch": round(statistics.median(ratios), 4),
            }
        )
    summary = {
        "command": " ".join(["python", "benchmarks/paired_kernels.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "rows": rows,
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
