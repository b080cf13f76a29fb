# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Without a CUDA device these tests are skipped; with one, kernels that cannot be used are a failure."""

import pytest
import torch

from deepspeed_acco.optim import ops
from deepspeed_acco.optim.native import kernels_reason


@pytest.fixture(scope="session", autouse=True)
def native():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = kernels_reason("cuda")
    if reason:
        pytest.fail(f"the native kernels are not in use: {reason}")
    return ops
