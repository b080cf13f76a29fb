"""The update in plain PyTorch against torch.optim.AdamW in float64, and what it must not touch."""

import dataclasses
import math

import pytest
import torch

from deepspeed_acco.optim.adamw import AdamWHyper, AdamWShard, adamw_commit, adamw_estimate, sums_of_error_and_step
from deepspeed_acco.optim.flat import sum_of_squares

HYPER = AdamWHyper(lr=3e-2, beta1=0.7, beta2=0.95, eps=1e-7, weight_decay=0.2)


def _shard(numel, steps, seed=0):
    """A shard after some AdamW steps of torch's own, in float64, and those optimizer and parameter."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(numel, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW(
        [param], lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, weight_decay=HYPER.weight_decay
    )
    for _ in range(steps):
        param.grad = torch.randn(numel, generator=generator, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[param] if steps else {}
    zeros = torch.zeros(numel, dtype=torch.float64)
    shard = AdamWShard(
        param.detach().float(),
        state.get("exp_avg", zeros).float(),
        state.get("exp_avg_sq", zeros).float(),
        torch.tensor(float(steps)),
    )
    return shard, optimizer, param, torch.randn(numel, generator=generator)


def _copy(shard):
    return AdamWShard(*(t.clone() for t in (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step)))


def _tensors(shard):
    return {"master": shard.master, "exp_avg": shard.exp_avg, "exp_avg_sq": shard.exp_avg_sq, "step": shard.step}


@pytest.mark.parametrize("numel", [0, 1, 31, 2**15 - 1, 2**15, 2**15 + 1, 100_003])
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_commit_and_estimate_against_torch(numel, steps, out_dtype):
    shard, optimizer, param, grad = _shard(numel, steps)
    scale, finite = torch.tensor(0.37), torch.tensor(True)
    before = _copy(shard)
    out = torch.full((numel,), math.nan, dtype=out_dtype)
    adamw_estimate(shard, grad, HYPER, scale, finite, out)
    for name, tensor in _tensors(shard).items():
        assert tensor.equal(_tensors(before)[name]), f"the estimate changed {name}"
    committed = torch.full((numel,), math.nan, dtype=out_dtype)
    adamw_commit(shard, grad, HYPER, scale, finite, committed)
    assert out.equal(committed)
    assert out.equal(shard.master.to(out_dtype))

    param.grad = grad.double() * 0.37
    optimizer.step()
    state = optimizer.state[param]
    expected = {"master": param.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    for name, tensor in expected.items():
        torch.testing.assert_close(_tensors(shard)[name].double(), tensor, rtol=2e-6, atol=2e-7, msg=name)
    assert shard.step == steps + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [1.0, math.nan, 0.0])
def test_a_skipped_step_changes_nothing(bad, scale):
    shard, _, _, grad = _shard(1000, 3)
    grad[17] = bad
    before = _copy(shard)
    out = torch.empty(1000, dtype=torch.bfloat16)
    for update in (adamw_commit, adamw_estimate):
        update(shard, grad, HYPER, torch.tensor(scale), torch.tensor(False), out)
        for name, tensor in _tensors(shard).items():
            assert tensor.equal(_tensors(before)[name]), name
        assert out.equal(shard.master.bfloat16())


def test_bits_do_not_depend_on_threads():
    results = []
    kept = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        shard, _, _, grad = _shard(300_001, 2)
        out = torch.empty(300_001, dtype=torch.bfloat16)
        adamw_commit(shard, grad, HYPER, torch.tensor(0.3), torch.tensor(True), out)
        results.append((shard.master, shard.exp_avg, shard.exp_avg_sq, out, sum_of_squares([grad, grad[5:]])))
    torch.set_num_threads(kept)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other))


def test_sum_of_squares():
    parts = [torch.randn(100_003), torch.zeros(0), torch.full((3,), 1e20)]
    exact = sum((part.double() ** 2).sum() for part in parts)
    torch.testing.assert_close(sum_of_squares(parts), exact, rtol=1e-12, atol=0)
    assert sum_of_squares([torch.tensor([1.0, math.nan])]).isnan()
    assert sum_of_squares([torch.tensor([1.0, math.inf])]).isinf()


@pytest.mark.parametrize("numel", [0, 1, 2**15 + 1, 100_003])
@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2, 20.0])
@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
def test_error_and_step_of_a_commit_against_clones(numel, steps, weight_decay, live_dtype):
    """The step is recomputed from the state: compare with torch's AdamW in float64 that kept the weights before."""
    shard, optimizer, param, grad = _shard(numel, steps)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    stands_at = (shard.master + 1e-2 * torch.randn(numel)).to(live_dtype)
    before = param.detach().clone()
    hyper = dataclasses.replace(HYPER, weight_decay=weight_decay)
    adamw_commit(shard, grad, hyper, torch.tensor(0.37), torch.tensor(True), torch.empty(numel))
    kept = _copy(shard)
    error, step = sums_of_error_and_step(shard, hyper, stands_at)
    for name, tensor in _tensors(shard).items():
        assert tensor.equal(_tensors(kept)[name]), f"measuring changed {name}"

    param.grad = grad.double() * 0.37
    optimizer.step()
    after = param.detach()
    torch.testing.assert_close(step.sqrt(), (after - before).norm(), rtol=1e-5, atol=0)
    # The master is rounded to fp32, which shows where it is near the bf16 weight.
    rounding = 2e-7 * float(after.norm())
    torch.testing.assert_close(error.sqrt(), (stands_at.double() - after).norm(), rtol=1e-5, atol=rounding)


def test_no_step_is_known_where_the_decay_leaves_nothing_of_the_weights_before():
    hyper = dataclasses.replace(HYPER, lr=0.5, weight_decay=2.0)
    shard, _, _, grad = _shard(10, 1)
    adamw_commit(shard, grad, hyper, torch.tensor(1.0), torch.tensor(True), torch.empty(10))
    assert sums_of_error_and_step(shard, hyper, shard.master)[1].isnan()
