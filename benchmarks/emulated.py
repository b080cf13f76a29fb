# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""An emulated accelerator: a module whose forward and backward take a given time and leave the CPU free.

Weights, gradients, optimizer, collectives and network are real; only the matrix products are replaced by waiting. The
backward writes a gradient of the parameters' size (it depends on the weights, so that training is not trivial).
"""

import time

import torch
from torch import nn

FORWARD_SHARE = 1 / 3  # of a micro-batch; a backward costs about twice its forward


class _Layer(torch.autograd.Function):
    """Passes a value on; its forward and its backward wait, and the backward makes the weight's gradient."""

    @staticmethod
    def forward(ctx, value, weight, milliseconds):
        ctx.save_for_backward(weight)
        ctx.milliseconds = milliseconds
        _until(time.perf_counter(), milliseconds * FORWARD_SHARE)
        return value + weight[:1].float().sum()

    @staticmethod
    def backward(ctx, grad):
        begin = time.perf_counter()
        (weight,) = ctx.saved_tensors
        gradient = (weight * 1e-3).mul_(grad)
        _until(begin, ctx.milliseconds * (1 - FORWARD_SHARE))
        return grad, gradient, None


def _until(begin: float, milliseconds: float) -> None:
    remaining = begin + milliseconds / 1e3 - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)


class EmulatedAccelerator(nn.Module):
    """``numel`` parameters in ``layers`` vectors; a forward and its backward together take ``micro_batch_ms``."""

    def __init__(self, numel: int, micro_batch_ms: float, layers: int = 20):
        super().__init__()
        self.micro_batch_ms = micro_batch_ms
        self.layers = nn.ParameterList(torch.randn(numel // layers) * 0.02 for _ in range(layers))

    def forward(self):
        value = torch.zeros((), requires_grad=True)
        for weight in self.layers:
            value = _Layer.apply(value, weight, self.micro_batch_ms / len(self.layers))
        return value
