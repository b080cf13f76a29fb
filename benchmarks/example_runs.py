# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs examples/train_gpt.py under several JSONs and compares the runs; shared by the benchmarks beside it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_example(config: str, *arguments: str, ranks: int = 2, **environment: str) -> list[dict]:
    """One run through DeepSpeed's launcher on CPU ranks; returns the lines of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        command += [str(ROOT / "examples" / "train_gpt.py"), "--out", folder, *arguments]
        command += ["--deepspeed_config", str(ROOT / "ds_configs" / f"{config}.json")]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **environment},
        )
        if done.returncode:
            raise RuntimeError(f"{config} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
