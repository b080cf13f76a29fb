# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
import pytest

import deepspeed_acco  # noqa: F401 (says how the kernels are loaded)
from deepspeed_acco import ops


@pytest.fixture(scope="session")
def native():
    """ops.py with the native kernels loaded. Where they cannot be built the tests fail; they are never skipped."""
    reason = ops.kernels_reason("cpu")
    if reason:
        pytest.fail(f"the native kernels are not in use: {reason}")
    return ops
