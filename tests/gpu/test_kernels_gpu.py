# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels: the checks of tests/support, and what only a device has (streams, grids, no synchronization)."""

import pytest
import torch

import deepspeed_acco  # noqa: F401 (says how the kernels are loaded)
from deepspeed_acco.optim import ops
from tests.support import kernel_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS, DTYPES, HYPER, SIZES, Case, same_bits

pytestmark = pytest.mark.gpu


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments("cuda"):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("grad_dtype, out_dtype", DTYPE_PAIRS)
def test_rounds(native, grad_dtype, out_dtype, shift):
    for numel in SIZES:
        checks.check_commit(native, numel, grad_dtype, out_dtype, device="cuda", shift=shift)
        checks.check_estimate(native, numel, grad_dtype, out_dtype, device="cuda", shift=shift)


@pytest.mark.parametrize("grad_dtype, out_dtype", DTYPE_PAIRS)
def test_skip_non_finite_and_plain_path(native, grad_dtype, out_dtype):
    checks.check_skip(native, grad_dtype, out_dtype, device="cuda")
    checks.check_non_finite(native, grad_dtype, out_dtype, device="cuda")
    checks.check_plain_path(native, grad_dtype, out_dtype, device="cuda")


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("grad_dtype, packed_dtype", DTYPE_PAIRS)
def test_pack(native, grad_dtype, packed_dtype, shift):
    for numel in SIZES:
        checks.check_pack(native, numel, grad_dtype, packed_dtype, device="cuda", shift=shift)


@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares(native, dtype, shift):
    # Around a tile; and where a chunk has one, two and three of them.
    for numel in (*SIZES, 2**12 - 1, 2**12, 2**12 + 1, 2**24, 2**24 + 1, 2**25 + 2**13 + 5):
        checks.check_sum_of_squares(native, numel, dtype, device="cuda", shift=shift)


@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize("live_dtype", DTYPES)
def test_error_and_step(native, live_dtype, shift):
    for numel in (*SIZES, 2**12, 2**24 + 1):
        checks.check_error_and_step(native, numel, live_dtype, device="cuda", shift=shift)


def test_conversions(native):
    checks.check_conversions(native, device="cuda")


def test_same_bits_whatever_the_grid(native):
    numbers = (HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay)
    results = []
    for max_blocks in (0, 1, 7, 132):
        case = Case(2**17 + 3, torch.bfloat16, torch.bfloat16, device="cuda")
        shard = case.shard
        state = (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step)
        torch.ops.deepspeed_acco.adamw_commit(
            *state, case.grad, case.scale, case.is_finite, *numbers, case.out, max_blocks=max_blocks
        )
        sums = torch.ops.deepspeed_acco.error_and_step(*state, *numbers, case.grad, max_blocks=max_blocks)
        results.append([*state, case.out, sums])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))


def test_runs_on_the_current_stream_and_waits_for_nothing(native):
    side = torch.cuda.Stream()
    case = Case(2**20, torch.bfloat16, torch.bfloat16, device="cuda")
    twin = Case(2**20, torch.bfloat16, torch.bfloat16, device="cuda")
    twin.run(native.adamw_commit)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            case.scale.mul_(1.0)  # behind the sleep: the kernel must not overtake it
            case.run(native.adamw_commit)
            native.sum_of_squares([case.grad])
            assert not side.query(), "the host waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    assert same_bits(case.out, twin.out)


def test_more_than_32_bits(native):
    numel = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 24 * numel:
        pytest.skip(f"needs {24 * numel / 1e9:.0f} GB of free device memory")
    state = [torch.zeros(numel, device="cuda") for _ in range(3)]
    grad = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    grad[[0, 2**31 - 1, 2**31, numel - 1]] = 1.0
    out = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    shard = ops.AdamWShard(*state, torch.zeros((), device="cuda"))
    scale, is_finite = torch.ones((), device="cuda"), torch.ones((), dtype=torch.bool, device="cuda")
    native.adamw_commit(shard, grad, HYPER, scale, is_finite, out)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert getattr(shard, name).count_nonzero() == 4, name
    assert out.count_nonzero() == 4 and out[numel - 1] == out[0] != 0
    assert native.sum_of_squares([grad]) == 4.0
    native.pack(grad, out, 1.0, clears=True)
    assert out.count_nonzero() == 4 and grad.count_nonzero() == 0
