# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels on the host and counts: ``python -m tests.cuda_on_cpu``."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.cuda_on_cpu import build, library
from tests.cuda_on_cpu.faults import FAULTS


def _say(what: str, begin: float) -> None:
    print(f"{what}, {time.perf_counter() - begin:.0f} s", flush=True)


def _count_missed(folder: Path, cases: int) -> int:
    missed = 0
    for number, fault in enumerate(FAULTS):
        begin = time.perf_counter()
        is_found = fault.found_by in build.words_about(fault, folder / str(number), folder, cases)
        missed += not is_found
        _say(f"{fault.name}: {'found' if is_found else 'MISSED'}", begin)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} faults found")
    return missed


def main() -> int:
    """Runs what was asked for; returns 1 where a fault is missed, 2 where the toolkit is."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_cpu", description=__doc__.split(":")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=104, help="of each kernel (default: %(default)s)")
    parser.add_argument("--faults", action="store_true", help="also put every fault in, and see that it is found")
    parser.add_argument("--tests", action="store_true", help="also run the tests of the CPU's kernels on these")
    options = parser.parse_args()
    if build.toolkit() is None:
        print(f"the CUDA toolkit's headers were not found: {', '.join(build.HEADERS)} (CUDA_HOME)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as made:
        folder, begin = Path(made), time.perf_counter()
        program = build.build_program(folder)
        _say("built with sanitizers", begin)
        begin = time.perf_counter()
        printed = build.run_program(program, seed=options.seed, cases=options.cases, with_large=True)
        _say(printed.strip(), begin)
        missed = _count_missed(folder, options.cases) if options.faults else 0
        if options.tests:
            begin = time.perf_counter()
            passed, launches = library.run_tests(str(build.build_library(folder)))
            _say(f"{passed} tests of the CPU's kernels passed, {launches} launches", begin)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
