# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the schedule local: the checks of tests/support."""

import pytest
import torch

import deepspeed_acco  # noqa: F401 (says how the kernels are loaded)
from tests.support import local_prediction_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS
from tests.support.local_prediction_checks import SHARDS, STEPS

pytestmark = pytest.mark.gpu


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments("cuda"):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("step", STEPS)
def test_roots(native, step):
    for numel in SHARDS:
        checks.check_roots(native, numel, step, device="cuda")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("weight_dtype, grad_dtype", DTYPE_PAIRS)
def test_prediction(native, weight_dtype, grad_dtype, shift):
    for shard_numel, step in zip(SHARDS, STEPS * 2):
        checks.check_prediction(native, shard_numel, 3, weight_dtype, grad_dtype, step, device="cuda", shift=shift)


@pytest.mark.parametrize("weight_dtype, grad_dtype", DTYPE_PAIRS)
def test_not_finite_and_plain_path(native, weight_dtype, grad_dtype):
    checks.check_not_finite(native, weight_dtype, grad_dtype, device="cuda")
    checks.check_distance_that_is_not_finite(native, weight_dtype, grad_dtype, device="cuda")
    checks.check_plain_path(native, weight_dtype, grad_dtype, device="cuda")
