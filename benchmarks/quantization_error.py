# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""How far AdamW's step is off where its gradients were sent in few bits: the example's, along one exact training.

    python benchmarks/quantization_error.py --out benchmarks/results/quantization_error.json

Beside the exact state each kind of bits has an AdamW state of its own, which sees the same gradients of two ranks as
it sends them. Told is |step - exact step| / |exact step|, before learning rate and decay, in the first ten steps and in
the second half of all: levels of the values, levels of their square roots (what ``estimate_comm`` and ``commit_comm``
send), and bf16.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from _common import make_parser, origin, tell
from estimate_bits import Example, flatten
from torch import Tensor

BETA1, BETA2, EPS, CLIP = 0.9, 0.95, 1e-8, 1.0
EARLY = 10  # steps


def kinds(shard_numel: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns what each kind makes of a float64 gradient."""
    from deepspeed_acco.algorithm.reference import quantized

    of_bits = {
        f"{bits} bits, levels of {'roots' if of_roots else 'values'}": partial(
            quantized, bits=bits, shard_numel=shard_numel, of_roots=of_roots
        )
        for bits in (8, 4)
        for of_roots in (False, True)
    }
    return {"exact": lambda g: g, "bf16": lambda g: g.bfloat16().double(), **of_bits}


class AdamWStep:
    """Holds exp_avg and exp_avg_sq, and returns what AdamW divides the one by the root of the other to."""

    def __init__(self, numel: int):
        self.exp_avg, self.exp_avg_sq = (torch.zeros(numel, dtype=torch.float64) for _ in range(2))
        self.step = 0

    def of(self, gradient: Tensor) -> Tensor:
        g = gradient / max(1.0, float(gradient.norm()) / CLIP)
        self.step += 1
        self.exp_avg.lerp_(g, 1 - BETA1)
        self.exp_avg_sq.lerp_(g * g, 1 - BETA2)
        root = (self.exp_avg_sq / (1 - BETA2**self.step)).sqrt() + EPS
        return self.exp_avg / (1 - BETA1**self.step) / root


def measure(arguments) -> list[dict]:
    from train_gpt import lr_factor

    example = Example(arguments, arguments.seed)
    weights = flatten([parameter.detach() for parameter in example.parameters]).double()
    shard_numel = -(-weights.numel() // (2 * arguments.ranks)) * 2  # as DeepSpeed pads them
    sent_as = kinds(shard_numel)
    states = {kind: AdamWStep(weights.numel()) for kind in sent_as}
    errors: dict[str, list[float]] = {kind: [] for kind in sent_as if kind != "exact"}
    for step in range(arguments.steps):
        gradients = [
            sum(example.gradient([weights.float()], rank, step, each)[0].double() for each in range(arguments.n))
            for rank in range(arguments.ranks)
        ]
        steps = {
            kind: states[kind].of(sum(send(gradient) for gradient in gradients) / arguments.ranks)
            for kind, send in sent_as.items()
        }
        exact = steps.pop("exact")
        for kind, taken in steps.items():
            errors[kind].append(float((taken - exact).norm() / exact.norm()))
        lr = arguments.lr * lr_factor(step, 6 * arguments.steps, arguments.steps // 2, "cosine")
        weights = weights * (1 - 0.1 * lr) - lr * exact
    return [
        {
            "sent_as": kind,
            "early_percent": round(100 * statistics.mean(values[:EARLY]), 2),
            "late_percent": round(100 * statistics.mean(values[len(values) // 2 :]), 2),
        }
        for kind, values in errors.items()
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--n", type=int, default=2, help="micro-batches of a step (default: %(default)s)")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples of a micro-batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--preset", default="small", help="(default: %(default)s)")
    parser.add_argument("--seq_len", type=int, default=64, help="bytes in a sequence (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tell({**origin(), "rows": measure(arguments)}, arguments.out)


if __name__ == "__main__":
    main()
