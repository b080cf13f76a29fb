# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the words of the command ``ds_acco``.

What a subcommand needs beyond the standard library is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .. import __version__
from . import units
from .check import command as check
from .check import init_command as init
from .compare import command as compare
from .doctor import command as doctor
from .fit import command as fit
from .plan import command as plan
from .report import command as report
from .subcommand import INTERRUPTED, MissingExtra, Parser, add_parser, complain, require_extra

_CPU_NUMEL = 2**24
_CUDA_NUMEL = 2**26
_SHELLS = ("bash", "zsh")
_MOST_THREADS = 1024  # torch ends the process where it cannot start so many
_MOST_TURNS = 100_000
_MOST_BLOCKS = 2**31 - 1  # of a CUDA grid


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status.

    Where nobody reads the output any longer, as behind ``| head -1``, it ends without a word and with status 1
    (Python's documentation of the module signal).

    Args:
        arguments: default: those of the process.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, not when the interpreter ends, which would print what cannot be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str] | None) -> int:
    parser, _ = _make_parser()
    own, script_arguments = _split(sys.argv[1:] if arguments is None else arguments)
    for word in own:
        if word.startswith("-") and word.endswith("=--"):  # of which argparse would make a list
            parser.error(f"{word} is not allowed; allowed: a value behind the =")
    options = parser.parse_args(own)
    if script_arguments and not getattr(options, "takes_script_arguments", False):
        parser.error(f"{options.command} takes nothing behind --: {' '.join(script_arguments)}")
    options.script_arguments = script_arguments
    try:
        return options.run(options)
    except MissingExtra as error:
        complain(f"{options.command}: {error}")
        return 1
    except KeyboardInterrupt:
        complain(f"{options.command}: interrupted")
        return INTERRUPTED


def _make_parser() -> tuple[argparse.ArgumentParser, list[argparse.ArgumentParser]]:
    """Returns the parser of the command, and those of its subcommands."""
    parser = Parser(
        prog="ds_acco",
        description="Tools of deepspeed_acco, which hides the communication of ZeRO-1 behind the next gradients.",
        epilog="`ds_acco SUBCOMMAND --help` has the options and an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"deepspeed_acco {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    init.add_command(commands)
    check.add_command(commands)
    fit.add_command(commands)
    plan.add_command(commands)
    compare.add_command(commands)
    report.add_command(commands)
    doctor.add_command(commands)
    _add_kernels(commands)
    _add_env(commands)
    _add_schema(commands)
    _add_completion(commands)
    return parser, list(commands.choices.values())


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments into ours and what follows the first ``--``, a training script's."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def _write_json(what: str, path: Path, content: object) -> int:
    """Writes a file and returns the exit status; ``what`` asked for it, for the error."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        complain(f"{what} {path} cannot be written: {error}")
        return 2
    return 0


def _require_writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path} is not allowed; allowed: a file in a folder that exists")


# ---- env


def _add_env(commands) -> None:
    parser = add_parser(
        commands, "env", help="prints what was found here, and which kernels are used and why", example="ds_acco env"
    )
    parser.set_defaults(run=_env)


def _env(options: argparse.Namespace) -> int:
    from . import environment

    for what, value in environment.describe():
        print(f"{what + ':':20} {value}")
    return 0


# ---- kernels


def _add_kernels(commands) -> None:
    parser = add_parser(
        commands,
        "kernels",
        help="measures the update kernels beside other AdamW implementations",
        example="ds_acco kernels --numel 16M --threads 1 --json kernels.json",
    )
    add = parser.add_argument_group("what is measured").add_argument
    add("--numel", type=units.count, metavar="N", help="parameters (default: 2^24 on a CPU, 2^26 on CUDA)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    threads, turns = units.count_up_to(_MOST_THREADS), units.count_up_to(_MOST_TURNS)
    add("--threads", type=threads, metavar="N", help="CPU threads (default: torch's)")
    blocks = units.count_up_to(_MOST_BLOCKS)
    add("--max-blocks", type=blocks, default=0, metavar="N", help="cap on the thread blocks of the CUDA kernels")
    add("--turns", type=turns, default=15, metavar="N", help="measurements of each (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=_kernels)


def _kernels(options: argparse.Namespace) -> int:
    import torch

    from . import kernel_benchmark

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        complain("kernels: --device cuda: PyTorch sees no CUDA device. Use --device cpu")
        return 2
    numel = options.numel or (_CPU_NUMEL if device.type == "cpu" else _CUDA_NUMEL)
    try:
        kernel_benchmark.require_room(numel, device)
        if options.json is not None:
            _require_writable(options.json)  # now, not after the measurement
    except (ValueError, OSError) as error:
        complain(f"kernels: {error}")
        return 2
    figures = kernel_benchmark.measure(
        numel, device, threads=options.threads, turns=options.turns, max_blocks=options.max_blocks
    )
    print(kernel_benchmark.table(figures))
    return 0 if options.json is None else _write_json("kernels: --json", options.json, figures)


# ---- schema


def _add_schema(commands) -> None:
    parser = add_parser(
        commands,
        "schema",
        help="prints the JSON schema of ACCO's part of a DeepSpeed JSON, for editors",
        description="Prints the JSON schema of a DeepSpeed JSON in so far as it concerns ACCO: the keys of "
        '"optimizer": {"type": "ACCO", "params": {...}}, their values and defaults. In an editor it completes and '
        "checks them; everything else in the file is left alone.",
        example="ds_acco schema --out acco.schema.json",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there instead")
    parser.set_defaults(run=_schema)


def _schema(options: argparse.Namespace) -> int:
    from ..settings import json_schema

    if options.out is None:
        print(json.dumps(json_schema(), indent=2))
        return 0
    return _write_json("schema: --out", options.out, json_schema())


# ---- completion


def _add_completion(commands) -> None:
    parser = add_parser(
        commands,
        "completion",
        help="prints a shell's completion of this command",
        example='eval "$(ds_acco completion bash)"',
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> int:
    require_extra("completion", "shtab")
    import shtab

    parser, subcommands = _make_parser()
    for subcommand in subcommands:
        for action in subcommand._actions:
            if action.type is Path or action.metavar in ("FILE", "CONFIG"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=options.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
