# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
r"""Emulates an accelerator by a module whose forward and backward take a given time and leave the CPU free.

Weights, gradients, optimizer, collectives and network are real; only the matrix products are replaced by waiting. The
backward writes a gradient of the parameters' size (it depends on the weights, so that training is not trivial).

As a script it trains that module under a DeepSpeed JSON:

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 \
        --module deepspeed_acco.tools.launch.emulated_accelerator --deepspeed_config F --steps 12
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

FORWARD_SHARE = 1 / 3  # of a micro-batch; a backward costs about twice its forward


class _Wait(torch.autograd.Function):
    """Passes a value on; its forward and its backward wait, and the backward makes the weight's gradient."""

    @staticmethod
    def forward(ctx, value, weight, milliseconds):
        """Waits a forward's share of ``milliseconds`` and returns the value plus a term that depends on the weight."""
        ctx.save_for_backward(weight)
        ctx.milliseconds = milliseconds
        _until(time.perf_counter(), milliseconds * FORWARD_SHARE)
        return value + weight[:1].float().sum()

    @staticmethod
    def backward(ctx, grad):
        """Waits a backward's share of the milliseconds and returns gradients of value and weight."""
        begin = time.perf_counter()
        (weight,) = ctx.saved_tensors
        gradient = (weight * 1e-3).mul_(grad)
        _until(begin, ctx.milliseconds * (1 - FORWARD_SHARE))
        return grad, gradient, None


def _until(begin: float, milliseconds: float) -> None:
    remaining = begin + milliseconds / 1e3 - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)


class EmulatedLayer(nn.Module):
    """Holds ``numel`` parameters in one vector; a module of its own, so that ZeRO-3 gathers it when it is its turn."""

    def __init__(self, numel: int, milliseconds: float):
        super().__init__()
        self.milliseconds = milliseconds
        self.weight = nn.Parameter(torch.randn(numel) * 0.02)

    def forward(self, value):
        """Passes the value on, after the wait of this layer."""
        return _Wait.apply(value, self.weight, self.milliseconds)


class EmulatedAccelerator(nn.Module):
    """Holds ``numel`` parameters in ``layers`` vectors; a forward with its backward takes ``micro_batch_ms``."""

    def __init__(self, numel: int, micro_batch_ms: float, layers: int = 20):
        super().__init__()
        self.layers = nn.ModuleList(EmulatedLayer(numel // layers, micro_batch_ms / layers) for _ in range(layers))

    def forward(self):
        """Passes a zero through all layers and returns it as the loss, a scalar."""
        value = torch.zeros((), requires_grad=True)
        for layer in self.layers:
            value = layer(value)
        return value


def main() -> None:
    """Trains for ``--steps`` optimizer steps; the JSON's batch sizes only count the micro-batches."""
    import deepspeed

    import deepspeed_acco  # noqa: F401

    parser = argparse.ArgumentParser(description="Train an emulated accelerator under a DeepSpeed JSON.")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights (default: %(default)s)")
    parser.add_argument("--micro_batch_ms", type=float, default=250.0, help="forward and backward together")
    parser.add_argument(
        "--slowness",
        nargs="+",
        type=float,
        default=[1.0],
        help="of each rank, 4 waits 4 times as long; one number is for all (default: 1)",
    )
    parser.add_argument("--numel", type=int, default=10_000_000, help="parameters (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    torch.set_num_threads(1)  # the host's part is the same in every configuration, however many cores there are
    deepspeed.init_distributed()
    ranks = torch.distributed.get_world_size()
    if len(arguments.slowness) not in (1, ranks):
        parser.error(f"--slowness has {len(arguments.slowness)} numbers; allowed: 1, or one for each of {ranks} ranks")
    slowness = arguments.slowness * ranks if len(arguments.slowness) == 1 else arguments.slowness
    torch.manual_seed(arguments.seed)
    milliseconds = arguments.micro_batch_ms * slowness[torch.distributed.get_rank()]
    module = EmulatedAccelerator(arguments.numel, milliseconds)
    engine, *_ = deepspeed.initialize(args=arguments, model=module, model_parameters=list(module.parameters()))
    while engine.global_steps < arguments.steps:  # however many micro-batches a step has: adaptive windows differ
        engine.backward(engine())
        engine.step()
    engine.destroy()


if __name__ == "__main__":
    main()
