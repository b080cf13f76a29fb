# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the logs that ``ds_acco fit`` is tested with: the example under DeepSpeed's own stages, on two CPU ranks.

    python -m tests.support.fit_logs tests/tools/logs
    python -m tests.support.fit_logs tests/tools/logs --stages 1 --suffix _0_16_9

The second line is for a DeepSpeed 0.16.9 in front of the search path, which prints the same behind a logger's head.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.launcher import ROOT, Launched

EXAMPLE = ROOT / "examples" / "train_gpt.py"
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}},
    "wall_clock_breakdown": True,
    "steps_per_print": 2,
}
_OF_THIS_MACHINE = re.compile(r"(?:^|[\s'\"=(\[,])/\w|process \d+|Process \d+|Warning|warn")


def config_of(stage: int) -> dict:
    """Returns the JSON of a run."""
    return {**CONFIG, "zero_optimization": {"stage": stage}}


def made(stage: int, steps: int = 10) -> str:
    """Trains the example for so many steps and ends it; returns what it printed but what is of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(config_of(stage)))
        sizes = ("--preset", "tiny", "--seq_len", 32, "--steps", steps)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        run = Launched(EXAMPLE, "--deepspeed_config", config, *sizes, **pipes)
        try:
            lines = list(_until(run.process.stdout, steps))
        finally:
            run.kill()
    return "".join(f"{line}\n" for line in lines if line.strip() and not _OF_THIS_MACHINE.search(line))


def _until(output: Iterable[str], steps: int) -> Iterator[str]:
    """Yields lines up to the one of the last step; stage 3 generates the text behind it for minutes."""
    done = 0
    for line in output:
        yield line.rstrip("\n")
        done += " | fwd: " in line
        if done == steps:
            return
    raise RuntimeError(f"the run ended after {done} of {steps} steps")


def main() -> None:
    """Writes the logs and their JSONs into a folder."""
    parser = argparse.ArgumentParser(description="Make the logs that ds_acco fit is tested with.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", type=int, nargs="+", default=range(4))
    parser.add_argument("--suffix", default="", help="of the names")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    for stage in options.stages:
        (options.folder / f"zero{stage}{options.suffix}.log").write_text(made(stage))
        (options.folder / f"zero{stage}.json").write_text(json.dumps(config_of(stage), indent=2) + "\n")


if __name__ == "__main__":
    main()
