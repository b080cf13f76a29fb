# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels on the host and counts: ``python -m tests.cuda_on_cpu``."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.faults import FAULTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_cpu", description=__doc__.split(":")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=208, help="of each kernel (default: %(default)s)")
    parser.add_argument("--faults", action="store_true", help="also put every fault in, and see that it is found")
    options = parser.parse_args()
    if build.toolkit() is None:
        print(f"the CUDA toolkit's headers were not found: {', '.join(build.HEADERS)} (CUDA_HOME)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as made:
        begin = time.perf_counter()
        folder = Path(made)
        program = build.build_program(folder)
        print(f"built with sanitizers in {time.perf_counter() - begin:.0f} s")
        begin = time.perf_counter()
        print(build.run_program(program, seed=options.seed, cases=options.cases), end="")
        print(f"in {time.perf_counter() - begin:.0f} s")
        missed = 0
        for number, fault in enumerate(FAULTS if options.faults else ()):
            begin = time.perf_counter()
            words = build.words_about(fault, folder / str(number), folder, options.cases)
            is_found = fault.found_by in words
            missed += not is_found
            print(f"{fault.name}: {'found' if is_found else 'MISSED'} in {time.perf_counter() - begin:.0f} s")
        if options.faults:
            print(f"{len(FAULTS) - missed} of {len(FAULTS)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
