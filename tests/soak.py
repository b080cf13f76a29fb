"""Trains for long and shows that nothing grows: ``python -m tests.soak [--steps 10000] [--modes acco sync ...]``.

Two real ranks train a tiny model in each mode, with evaluations, saves and loads on the way; the last mode makes many
engines one after the other. After a warm-up, in which each of these happened twice, the memory, threads, descriptors
and shared memory of both ranks must stay as they are. Exits with 1 where they do not.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
from tqdm import tqdm

from tests.support.ranks import RankPool

RANKS = 2
WARM_UP = 0.2  # of the steps
# Allocators keep what they had, and settle at some MB more over hours: 16,600 steps of an earlier soak came to 3.2 MB.
# A leak of the smallest tensor at each step, 1 kB with what holds it, comes to 8 MB in 8,000 steps.
LARGEST_GROWTH_BYTES = 6_000_000
SAMPLES, EVALUATIONS, SAVES, LOADS = 100, 40, 20, 10  # over all steps
WINDOWS_OF_ENGINE = 5
LIMIT_S_OF_STEP = 2.0  # on a machine that does other things, too

MODES: dict[str, dict] = {
    "acco": {},
    "int4-auto": {"estimate_comm": "int4", "estimate_fraction": "auto"},
    "adaptive": {"accumulation": "adaptive"},
    "local-bf16": {"schedule": "local"},
    "wp-bf16": {"schedule": "wp"},
    "sync": {"schedule": "sync"},
    "engines": {},
}


@dataclass(frozen=True)
class Usage:
    """Holds what a process has at a moment; ``resident_bytes`` may grow a little, nothing else may.

    Attributes:
        shared_memory: files that it has mapped, and files of its job, be they mapped or not.
    """

    resident_bytes: int
    threads: int
    descriptors: int
    shared_memory: int

    @classmethod
    def now(cls) -> Usage:
        """Returns that of this process, without what only waits for Python's collector."""
        gc.collect()
        process = psutil.Process()
        # Not memory_maps() of psutil, which has the kernel count every page.
        mapped = {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}
        of_job = {str(path) for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")}
        memory = process.memory_info().rss
        return cls(memory, process.num_threads(), process.num_fds(), len(mapped | of_job))


def growth(samples: list[Usage]) -> list[str]:
    """Returns a sentence for each thing that grew after the warm-up, by the highest before and after it: a peak that
    came in the warm-up comes again."""
    cut = max(1, int(len(samples) * WARM_UP))
    sentences = []
    for field in fields(Usage):
        before, after = (max(getattr(sample, field.name) for sample in part) for part in (samples[:cut], samples[cut:]))
        allowed = LARGEST_GROWTH_BYTES if field.name == "resident_bytes" else 0
        if after - before > allowed:
            sentences.append(f"{field.name} grew from {before} to {after}; allowed: {allowed} more")
    return sentences


# ---- in the ranks


def train(mode: str, steps: int, folder: str) -> list[Usage]:
    """Trains so many steps and returns the samples of this rank."""
    import torch.distributed as dist

    gc.freeze()  # what the imports made is not looked at again, which takes a second
    run = _many_engines if mode == "engines" else _one_engine
    samples = []
    with tqdm(total=steps, desc=mode, unit="step", disable=dist.get_rank() > 0, mininterval=1.0) as progress:
        every = max(1, steps // SAMPLES)
        for step in run(mode, steps, folder):
            progress.update(step - progress.n)
            if step % every == 0:
                samples.append(Usage.now())
                megabytes = samples[-1].resident_bytes / 1e6
                progress.set_postfix(MB=f"{megabytes:.1f}", threads=samples[-1].threads, refresh=False)
    return samples


def _config(mode: str, folder: str) -> dict:
    from tests.support import training

    precision = "bf16" if mode.endswith("-bf16") else "fp32"
    config = training.ds_config(2, clip=1.0, precision=precision, comm_timeout_s=60, **MODES[mode])
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": mode}
    return config


def _windows(engine, windows: int) -> Iterator[int]:
    """Trains window after window, of as many micro-batches as they come to have."""
    import torch
    import torch.distributed as dist

    from tests.support import training

    rank, dtype = dist.get_rank(), next(engine.module.parameters()).dtype
    for window in range(1, windows + 1):
        before, micro_batch = engine.global_steps, 0
        while engine.global_steps == before:
            loss = engine(*training.batch(rank, window, micro_batch, dtype))
            engine.backward(loss)
            engine.step()
            micro_batch += 1
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of window {window} is {loss.item()}")
        yield window


def _one_engine(mode: str, steps: int, folder: str) -> Iterator[int]:
    import torch
    import torch.distributed as dist

    from tests.support import training

    def is_time(of_all: int) -> bool:
        return step % max(1, steps // of_all) == 0

    engine = training.start_engine(_config(mode, folder))
    x, y = training.batch(dist.get_rank(), 0, 0, next(engine.module.parameters()).dtype)
    for step in _windows(engine, steps):
        if is_time(EVALUATIONS):
            engine.eval()
            with torch.no_grad():
                engine(x, y)
            engine.train()
        if is_time(SAVES):
            engine.save_checkpoint(folder, tag=f"{mode}-{step % 2}")
        if is_time(LOADS):
            engine.load_checkpoint(folder)
        yield step
    engine.destroy()


def _many_engines(mode: str, steps: int, folder: str) -> Iterator[int]:
    from tests.support import training

    for number in range(0, steps, WINDOWS_OF_ENGINE):
        engine = training.start_engine(_config(mode, folder))
        for _ in _windows(engine, min(WINDOWS_OF_ENGINE, steps - number)):
            pass
        engine.destroy()
        del engine
        yield min(number + WINDOWS_OF_ENGINE, steps)


# ---- the command


def soak(modes: list[str], steps: int, tell: Callable[[str], None] = print) -> bool:
    """Trains in each mode in ranks of its own and tells what they came to; returns whether nothing grew."""
    is_flat = True
    for mode in modes:
        pool = RankPool(RANKS)
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                pool.start(train, mode=mode, steps=steps, folder=folder)
                of_ranks = pool.collect(limit_s=60 + steps * LIMIT_S_OF_STEP)
        finally:
            pool.close()
        minutes = (time.monotonic() - start) / 60
        for rank, samples in enumerate(of_ranks):
            first, last = samples[max(0, int(len(samples) * WARM_UP) - 1)], samples[-1]
            tell(
                f"{mode}, rank {rank}, {steps} steps in {minutes:.1f} min: "
                f"{first.resident_bytes / 1e6:.1f} -> {last.resident_bytes / 1e6:.1f} MB, "
                f"threads {first.threads} -> {last.threads}, descriptors {first.descriptors} -> {last.descriptors}, "
                f"shared memory files {first.shared_memory} -> {last.shared_memory}"
            )
            for sentence in growth(samples):
                tell(f"{mode}, rank {rank}: NOT FLAT: {sentence}")
                is_flat = False
    return is_flat


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 where all stayed flat, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Trains for long: nothing may grow.")
    parser.add_argument("--steps", type=int, default=10_000, help="of each mode (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    options = parser.parse_args(arguments)
    is_flat = soak(options.modes, options.steps)
    print("nothing grew" if is_flat else "something grew")
    return 0 if is_flat else 1


if __name__ == "__main__":
    from tests.soak import main  # ranks look functions up by the name of their module

    raise SystemExit(main())
