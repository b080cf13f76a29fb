# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What measuring the estimate's error costs (only with a monitor), beside the native COMMIT that it follows.

    python benchmarks/estimate_error.py --out benchmarks/results/estimate_error.json

In alternation, one thread, for weights in fp32 and in bf16; medians in ns per parameter of the shard.
"""

import statistics
import time

import torch
from _common import make_parser, origin, tell

from deepspeed_acco.optim import native, ops
from deepspeed_acco.optim.adamw import AdamWHyper, sums_of_error_and_step
from deepspeed_acco.optim.huge_pages import use_huge_pages

HYPER = AdamWHyper(lr=1e-4)


def measure(numel: int, dtype: torch.dtype, turns: int) -> dict:
    """Returns medians of COMMIT and of the error's pass in ns per parameter; gradients and weights have that dtype."""
    generator = torch.Generator().manual_seed(0)
    master, exp_avg, exp_avg_sq, grad = (torch.randn(numel, generator=generator) * 1e-3 for _ in range(4))
    shard = ops.AdamWShard(master, exp_avg, exp_avg_sq.square_(), torch.tensor(10.0))
    grad, out, stands_at = grad.to(dtype), torch.empty(numel, dtype=dtype), master.to(dtype)
    use_huge_pages((master, exp_avg, exp_avg_sq, grad, out, stands_at))
    scale, is_finite = torch.ones(()), torch.ones((), dtype=torch.bool)
    work = {
        "commit": lambda: ops.adamw_commit(shard, grad, HYPER, scale, is_finite, out),
        "error": lambda: sums_of_error_and_step(shard, HYPER, stands_at),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):  # the first one warms up
        for name, call in work.items():
            begin = time.perf_counter()
            call()
            if turn:
                taken[name].append(1e9 * (time.perf_counter() - begin) / numel)
    row = {f"{name}_ns_per_param": round(statistics.median(values), 2) for name, values in taken.items()}
    return {"weights": str(dtype).removeprefix("torch."), **row}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--numel", type=int, default=2**24, help="parameters of the shard (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=21, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    native.prepare(torch.device("cpu"))
    if native.kernels_name() != "native":
        raise SystemExit(f"no native kernels to compare with: {native.kernels_reason()}")
    rows = [measure(arguments.numel, dtype, arguments.turns) for dtype in (torch.float32, torch.bfloat16)]
    tell({**origin(), "numel": arguments.numel, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
