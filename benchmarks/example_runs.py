# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs examples/train_gpt.py under several JSONs and compares the runs; shared by the benchmarks beside it."""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read_config(name: str) -> dict:
    """The DeepSpeed JSON of that file stem in ds_configs; ``acco:estimate_fraction=0.75`` changes one of its params."""
    stem, _, change = name.partition(":")
    path = ROOT / "ds_configs" / f"{stem}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise SystemExit(f"{stem} is not a configuration; allowed: a file of ds_configs without .json: {known}")
    config = json.loads(path.read_text())
    if change:
        key, _, value = change.partition("=")
        config["optimizer"]["params"][key] = json.loads(value)
    return config


def run_example(
    config: str,
    *arguments: str,
    ranks: int = 2,
    n: int | None = None,
    lr: float | None = None,
    precision: str = "fp32",
    **environment: str,
) -> list[dict]:
    """One run through DeepSpeed's launcher on CPU ranks; returns the lines of metrics.jsonl.

    Args:
        config: as in :func:`read_config`.
        n, lr: instead of the JSON's gradient_accumulation_steps and learning rate.
        precision: fp32 leaves the JSON as it is.
    """
    settings = read_config(config)
    settings["gradient_accumulation_steps"] = n or settings["gradient_accumulation_steps"]
    if lr is not None:
        settings["optimizer"]["params"]["lr"] = lr
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    with socket.socket() as probe:  # a port of its own: another job of this machine may have DeepSpeed's default
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        used = Path(folder) / "ds_config.json"
        used.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        command += ["--master_port", str(port), str(ROOT / "examples" / "train_gpt.py"), "--out", folder, *arguments]
        try:
            done = subprocess.run(
                [*command, "--deepspeed_config", str(used)],
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **environment},
            )
        finally:
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # 66 MiB for each rank
                left.unlink(missing_ok=True)
        if done.returncode:
            raise RuntimeError(f"{config} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def machine() -> str:
    """For the results."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
