# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks what the kernels must do, the same on every device: used by tests/optim (CPU) and tests/gpu (CUDA)."""

from __future__ import annotations

import itertools
import math

import torch

from deepspeed_acco.optim import adamw
from deepspeed_acco.optim.adamw import AdamWHyper, AdamWShard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
HYPER = AdamWHyper(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
# Around the powers of two where a vector, a block, a thread's share and a chunk of the sum begin or end.
SIZES = (0, 1, 31, *(2**k + d for k in (6, 10, 14, 15) for d in (-1, 1)), 3 * 2**15 + 5)
CANARY = 77.0
EPS = 2.0**-24  # half a unit in the last place of 1.0, fp32


class Surrounded:
    """Makes operands inside larger buffers, each at its own distance from the aligned begin, and sees what lies
    around."""

    def __init__(self, numel, device):
        self._numel, self._device = numel, device
        self._buffers = []

    def operand(self, values, dtype, offset):
        """Returns a view with the values in that dtype, so many elements behind the begin of its buffer."""
        buffer = torch.full((self._numel + offset + 8,), CANARY, dtype=dtype, device=self._device)
        view = buffer.narrow(0, offset, self._numel)
        view.copy_(values.to(dtype))
        self._buffers.append((buffer, offset))
        return view

    def require_untouched_around(self):
        """Requires that nothing was written outside of the operands."""
        for buffer, offset in self._buffers:
            assert (buffer[:offset] == CANARY).all() and (buffer[offset + self._numel :] == CANARY).all()


class Case(Surrounded):
    """Holds the operands of a round's update."""

    def __init__(self, numel, grad_dtype, out_dtype, *, device="cpu", shift=0, step=3.0, seed=0):
        super().__init__(numel, device)
        generator, operand = torch.Generator().manual_seed(seed), self.operand
        normal = torch.randn(4, numel, generator=generator)
        self.numel = numel
        self.grad = operand(normal[0] * 0.03, grad_dtype, shift)
        master = operand(normal[1] * 0.1, torch.float32, shift)
        exp_avg = operand(normal[2] * 0.01, torch.float32, 2 * shift)
        exp_avg_sq = operand(normal[3].square() * 1e-4, torch.float32, 3 * shift)
        self.out = operand(torch.full((numel,), -5.0), out_dtype, shift)
        self.shard = AdamWShard(master, exp_avg, exp_avg_sq, torch.tensor(step, device=device))
        self.scale = torch.tensor(0.37, device=device)
        self.is_finite = torch.tensor(True, device=device)

    def state(self):
        """Returns the shard's tensors by name."""
        return {name: getattr(self.shard, name) for name in ("master", "exp_avg", "exp_avg_sq", "step")}

    def snapshot(self):
        """Returns copies of the shard's tensors by name."""
        return {name: tensor.clone() for name, tensor in self.state().items()}

    def run(self, op):
        """Calls ``op`` with the operands."""
        op(self.shard, self.grad, HYPER, self.scale, self.is_finite, self.out)


def same_bits(a, b):
    """Tells whether both are equal, and NaN where the other is NaN."""
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a[~a.isnan()], b[~b.isnan()])


def float64_step(before, grad, scale, hyper=HYPER):
    """Returns AdamW's new state, in float64 of the very values the kernel was given, and the size of each rounding."""
    p, m, v = (before[name].double() for name in ("master", "exp_avg", "exp_avg_sq"))
    g = grad.double() * float(scale)
    step = float(before["step"]) + 1
    now_m = m * hyper.beta1 + g * (1 - hyper.beta1)
    now_v = v * hyper.beta2 + g * g * (1 - hyper.beta2)
    denominator = now_v.sqrt() / math.sqrt(1 - hyper.beta2**step) + hyper.eps
    change = hyper.lr / (1 - hyper.beta1**step) * now_m / denominator
    now_p = p * (1 - hyper.lr * hyper.weight_decay) - change
    # exp_avg may cancel: its error is a few roundings of the terms, and the weights inherit it through `change`.
    m_terms = m.abs() + g.abs()
    p_terms = p.abs() + change.abs() + hyper.lr / (1 - hyper.beta1**step) * m_terms / denominator
    expected = {"exp_avg": now_m, "exp_avg_sq": now_v, "master": now_p}
    return expected, {"exp_avg": m_terms, "exp_avg_sq": now_v.abs(), "master": p_terms}


def require_float64_agreement(now, before, grad, scale):
    """Requires that a commit's state is the float64 one up to a few roundings."""
    expected, terms = float64_step(before, grad, scale)
    for name, values in expected.items():
        error = (now[name].double() - values).abs()
        # 8 roundings: the longest chain, gradient to weight, has nine operations; they never all err one way.
        assert (error <= 8 * EPS * terms[name] + 1e-42).all(), f"{name}: {(error / terms[name]).max() / EPS} roundings"


def check_commit(ops, numel, grad_dtype, out_dtype, device="cpu", shift=0):
    """Checks a commit against float64: state, step and weights, and nothing written around them."""
    case = Case(numel, grad_dtype, out_dtype, device=device, shift=shift)
    before = case.snapshot()
    case.run(ops.adamw_commit)
    require_float64_agreement(case.state(), before, case.grad, case.scale)
    assert case.shard.step == before["step"] + 1
    assert same_bits(case.out, case.shard.master.to(out_dtype))
    case.require_untouched_around()


def check_estimate(ops, numel, grad_dtype, out_dtype, device="cpu", shift=0):
    """Checks that an estimate gives the weights of a commit to the bit and writes no state."""
    case = Case(numel, grad_dtype, out_dtype, device=device, shift=shift)
    twin = Case(numel, grad_dtype, out_dtype, device=device, shift=shift)
    before = case.snapshot()
    case.run(ops.adamw_estimate)
    for name, tensor in case.state().items():
        assert same_bits(tensor, before[name]), name
    case.require_untouched_around()
    twin.run(ops.adamw_commit)
    assert same_bits(case.out, twin.out)


def check_skip(ops, grad_dtype, out_dtype, device="cpu"):
    """Checks that with the flag down nothing moves, whatever the gradient and its scale are."""
    for op in (ops.adamw_commit, ops.adamw_estimate):
        for bad in (math.nan, math.inf, -math.inf):
            case = Case(1001, grad_dtype, out_dtype, device=device, shift=1)
            case.grad[::7] = bad
            case.scale.fill_(bad)
            case.is_finite.fill_(False)
            before = case.snapshot()
            case.run(op)
            for name, tensor in case.state().items():
                assert same_bits(tensor, before[name]), name
            assert same_bits(case.out, before["master"].to(out_dtype))
            case.require_untouched_around()


def check_non_finite(ops, grad_dtype, out_dtype, device="cpu"):
    """Checks that without the flag NaN and infinity do what arithmetic says, to their elements and to no other."""
    case = Case(1001, grad_dtype, out_dtype, device=device)
    case.grad[3] = math.nan
    case.grad[500] = math.inf
    case.grad[1000] = -math.inf
    others = torch.ones(1001, dtype=torch.bool, device=device)
    others[[3, 500, 1000]] = False
    before = case.snapshot()
    case.run(ops.adamw_commit)
    now = case.state()
    assert all(now[name][3].isnan() for name in ("master", "exp_avg", "exp_avg_sq")) and case.out[3].isnan()
    for place, sign in ((500, 1), (1000, -1)):
        assert now["exp_avg"][place] == sign * math.inf and now["exp_avg_sq"][place] == math.inf
        assert now["master"][place].isnan() and case.out[place].isnan()
    kept = {name: tensor[others] if tensor.dim() else tensor for name, tensor in before.items()}
    require_float64_agreement(
        {name: tensor[others] for name, tensor in now.items() if tensor.dim()}, kept, case.grad[others], case.scale
    )


def check_plain_path(ops, grad_dtype, out_dtype, device="cpu"):
    """Checks commits and an estimate by both paths: as close as two orders of the same fp32 operations are."""
    native = Case(5000, grad_dtype, out_dtype, device=device, step=0.0)
    plain = Case(5000, grad_dtype, out_dtype, device=device, step=0.0)
    for _ in range(5):
        native.run(ops.adamw_commit)
        plain.run(adamw.adamw_commit)
    for name, tensor in native.state().items():
        # A rounding of exp_avg, relative to its terms and not to a sum that cancels, five times over.
        torch.testing.assert_close(tensor, plain.state()[name], rtol=64 * EPS, atol=1e-8)
    native.run(ops.adamw_estimate)
    plain.run(adamw.adamw_estimate)
    bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[out_dtype]
    # A difference in the last fp32 place may fall on the other side of a tie of the 16-bit rounding.
    torch.testing.assert_close(native.out.float(), plain.out.float(), rtol=max(64 * EPS, 2.0 ** (1 - bits)), atol=1e-7)


def check_pack(ops, numel, grad_dtype, packed_dtype, device="cpu", shift=0):
    """Checks packing to the bit: the fp32 product rounded once, cleared or not, and nothing written around it."""
    for scale, clears in itertools.product((1.0, 0.125, 1 / 3), (False, True)):
        values = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(device, grad_dtype)
        grads = torch.full((numel + 9,), CANARY, dtype=grad_dtype, device=device)
        packed = torch.full((numel + 9,), CANARY, dtype=packed_dtype, device=device)
        source, target = grads.narrow(0, shift, numel), packed.narrow(0, 2 * shift, numel)
        source.copy_(values)
        ops.pack(source, target, scale, clears=clears)
        expected = (values.float() * torch.tensor(scale, dtype=torch.float32, device=device)).to(packed_dtype)
        assert same_bits(target, expected)
        assert same_bits(source, torch.zeros_like(values) if clears else values)
        assert (grads[:shift] == CANARY).all() and (grads[shift + numel :] == CANARY).all()
        assert (packed[: 2 * shift] == CANARY).all() and (packed[2 * shift + numel :] == CANARY).all()


def check_sum_of_squares(ops, numel, dtype, device="cpu", shift=0):
    """Checks the sum of squares against float64, the same at every address."""
    buffer = torch.randn(numel + shift, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    values = buffer.narrow(0, shift, numel)
    total = ops.sum_of_squares([values])
    assert total.dtype == torch.float64 and total.dim() == 0 and total.device == values.device
    # Squares of fp32 values are exact in float64; what is left are the float64 additions.
    torch.testing.assert_close(total, values.double().square().sum(), rtol=1e-12, atol=0.0)
    assert torch.equal(total, ops.sum_of_squares([values.clone()])), "the result depends on the address"


def check_error_and_step(ops, numel, live_dtype, device="cpu", shift=0):
    """Checks the error of an estimate and the step of a commit against float64, the same at every address."""
    case = Case(numel, torch.bfloat16, live_dtype, device=device, shift=shift)
    master, exp_avg, exp_avg_sq = (case.state()[name].double() for name in ("master", "exp_avg", "exp_avg_sq"))
    case.out.copy_(case.shard.master * 0.99)
    before = case.snapshot()
    sums = ops.sums_of_error_and_step(case.shard, HYPER, case.out)
    for name, tensor in case.state().items():
        assert same_bits(tensor, before[name]), name
    assert sums.dtype == torch.float64 and sums.shape == (2,) and sums.device == case.out.device
    step = float(case.shard.step)  # the commit in question is counted
    change = exp_avg / (exp_avg_sq.sqrt() / math.sqrt(1 - HYPER.beta2**step) + HYPER.eps)
    decay = HYPER.lr * HYPER.weight_decay
    moved = (change * HYPER.lr / (1 - HYPER.beta1**step) + master * decay) / (1 - decay)
    expected = torch.stack([(case.out.double() - master).square().sum(), moved.square().sum()])
    # A few roundings to fp32 of each element, of which sums of squares see twice as much.
    torch.testing.assert_close(sums, expected, rtol=32 * EPS, atol=0.0)
    twin = AdamWShard(*(tensor.clone() for tensor in before.values()))
    assert torch.equal(sums, ops.sums_of_error_and_step(twin, HYPER, case.out.clone())), "depends on the address"


def opcheck_arguments(device="cpu"):
    """Yields (operator, arguments) for torch.library.opcheck."""
    overloads = torch.ops.deepspeed_acco
    for grad_dtype, out_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        case = Case(100, grad_dtype, out_dtype, device=device)
        shard = case.shard
        numbers = (HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay)
        state = (shard.master, shard.exp_avg, shard.exp_avg_sq)
        arguments = (*state, shard.step, case.grad, case.scale, case.is_finite, *numbers, case.out)
        yield overloads.adamw_estimate.default, arguments
        yield overloads.adamw_commit.default, arguments
        yield overloads.grad_sumsq.default, (case.grad,)
        yield overloads.error_and_step.default, (*state, shard.step, *numbers, case.out)
        yield overloads.pack.default, (case.grad, case.out, 0.5, True)
        yield overloads.traffic_estimate.default, (*state, case.grad, case.out)
        yield overloads.traffic_commit.default, (*state, case.grad, case.out)


def check_conversions(ops, device="cpu"):
    """Checks that every 16-bit pattern in, and out the fp32 values around every tie, are converted as by torch."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
        widened = torch.empty(every.numel(), dtype=torch.float32, device=device)
        ops.pack(every.clone(), widened, 1.0, clears=False)
        assert same_bits(widened, every.float())
        if dtype == torch.bfloat16:
            upper = every.view(torch.int16).to(torch.int32) << 16
        else:
            upper = every.float().view(torch.int32)
        low = [0, 1, 2**12 - 1, 2**12, 2**12 + 1, 2**13 - 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1]
        floats = torch.cat([upper + d for d in low]).view(torch.float32)
        more = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(3), dtype=torch.int64)
        floats = torch.cat([floats, more.to(torch.int32).view(torch.float32).to(device)])
        narrowed = torch.empty(floats.numel(), dtype=dtype, device=device)
        ops.pack(floats.clone(), narrowed, 1.0, clears=False)
        assert same_bits(narrowed, floats.to(dtype))
