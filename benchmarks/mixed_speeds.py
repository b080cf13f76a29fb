# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Samples per second of ranks of different speed: adaptive windows, fixed ones and DeepSpeed's ZeRO-1, beside the sum
of the ranks' own speeds.

    python benchmarks/mixed_speeds.py --out benchmarks/results/mixed_speeds.json

Accelerators are emulated (emulated.py); ranks, gradients, collectives and updates are real. A rank's own speed is that
of the same loop alone: world size 1, schedule ``sync``. Every configuration is measured once in each pass, in turn.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve()
CONFIGS = ("adaptive", "adaptive_wp", "fixed", "zero1")
SKIPPED_STEPS = 3  # at the start of each run


def ds_config(name: str, n: int) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": n,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
    }
    hyper = {"lr": 1e-4, "weight_decay": 0.1}
    own = {
        "alone": {"schedule": "sync"},
        "adaptive": {"accumulation": "adaptive"},
        "adaptive_wp": {"accumulation": "adaptive", "schedule": "wp"},
        "fixed": {},
    }
    if name == "zero1":
        config["optimizer"] = {"type": "AdamW", "params": {**hyper, "torch_adam": True}}
    else:
        config["optimizer"] = {"type": "ACCO", "params": {**hyper, **own[name]}}
    return config


# ---- the worker: one rank


def worker(job: argparse.Namespace) -> None:
    import deepspeed
    import torch

    import deepspeed_acco
    from deepspeed_acco.tools.launch.emulated_accelerator import EmulatedAccelerator

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()
    torch.manual_seed(1)
    module = EmulatedAccelerator(job.numel, job.micro_batch_ms * job.slowness[rank]).bfloat16()
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=ds_config(job.name, job.n)
    )
    windows = []
    if job.name.startswith("adaptive"):
        deepspeed_acco.on_window(engine, lambda counts: windows.append(counts.micro_batches))
    marks = []  # (seconds, samples) at the end of every step
    while len(marks) <= SKIPPED_STEPS + job.steps:
        engine.backward(engine())
        engine.step()
        if engine.global_steps > len(marks):
            marks.append((time.perf_counter(), engine.global_samples))
    engine.destroy()
    if rank == 0:
        (begin, first), (end, last) = marks[SKIPPED_STEPS], marks[-1]
        result = {"samples_per_s": (last - first) / (end - begin), "windows": windows[SKIPPED_STEPS:]}
        Path(job.results).write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


# ---- the command


def launch(name: str, slowness: list[float], arguments) -> dict:
    """One run of that configuration with one rank for each number, through DeepSpeed's launcher."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE.parents[1])}
        keys = ("numel", "n", "micro_batch_ms", "steps")
        job = {**{key: getattr(arguments, key) for key in keys}, "name": name, "slowness": slowness}
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(len(slowness))]
        command += [str(HERE), "--worker", json.dumps({**job, "results": str(results)})]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=600)
        if done.returncode or not results.exists():
            raise RuntimeError(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
        return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slowness", nargs="+", type=float, default=[1, 1, 1, 4], help="of each rank: 4 is 4x slower")
    parser.add_argument("--numel", type=int, default=1_000_000, help="parameters")
    parser.add_argument("--n", type=int, default=4, help="gradient_accumulation_steps")
    parser.add_argument("--micro_batch_ms", type=float, default=60.0, help="of a rank of slowness 1")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of a run")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=(*CONFIGS, "alone"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(argparse.Namespace(**arguments.worker))
        return
    runs: dict = {}
    for _ in range(arguments.passes):
        for slowness in sorted(set(arguments.slowness)):
            runs.setdefault(f"alone {slowness:g}", []).append(launch("alone", [slowness], arguments))
        for name in arguments.configs:
            runs.setdefault(name, []).append(launch(name, arguments.slowness, arguments))
            print(f"progress {name} {runs[name][-1]['samples_per_s']:.2f} samples/s", file=sys.stderr, flush=True)
    speeds = {name: statistics.median(run["samples_per_s"] for run in all_of) for name, all_of in runs.items()}
    own_speeds = sum(speeds[f"alone {slowness:g}"] for slowness in arguments.slowness)
    summary = {
        "command": " ".join(["python", "benchmarks/mixed_speeds.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        **{key: getattr(arguments, key) for key in ("slowness", "numel", "n", "micro_batch_ms", "steps", "passes")},
        "sum_of_own_speeds_samples_per_s": round(own_speeds, 3),
        "rows": [
            {
                "config": name,
                "samples_per_s": round(speed, 3),
                "of_own_speeds": round(speed / own_speeds, 4),
                "each_pass": [round(run["samples_per_s"], 3) for run in runs[name]],
                "micro_batches_by_window": [sum(window) for window in runs[name][-1]["windows"]],
            }
            for name, speed in speeds.items()
        ],
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
