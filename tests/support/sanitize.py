# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU loops as a program of their own under AddressSanitizer and UndefinedBehaviorSanitizer, and runs it.

python tests/support/sanitize.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def build_and_run(source: Path, flags: list[str]) -> str:
    """Returns the program's output; raises RuntimeError with everything that compiler or program said."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / source.stem
        compiler = os.environ.get("CXX", "c++")
        common = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}"]
        for command in ([compiler, *common, *flags, str(source), "-o", str(program)], [str(program)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


def sanitize() -> str:
    """Runs the loops as built for training (vectorized), with the sanitizers; undefined behavior is fatal too."""
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    numeric = ["-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    return build_and_run(HERE / "sanitize.cpp", sanitizers + numeric)


if __name__ == "__main__":
    sys.stdout.write(sanitize())
