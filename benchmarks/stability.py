# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""How large a learning rate each schedule bears: on a quadratic loss, with momentum and without gradient noise.

    python benchmarks/stability.py

Along one direction with curvature h (of the loss, divided by AdamW's root) every schedule is a linear map of its own
state, stable while no eigenvalue is larger than 1. Told is the largest lr * h that is, found by bisection. Large
models train near ZeRO-1's limit (the "edge of stability"), so a schedule with a lower one cannot go where ZeRO-1 does.

In ``local`` each rank stands elsewhere. Their mean goes as in ``sync``; how far they are apart is a map of its own,
whose limit depends on the part that a rank keeps of its distance (deepspeed_acco/optim/local_prediction.py).
"""

import numpy as np
from _common import make_parser, origin, tell


def sync(h, beta):
    weights, momentum = np.eye(2)
    momentum = beta * momentum + (1 - beta) * h * weights
    return weights - momentum, momentum


def acco(h, beta, fraction):
    weights, momentum, estimate = np.eye(3)
    in_phase_a, in_phase_b = h * estimate, h * weights
    estimate = weights - (beta * momentum + (1 - beta) * in_phase_a)
    momentum = beta * momentum + (1 - beta) * (fraction * in_phase_a + (1 - fraction) * in_phase_b)
    return weights - momentum, momentum, estimate


def local(h, beta):
    weights, momentum, gradient = np.eye(3)  # the gradient still travels; every rank has it, where there is no noise
    momentum = beta * momentum + (1 - beta) * gradient
    weights = weights - momentum  # the commit, and what each rank predicted of it
    return weights, momentum, h * weights


def local_apart(h, beta, kept):
    (distance,) = np.eye(1)
    return (kept * beta * distance - (1 - beta) * h * distance,)


def wp(h, beta):
    weights, momentum, prediction, gradient = np.eye(4)
    momentum = beta * momentum + (1 - beta) * gradient
    weights = weights - momentum
    following = weights - (beta * momentum + (1 - beta) * gradient)
    return weights, momentum, following, h * prediction


def dpu(h, beta):
    weights, momentum, before = np.eye(3)
    momentum = beta * momentum + (1 - beta) * h * before
    return weights - momentum, momentum, weights


def limit(schedule, *arguments) -> float:
    """Returns the largest h, with a learning rate of 1, whose map does not grow."""
    low, high = 0.0, 1000.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        grows = np.abs(np.linalg.eigvals(np.array(schedule(middle, *arguments)))).max() > 1 + 1e-9
        low, high = (low, middle) if grows else (middle, high)
    return low


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--beta1", type=float, default=0.9, help="(default: %(default)s)")
    arguments = parser.parse_args()
    limits = {schedule.__name__: limit(schedule, arguments.beta1) for schedule in (sync, local, wp, dpu)}
    for fraction in (0.25, 0.5, 0.625, 0.75):
        limits[f"acco, estimate_fraction {fraction:g}"] = limit(acco, arguments.beta1, fraction)
    for kept in (0, 0.25, 1):
        limits[f"local, ranks apart, {kept:g} kept"] = limit(local_apart, arguments.beta1, kept)
    rows = [{"schedule": name, "largest_lr_times_curvature": round(value, 2)} for name, value in limits.items()]
    tell({**origin(), "beta1": arguments.beta1, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
