# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a training step: ACCO's schedules above DeepSpeed's ZeRO-1, bf16, on CPU ranks.

    python benchmarks/memory.py --numel 100000000 --out benchmarks/results/memory.json

Each configuration trains in fresh processes; the peak is the kernel's (VmHWM), reset after the second step, so what
building the model took does not count.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIGS = ("zero1", "acco", "wp", "dpu")


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report VmHWM")


def train(rank: int, world_size: int, name: str, numel: int, rendezvous: str, answers) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"
    )
    import deepspeed
    import torch

    import deepspeed_acco  # noqa: F401
    from benchmarks.two_hosts import ds_config
    from deepspeed_acco.tools.launch.emulated_accelerator import EmulatedAccelerator

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    module = EmulatedAccelerator(numel, 0.0).bfloat16()
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=ds_config(name, 2)
    )
    for step in range(6):
        for _ in range(2):
            engine.backward(engine())
            engine.step()
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")
    answers.put((rank, peak_bytes()))
    engine.destroy()


def measure(name: str, numel: int, world_size: int) -> int:
    """The largest rank's peak resident memory in bytes."""
    # Without a fixed threshold glibc keeps freed blocks of some megabytes, and the figure shows its habits.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1048576"
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, name, numel, os.path.join(folder, "rendezvous"), answers)
        processes = [context.Process(target=train, args=(rank, *arguments)) for rank in range(world_size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a rank of {name} failed; its output is above")
        return max(answers.get()[1] for _ in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    peaks = {}
    for name in arguments.configs:
        peaks[name] = measure(name, arguments.numel, arguments.ranks)
        print(f"{name}: {peaks[name] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    summary = {
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "numel": arguments.numel,
        "ranks": arguments.ranks,
        "dtype": "bf16",
        "peak_bytes": peaks,
        "above_zero1_bytes_per_param": {
            name: round((peak - peaks["zero1"]) / arguments.numel, 3)
            for name, peak in peaks.items()
            if "zero1" in peaks
        },
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
