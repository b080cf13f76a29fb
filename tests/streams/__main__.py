# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Trains on modelled streams and counts: ``python -m tests.streams``."""

import argparse
import sys
import tempfile
import time
from collections import Counter

from tests.streams import scenarios
from tests.streams.clocks import ANSWERS
from tests.streams.faults import FAULTS
from tests.streams.scenarios import SCENARIOS
from tests.support.ranks import RankPool


def _run(pool: RankPool, **arguments) -> list[scenarios.Seen]:
    with tempfile.TemporaryDirectory() as folder:
        return pool.run(scenarios.run, folder=folder, **arguments)


def main() -> int:
    """Runs all scenarios and faults; returns 1 where anything was not ordered, or a fault was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.streams", description=__doc__.split(":")[0])
    parser.add_argument("--ranks", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of random answers (default: %(default)s)")
    options = parser.parse_args()
    pool, one = RankPool(options.ranks), RankPool(1)
    findings, operators, begin = 0, Counter(), time.perf_counter()
    for name in SCENARIOS:
        for answers in ANSWERS:
            where = dict(ranks_per_host=options.ranks_per_host, seed=options.seed)
            for seen in _run(pool, name=name, answers=answers, **where):
                operators.update(seen.operators)
                findings += len(seen.findings)
                for finding in seen.findings:
                    print(f"{name}, {answers}: {finding}", flush=True)
    runs = len(SCENARIOS) * len(ANSWERS)
    print(f"{len(SCENARIOS)} scenarios, {runs} runs, {operators.total()} operators, {len(operators)} kinds of them")
    print(f"{findings} not ordered, {time.perf_counter() - begin:.0f} s", flush=True)
    missed, begin = 0, time.perf_counter()
    for name, fault in FAULTS.items():
        (seen,) = _run(one, name=fault.scenario, answers=fault.answers, fault=name)
        missed += not fault.is_found_in(seen)
        print(f"{name}: {'found' if fault.is_found_in(seen) else 'MISSED'}", flush=True)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} faults found, {time.perf_counter() - begin:.0f} s")
    pool.close()
    one.close()
    return 1 if missed or findings else 0


if __name__ == "__main__":
    sys.exit(main())
