# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says by what a round's gradients are multiplied, and whether fp16's have overflowed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..optim.adamw import AdamWHyper
from ..runtime.communicator import max_over_ranks
from ..runtime.round_inputs import Contribution, RoundInputs
from .tensor_parallel import model_group_of


def hyper_of(optimizer) -> tuple[AdamWHyper, ...]:
    """Returns the hyper-parameters that each parameter group of DeepSpeed's optimizer has now."""
    return tuple(AdamWHyper.from_group(group) for group in optimizer.param_groups)


def round_inputs(optimizer, renormalize: float, window: int, contribution: Contribution | None) -> RoundInputs:
    """Captures what a round needs now of DeepSpeed's optimizer: learning rates and scales.

    The mean is the sum of what the backwards delivered over the number of ranks; fp16 divides before it sums, so that
    the sum cannot overflow. Adaptive windows divide by what all ranks computed, which only the round knows.

    Args:
        renormalize: what makes the mean of a part of the window that of all of it.
    """
    if not optimizer.postscale_gradients or optimizer.communication_data_type == torch.float16:
        pre_scale = 1.0 / optimizer.divisor
    else:
        pre_scale = 1.0 / optimizer.gradient_predivide_factor
    grad_scale = renormalize / (optimizer.divisor * pre_scale * optimizer.loss_scale)
    clip_grad = float(optimizer.clip_grad)  # a whole number of a JSON may have more digits than torch's integers
    return RoundInputs(hyper_of(optimizer), pre_scale, grad_scale, clip_grad, window, contribution)


def has_overflow(optimizer, accumulated: list[Tensor]) -> bool:
    """Tells whether any rank's own gradients are not finite: fp16's loss scaler must know before the step counts. Every
    rank asks, on DeepSpeed's group.

    Args:
        optimizer: DeepSpeed's, ours.
        accumulated: A, one flat tensor per parameter group. What is accumulated in fp32 must also survive the cast.
    """
    limit = torch.finfo(optimizer.communication_data_type).max
    groups = [group for group in (optimizer.dp_process_group, model_group_of(optimizer)) if group is not None]
    # The largest absolute value is NaN or inf where any element is; no temporary of the gradients' size is made.
    largest = torch.stack([torch.linalg.vector_norm(grads, float("inf")) for grads in accumulated])
    overflow = (~(largest <= limit)).any().to(torch.uint8)
    with optimizer.driver.bounded("the overflow check of fp16", *groups):
        for group in groups:
            max_over_ranks(overflow, group)
        return bool(overflow)
