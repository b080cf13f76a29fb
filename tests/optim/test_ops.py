# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels: schemas, numbers, skipping, threads."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_acco.optim import local_prediction
from deepspeed_acco.optim.adamw import AdamWShard
from deepspeed_acco.optim.flat import Shards
from tests.support import kernel_checks as checks
from tests.support.kernel_checks import DTYPE_PAIRS, DTYPES, HYPER, SIZES, Case, same_bits


def test_opcheck(native):
    for op, arguments in checks.opcheck_arguments():
        torch.library.opcheck(op, arguments)


def test_estimate_marks_no_state_as_mutable(native):
    schema = torch.ops.deepspeed_acco.adamw_estimate.default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == ["out"]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("grad_dtype, out_dtype", DTYPE_PAIRS)
def test_commit_against_float64(native, grad_dtype, out_dtype, shift):
    for numel in SIZES:
        checks.check_commit(native, numel, grad_dtype, out_dtype, shift=shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("grad_dtype, out_dtype", DTYPE_PAIRS)
def test_estimate_writes_weights_alone(native, grad_dtype, out_dtype, shift):
    for numel in SIZES:
        checks.check_estimate(native, numel, grad_dtype, out_dtype, shift=shift)


@pytest.mark.parametrize("grad_dtype, out_dtype", DTYPE_PAIRS)
def test_skip_moves_nothing(native, grad_dtype, out_dtype):
    checks.check_skip(native, grad_dtype, out_dtype)


@pytest.mark.parametrize("grad_dtype, out_dtype", DTYPE_PAIRS)
def test_non_finite_without_skip(native, grad_dtype, out_dtype):
    checks.check_non_finite(native, grad_dtype, out_dtype)


@pytest.mark.parametrize("grad_dtype, out_dtype", DTYPE_PAIRS)
def test_agrees_with_the_plain_path(native, grad_dtype, out_dtype):
    checks.check_plain_path(native, grad_dtype, out_dtype)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("grad_dtype, packed_dtype", DTYPE_PAIRS)
def test_pack(native, grad_dtype, packed_dtype, shift):
    for numel in SIZES:
        checks.check_pack(native, numel, grad_dtype, packed_dtype, shift=shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares(native, dtype, shift):
    for numel in SIZES:
        checks.check_sum_of_squares(native, numel, dtype, shift=shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("live_dtype", DTYPES)
def test_error_and_step(native, live_dtype, shift):
    for numel in SIZES:
        checks.check_error_and_step(native, numel, live_dtype, shift=shift)


def test_conversions(native):
    checks.check_conversions(native)


def test_past_the_cache(native):
    """Large outputs take another way to memory (streamed stores), with the same bits: compare with the parts of it."""
    numel = 2**21 + 77
    for shift in (0, 1, 3):
        whole = Case(numel, torch.bfloat16, torch.bfloat16, shift=shift)
        parts = Case(numel, torch.bfloat16, torch.bfloat16, shift=shift)
        whole.run(native.adamw_commit)
        whole.require_untouched_around()
        for start in range(0, numel, 2**19):
            at = slice(start, min(start + 2**19, numel))
            state = parts.shard
            piece = AdamWShard(state.master[at], state.exp_avg[at], state.exp_avg_sq[at], state.step.clone())
            native.adamw_commit(piece, parts.grad[at], HYPER, parts.scale, parts.is_finite, parts.out[at])
        assert same_bits(whole.out, parts.out)
        for name in ("master", "exp_avg", "exp_avg_sq"):
            assert same_bits(whole.state()[name], parts.state()[name])
        checks.check_pack(native, numel, torch.float32, torch.float32, shift=shift)


def _sums(ops, case):
    return ops.sum_of_squares([case.shard.exp_avg]), ops.sums_of_error_and_step(case.shard, HYPER, case.out)


def _all_results(ops, numel):
    case = Case(numel, torch.bfloat16, torch.bfloat16, shift=1)
    case.run(ops.adamw_estimate)
    results = [case.out.clone()]
    case.run(ops.adamw_commit)
    packed = torch.empty(numel, dtype=torch.bfloat16)
    ops.pack(case.shard.master, packed, 1 / 3, clears=False)
    return [*results, case.out, *case.state().values(), packed, *_sums(ops, case)]


@pytest.mark.parametrize("numel", [2**15 + 1, 2**17 - 3, 2**21 + 5])
def test_same_bits_whatever_the_threads(native, numel):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _all_results(native, numel)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            for one, several in zip(alone, _all_results(native, numel)):
                assert same_bits(one, several), count
    finally:
        torch.set_num_threads(threads)


def test_refuses_what_it_cannot_do(native):
    def run(change):
        case = Case(8, torch.float32, torch.float32)
        change(case)
        case.run(native.adamw_commit)

    def set_out(case):
        case.out = case.out[:7]

    def set_stride(case):
        case.grad = torch.zeros(16)[::2]

    def set_dtype(case):
        case.grad = case.grad.double()

    def set_state(case):
        case.shard.exp_avg = case.shard.exp_avg.bfloat16()

    def set_scale(case):
        case.scale = case.scale.double()

    for change, message in (
        (set_out, "out has 7 elements, expected 8"),
        (set_stride, "grad must be 1-D and contiguous"),
        (set_dtype, "allowed: float32, bfloat16, float16"),
        (set_state, "the state must be float32"),
        (set_scale, "grad_scale must be 0-dim"),
    ):
        with pytest.raises(ValueError, match=message):
            run(change)


def test_the_bound_on_thread_blocks_reaches_every_kernel(native):
    """CPU kernels take it and have no use for it; that the bits stay the same on CUDA is for tests/gpu."""
    case = Case(600, torch.float32, torch.float32)
    squares, roots, records = case.shard.exp_avg_sq, torch.ones(3), torch.zeros(304, dtype=torch.uint8)
    on = local_prediction.Operands(case.grad, case.shard.master, case.out, case.grad, roots, case.shard.step, 600)
    with native.at_most_blocks(7):
        with Calls() as calls:
            case.run(native.adamw_commit)
            case.run(native.adamw_estimate)
            native.sum_of_squares([case.grad, case.out])
            native.sums_of_error_and_step(case.shard, HYPER, case.out)
            native.pack(case.grad, case.out, 1.0, clears=False)
            native.copy_shards(case.grad, case.out, Shards.of([1, 0], torch.device("cpu")))
            native.swap_shards(case.grad, case.out)
            native.block_roots(squares, case.shard.step, 0.9, 1e-8, roots)
            native.predict_locally(on, HYPER, 1.0, case.scale, case.is_finite)
            native.quantize(case.grad[:512], records[:260], 4, 1.0)
            native.add_change(records[:260], case.is_finite, case.out[:512], 4)
            native.dequantize_sum([records[:260]], case.out[:512], 4)
            update = (case.shard, case.grad, HYPER, case.scale, case.is_finite)
            native.adamw_estimate_change(*update, torch.float32, torch.zeros(306).byte(), 4)
            native.adamw_estimate_change(*update, torch.float32, torch.zeros(306).byte(), 4, case.out)
            native.adamw_commit_change(*update, case.out, torch.zeros(306).byte(), 4)
    assert len(calls.bounds) == 16 and set(calls.bounds) == {7}
    with Calls() as calls:
        native.sum_of_squares([case.grad])
    assert all(map(torch.is_tensor, calls.bounds)), "the bound ends with its block"


class Calls(TorchDispatchMode):
    """Collects the last arguments of the native operators."""

    def __init__(self):
        super().__init__()
        self.bounds = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deepspeed_acco":
            self.bounds.append(args[-1])  # the last of the schema: torch drops it where it is the default
        return function(*args, **(kwargs or {}))
