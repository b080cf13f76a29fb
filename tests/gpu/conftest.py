# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Without a CUDA device these tests are skipped; with one, kernels that cannot be used are a failure."""

import os

import pytest
import torch

from deepspeed_acco.optim import ops
from deepspeed_acco.optim.native import kernels_reason
from tests.support.ranks import RankPool

_POOLS: dict[int, RankPool] = {}


@pytest.fixture(scope="session", autouse=True)
def native():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = kernels_reason("cuda")
    if reason:
        pytest.fail(f"the native kernels are not in use: {reason}")
    return ops


@pytest.fixture(scope="session")
def gpu_ranks(native):
    """``gpu_ranks(n)``: a pool of n ranks over NCCL, kept from test to test and made anew after a failure. More of them
    than devices share these, which NCCL allows from 2.30 on, where it is told so."""

    def pool(world_size: int) -> RankPool:
        if world_size > torch.cuda.device_count() and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
            pytest.skip(f"{world_size} ranks need as many devices, or NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL 2.30")
        if world_size not in _POOLS or not _POOLS[world_size].is_usable:
            _POOLS[world_size] = RankPool(world_size, start_method="spawn", device_type="cuda")
        return _POOLS[world_size]

    yield pool
    for made in _POOLS.values():
        made.close()
