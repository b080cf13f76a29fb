# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Without a CUDA device these tests are skipped; with one, kernels that cannot be used are a failure."""

import pytest
import torch

import deepspeed_acco  # noqa: F401 (says how the kernels are loaded)
from deepspeed_acco import ops


@pytest.fixture(scope="session", autouse=True)
def native():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = ops.kernels_reason("cuda")
    if reason:
        pytest.fail(f"the native kernels are not in use: {reason}")
    return ops
