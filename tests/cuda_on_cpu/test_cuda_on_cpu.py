# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: emulated under sanitizers, with faults put in, and in the place of the CPU's."""

import re

import pytest

from deepspeed_acco.algorithm.window import phase_a_micro_batches
from tests.cuda_on_cpu import build, library
from tests.cuda_on_cpu.faults import FAULTS
from tests.engine.test_equality import check_equal
from tests.support import oracle, training
from tests.support.ranks import RankPool

pytestmark = [
    pytest.mark.skipif(
        build.toolkit() is None, reason=f"the CUDA toolkit's headers were not found: {', '.join(build.HEADERS)}"
    ),
    pytest.mark.timeout(900),  # the compiler's time is in it
]
CASES = 104  # of each kernel: four of every size


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build.build_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return str(build.build_library(tmp_path_factory.mktemp("library")))


@pytest.mark.full
def test_every_kernel_under_sanitizers(program):
    printed = build.run_program(program, cases=CASES)
    assert len(re.findall(rf"^\w+: {CASES} cases$", printed, re.MULTILINE)) == 15
    assert int(re.search(r"^(\d+) launches, nothing wrong$", printed, re.MULTILINE)[1]) >= 15 * CASES


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3])
def test_more_cases(program, seed):
    assert "nothing wrong" in build.run_program(program, seed=seed, cases=1040, with_large=True)


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(program, fault, tmp_path):
    assert fault.found_by in build.words_about(fault, tmp_path, program.parent, CASES)


@pytest.mark.full
@pytest.mark.native  # not built within the command
def test_tests_of_the_kernels_pass_on_emulated_ones(emulated):
    passed, launches = library.run_tests(emulated)
    assert passed >= 220 and launches >= 4000


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("schedule", ["acco", "local"])
def test_training_on_emulated_kernels_equals_the_reference(emulated, schedule):
    n, windows = 4, 12
    pool = RankPool(2)  # of processes that have no kernels yet, and that nobody uses again
    try:
        config = training.ds_config(n, 2.0, schedule=schedule)
        records = pool.run(library.train, path=emulated, config=config, windows=windows)
    finally:
        pool.close()
    a = phase_a_micro_batches(n, 0.5)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=windows, n=n, a=a, clip=2.0)
    check_equal(records, reference, windows, delay=1)
    assert all(record["launches"] >= 2 * windows for record in records)
