# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""How large a learning rate each schedule bears: on a quadratic loss, with momentum and without gradient noise.

    python benchmarks/stability.py

Along one direction with curvature h (of the loss, divided by AdamW's root) every schedule is a linear map of its own
state, stable while no eigenvalue is larger than 1. Printed is the largest lr * h that is, found by bisection. Large
models train near ZeRO-1's limit (the "edge of stability"), so a schedule with a lower one cannot go where ZeRO-1 does.
"""

import argparse

import numpy as np


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
    """Largest h, with a learning rate of 1, whose map does not grow."""
    low, high = 0.0, 1000.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        grows = np.abs(np.linalg.eigvals(np.array(schedule(middle, *arguments)))).max() > 1 + 1e-9
        low, high = (low, middle) if grows else (middle, high)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta1", type=float, default=0.9, help="(default: %(default)s)")
    beta = parser.parse_args().beta1
    for schedule in (sync, wp, dpu):
        print(f"{schedule.__name__:<28} {limit(schedule, beta):6.2f}")
    for fraction in (0.25, 0.5, 0.625, 0.75):
        print(f"{f'acco, estimate_fraction {fraction:g}':<28} {limit(acco, beta, fraction):6.2f}")


if __name__ == "__main__":
    main()
