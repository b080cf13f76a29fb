# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Whole training steps with the native kernels and with the PyTorch path, in alternation.

    python benchmarks/paired_kernels.py --pairs 3 --out benchmarks/results/paired_kernels.json

Twice: the example on two ranks with a larger preset, and two shaped hosts with emulated compute short enough that the
rounds are not hidden (``ds_acco compare``; needs root and iproute2, and is left out without).
"""

import statistics

from _common import compare, make_parser, origin, progress, read_config, run_example, tell

from deepspeed_acco.algorithm.step_time import WARM_UP_STEPS
from deepspeed_acco.tools.launch.shaped_hosts import why_not

PATHS = ("native", "torch")


def example_step_s(path: str, arguments) -> float:
    """Returns seconds of a step, from the second validation to the last: the first steps load and build."""
    options = {key: getattr(arguments, key) for key in ("preset", "seq_len", "steps")}
    lines = run_example("acco", options, environment={"DEEPSPEED_ACCO_KERNELS": path})
    return (lines[-1]["seconds"] - lines[1]["seconds"]) / (lines[-1]["step"] - lines[1]["step"])


def two_host_step_s(path: str, arguments) -> tuple[float, float]:
    """Returns seconds of an acco step, and of a round with nothing beside it."""
    hosts = ("--hosts", 2, "--rate", arguments.rate, "--emulate-compute", arguments.micro_batch_ms)
    lengths = ("--numel", arguments.numel, "--steps", arguments.windows + WARM_UP_STEPS, "--passes", 1)
    acco = read_config("acco", "benchmarks/configs")
    results = compare({"acco": acco}, *hosts, *lengths, environment={"DEEPSPEED_ACCO_KERNELS": path})
    return results["configs"][0]["step_s"]["median"], results["reference"]["round_s"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--preset", default="medium")
    parser.add_argument("--seq_len", type=int, default=8, help="short, or computing hides the updates")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--micro_batch_ms", type=float, default=40.0)
    parser.add_argument("--numel", type=int, default=10_000_000, help="parameters on the two hosts")
    parser.add_argument("--windows", type=int, default=10, help="measured steps on the two hosts")
    parser.add_argument("--skip", nargs="*", default=[], choices=["example", "two_hosts"])
    arguments = parser.parse_args()
    measured: dict[str, dict[str, list[float]]] = {}

    def keep(what: str, path: str, seconds: float) -> None:
        measured.setdefault(what, {}).setdefault(path, []).append(seconds)
        progress(f"{what} {path}: {seconds:.3f} s")

    for pair in range(arguments.pairs):
        for path in PATHS if pair % 2 == 0 else reversed(PATHS):
            if "example" not in arguments.skip:
                what = f"example, preset {arguments.preset}, seq_len {arguments.seq_len}"
                keep(what, path, example_step_s(path, arguments))
            if "two_hosts" not in arguments.skip and why_not() is None:
                step, alone = two_host_step_s(path, arguments)
                keep(f"two hosts, {arguments.rate}, 8 x {arguments.micro_batch_ms:g} ms", path, step)
                keep(f"two hosts, {arguments.rate}, one round alone", path, alone)
    rows = []
    for what, by_path in measured.items():
        ratios = [native / torch for native, torch in zip(by_path["native"], by_path["torch"])]
        rows.append(
            {
                "what": what,
                **{f"{path}_s": [round(seconds, 4) for seconds in by_path[path]] for path in PATHS},
                "median_ratio_native_to_torch": round(statistics.median(ratios), 4),
            }
        )
    tell({**origin(), "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
