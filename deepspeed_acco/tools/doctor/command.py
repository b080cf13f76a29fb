# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs ``ds_acco doctor``: starts ranks that check what training would do on these machines."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from .. import units
from ..subcommand import add_parser, complain, require_extra

MODULE = ("--module", "deepspeed_acco.doctor")
_MOST_RANKS = 1024  # no host has more accelerators
_LIMIT_S = 600.0  # with builds at the first use; the checks themselves have two minutes
_TIMEOUT_S = 20.0
_PRECISIONS = ("fp32", "bf16", "fp16")


def add_command(commands) -> None:
    """Adds the subcommand to what ``add_subparsers`` returned."""
    parser = add_parser(
        commands,
        "doctor",
        help="checks on your own devices and network that training is right and rounds are hidden",
        description="Starts ranks through DeepSpeed's launcher and checks in about two minutes: versions, kernels, "
        "locks, a small training beside the reference, both lanes, the time of rounds, what of them is hidden, and "
        "settings that cost overlap. With a launcher of your own: deepspeed --module deepspeed_acco.doctor, or "
        "torchrun -m deepspeed_acco.doctor.",
        example="ds_acco doctor --num_accelerators 2 --json doctor.json\n"
        "ds_acco doctor --hostfile hosts --config ds_configs/acco.json",
    )
    add = parser.add_argument_group("where").add_argument
    add(
        *("--num_accelerators", "--ranks-per-host", "--num-gpus"),
        dest="num_accelerators",
        type=units.count_up_to(_MOST_RANKS),
        metavar="N",
        help="ranks of each host (default: one for each accelerator)",
    )
    add("--hostfile", type=Path, help="DeepSpeed's hostfile of real hosts")
    add_check_arguments(parser)
    parser.set_defaults(run=run)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that the ranks take, too."""
    add = parser.add_argument_group("what is checked").add_argument
    add("--config", type=Path, metavar="CONFIG", help="takes ACCO's params, n, clipping and precision of this JSON")
    add("--precision", choices=_PRECISIONS, help="default: the JSON's; without one bf16 on CUDA, fp32 on a CPU")
    add("--numel", type=units.count, metavar="N", help="parameters whose rounds are measured (default: 0.3 s long)")
    add(
        "--comm-timeout",
        type=units.time_in("s"),
        default=_TIMEOUT_S,
        metavar="S",
        help="seconds that a collective waits for a rank (default: %(default)g)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the findings there")


def require_usable(options: argparse.Namespace) -> None:
    """Raises ValueError for files that cannot be used, before anything is checked."""
    config, file = options.config, options.json
    if config is not None and not config.is_file():
        raise ValueError(f"--config {config} is not a file; give a DeepSpeed JSON")
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"--json {file} is not allowed; allowed: a file in a folder that exists")


def run(options: argparse.Namespace) -> int:
    """Returns 0 where nothing failed, 1 where something did, 2 for bad arguments, 130 when interrupted."""
    require_extra("tools", "psutil")
    from ..launch import launcher  # psutil

    try:
        require_usable(options)
        if options.hostfile is not None and not options.hostfile.is_file():
            raise ValueError(f"--hostfile {options.hostfile} is not a file; give DeepSpeed's hostfile")
    except ValueError as error:
        complain(f"doctor: {error}")
        return 2
    place = launcher.Ranks(world_size=0, slots=options.num_accelerators, hostfile=options.hostfile)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with launcher.started(MODULE, _arguments_of(options), Path(folder), place) as (process,):
                code = process.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        complain(f"doctor: the ranks did not end within {_LIMIT_S:.0f} s. The last line above says where they are")
        return 1
    except (RuntimeError, OSError) as cause:
        complain(f"doctor: {cause}")
        return 1
    return code if code in (0, 2) else 1


def _arguments_of(options: argparse.Namespace) -> list[str]:
    words = ["--comm-timeout", str(options.comm_timeout)]
    for option, value in (("--precision", options.precision), ("--numel", options.numel)):
        words += [] if value is None else [option, str(value)]
    for option, path in (("--config", options.config), ("--json", options.json)):
        words += [] if path is None else [option, str(path.absolute())]
    return words
