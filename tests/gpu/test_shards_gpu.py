# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that move all shards at once: the checks of tests/support, and what only a device has."""

import itertools

import pytest
import torch

import deepspeed_acco  # noqa: F401 (says how the kernels are loaded)
from deepspeed_acco.optim.flat import Shards
from tests.support import shards_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS, DTYPES
from tests.support.shards_checks import PLACES, SIZES

pytestmark = pytest.mark.gpu


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments("cuda"):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("grad_dtype, packed_dtype", DTYPE_PAIRS)
def test_pack(native, grad_dtype, packed_dtype):
    for places, (number, numel) in itertools.product(PLACES, enumerate(SIZES)):
        checks.check_pack(native, places, numel, grad_dtype, packed_dtype, device="cuda", shift=number % 3)
    checks.check_pack(native, PLACES[3], 100_002, grad_dtype, packed_dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_moves(native, dtype):
    for places, (number, numel) in itertools.product(PLACES, enumerate(SIZES)):
        checks.check_moves(native, places, numel, dtype, device="cuda", shift=number % 3)
    checks.check_moves(native, PLACES[3], 1_000_002, dtype, device="cuda")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_messages(native, dtype, bits):
    for places, (number, numel) in itertools.product(PLACES, enumerate(SIZES)):
        checks.check_messages(native, places, numel, dtype, bits, device="cuda", shift=number % 3)


def test_same_bits_whatever_the_grid(native):
    shards = Shards.of(PLACES[3], torch.device("cuda"))
    values = torch.randn(len(PLACES[3]) * 30_002, device="cuda")
    results = []
    for max_blocks in (0, 1, 7, 132):
        packed = torch.empty_like(values, dtype=torch.bfloat16)
        one, other = values.clone(), values.flip(0)
        with native.at_most_blocks(max_blocks):
            native.pack(values, packed, 1 / 3, clears=False, shards=shards)
            native.swap_shards(one, other, shards)
        results.append((packed, one, other))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


def test_more_than_32_bits(native):
    count, numel = 3, 2**30 + 6  # the last shard lies behind element 2^31
    if torch.cuda.mem_get_info()[0] < 14 * count * numel:
        pytest.skip(f"needs {14 * count * numel / 1e9:.0f} GB of free device memory")
    shards = Shards.of((1, 2, 0), torch.device("cuda"))
    ends = torch.tensor([0, 1, numel - 1], device="cuda")
    values = torch.zeros(count * numel, dtype=torch.bfloat16, device="cuda")
    for shard in range(count):
        values[shard * numel + ends] = 1.0 + shard
    target = torch.zeros_like(values)

    def require_placed(tensor):
        assert tensor.count_nonzero() == 3 * count
        for shard, place in enumerate(shards.places):
            assert (tensor[place * numel + ends] == 1.0 + shard).all()

    native.copy_shards(values, target, shards)
    require_placed(target)
    target.zero_()
    native.pack(values, target, 1.0, clears=False, shards=shards)
    require_placed(target)
    native.swap_shards(target, values, shards.inverse())
    require_placed(target)
