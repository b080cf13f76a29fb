# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``ds_acco``."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys

import torch

from deepspeed_acco import __version__

from ..optim import build as op_builder
from ..optim import native
from .compare import command as compare
from .plan import command as planning
from .report import command as report

_CPU_NUMEL = 2**24
_CUDA_NUMEL = 2**26


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ds_acco", description="Tools of deepspeed_acco")
    commands = parser.add_subparsers(dest="command", required=True)
    environment = commands.add_parser("env", help="what was found here, and which kernels are used and why")
    environment.set_defaults(run=_env)
    kernels = commands.add_parser("kernels", help="measures the update kernels beside other AdamW implementations")
    kernels.add_argument("--numel", type=_positive, help="parameters (default: 2^24 on a CPU, 2^26 on CUDA)")
    kernels.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    kernels.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    kernels.add_argument("--turns", type=_positive, default=15, help="measurements of each (default: 15)")
    kernels.add_argument("--max-blocks", type=_positive, default=0, help="cap on the thread blocks of the CUDA kernels")
    kernels.add_argument("--json", metavar="FILE", help="also write the figures there")
    kernels.set_defaults(run=_kernels)
    compare.add_command(commands)
    planning.add_command(commands)
    report.add_command(commands)
    own, script_arguments = _split(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(own)
    if script_arguments and not getattr(options, "takes_script_arguments", False):
        parser.error(f"{options.command} takes nothing behind --: {' '.join(script_arguments)}")
    options.script_arguments = script_arguments
    return options.run(options)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what follows the first ``--``: a training script's."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number >= 1")
    return value


def _first_line_of(command: list[str], keyword: str = "") -> str:
    if shutil.which(command[0]) is None:
        return f"not found ({command[0]})"
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if keyword in line]
    return f"{lines[0]} ({shutil.which(command[0])})" if lines else f"gives no version ({shutil.which(command[0])})"


def describe_environment() -> list[tuple[str, str]]:
    """(what, value) pairs; loads the kernels, and so may build them."""
    import deepspeed
    from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available

    nvcc = f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else "nvcc"
    cuda_is_buildable, why_not = op_builder.cuda_is_buildable()
    pairs = [
        ("deepspeed_acco", __version__),
        ("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("DeepSpeed", deepspeed.__version__),
        ("C++ compiler", _first_line_of([op_builder.compiler(), "--version"])),
        ("ninja", "found" if is_ninja_available() else "not found (pip install ninja)"),
        ("nvcc", _first_line_of([nvcc, "--version"], "release")),
        ("CUDA kernels", "can be built" if cuda_is_buildable else f"not built: {why_not}"),
        ("CUDA architectures", ", ".join(_architectures()) or "no device is visible"),
        ("kernels' sources", str(op_builder.csrc())),
    ]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        name, reason = native.kernels_name(device), native.kernels_reason(device)
        pairs.append((f"kernels on {device}", f"{name}: {reason}" if reason else name))
    if op_builder.loaded_from:
        pairs.append(("kernels' library", op_builder.loaded_from))
    return pairs


def _architectures() -> list[str]:
    if not torch.cuda.is_available():
        return []
    capabilities = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return sorted({f"sm_{major}{minor}" for major, minor in capabilities})


def _env(options: argparse.Namespace) -> int:
    for what, value in describe_environment():
        print(f"{what + ':':20} {value}")
    return 0


def _kernels(options: argparse.Namespace) -> int:
    from . import kernel_benchmark as kernel_bench

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("ds_acco: --device cuda: PyTorch sees no CUDA device. Use --device cpu", file=sys.stderr)
        return 2
    numel = options.numel or (_CPU_NUMEL if device.type == "cpu" else _CUDA_NUMEL)
    figures = kernel_bench.measure(
        numel, device, threads=options.threads, turns=options.turns, max_blocks=options.max_blocks
    )
    print(kernel_bench.table(figures))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
