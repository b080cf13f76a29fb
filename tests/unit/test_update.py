"""The update in plain PyTorch against torch.optim.AdamW in float64, and what it must not touch."""

import math

import pytest
import torch

from deepspeed_acco.settings import AdamWHyper
from deepspeed_acco.update import AdamWShard, adamw_commit, adamw_estimate, sum_of_squares

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
