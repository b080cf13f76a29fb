# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks what a comparison is asked for: the options, and what they say together."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import units
from ..launch import shaped_hosts as hosts
from ..words import counted, shown
from .configs import REFERENCE, check, measures_reference, read_configs, reference_of, require_alike

EMULATED = ("--module", "deepspeed_acco.tools.launch.emulated_accelerator")
EXAMPLE = Path("examples") / "train_gpt.py"
EXAMPLE_SEQ_LEN = 128  # its default of --seq_len
EXAMPLE_STEPS = 60
EMULATED_STEPS = 12
EMULATED_NUMEL = 10_000_000
_MOST_SLOTS = 1024  # no host has more accelerators
_MOST_STEPS = 10**9
# A name that begins with "-" would be an option of ssh.
_HOST = re.compile(r"(\w[\w.-]*@)?[\w:][\w.:%-]*")
_HOST_LINE = re.compile(r"(\S+)\s+slots=(\d{1,9})")


# ---- options


def add_run_arguments(
    what: argparse._ActionsContainer, where: argparse._ActionsContainer, example_steps: int, emulated_steps: int
) -> None:
    """Adds the options that say what is run and where, but for ``--hosts``."""
    what.add_argument("--script", type=Path, help="imports deepspeed_acco (default: examples/train_gpt.py)")
    what.add_argument(
        "--emulate-compute",
        type=units.time_in("ms", or_zero=True),
        metavar="MS",
        help="emulated accelerator: a micro-batch waits so long",
    )
    what.add_argument(
        "--numel", type=units.count, help=f"parameters of the emulated model (default: {EMULATED_NUMEL:,})"
    )
    what.add_argument(
        "--steps",
        type=units.count_up_to(_MOST_STEPS),
        help=f"optimizer steps of the example (default: {example_steps}) or the emulated model ({emulated_steps})",
    )
    where.add_argument(
        *("--ranks-per-host", "--num_accelerators"),
        dest="num_accelerators",
        type=units.count_up_to(_MOST_SLOTS),
        metavar="N",
        help="ranks of each host (default: 1 on a shaped one, else one for each accelerator)",
    )
    where.add_argument(
        "--rate", type=units.link_rate, help="of each shaped host's link, as tc spells it, for example 300mbit"
    )
    where.add_argument("--hostfile", type=Path, help="DeepSpeed's hostfile of real hosts, which all see --out")


@dataclass(frozen=True)
class Comparison:
    """Holds what a comparison is asked for; all of it decides whether a folder's finished runs may be taken.

    Attributes:
        configs: name: contents of the JSON, in the order given.
        files: name: the JSON's path, as given.
        script: what the launcher is given: a path, or ``--module`` and a name.
        arguments: of the script, with {out} and {config} still in them.
        network: in words.
    """

    configs: dict[str, dict[str, Any]]
    files: dict[str, str]
    script: list[str]
    arguments: list[str]
    passes: int
    world_size: int
    slots: int | None
    network: str
    hosts: int | None
    rate: str | None
    hostfile: str | None
    emulated_ms: float | None
    tokens_per_sample: int | None


def comparison_of(
    options: argparse.Namespace, example_steps: int = EXAMPLE_STEPS, emulated_steps: int = EMULATED_STEPS
) -> Comparison:
    """Returns what the options ask for.

    Raises:
        ValueError: for options or JSONs that cannot be, or that do not go together.
    """
    configs, files = read_configs(options.configs)
    _require_together(options)
    world_size, network = _ranks(options)
    script, arguments, tokens_per_sample = _script(options, example_steps, emulated_steps)
    is_filled = _is_own(options.script)
    for name, config in configs.items():
        check(files[name], config, world_size, is_filled)
    require_alike(configs, world_size)
    asked = Comparison(
        configs=configs,
        files=files,
        script=script,
        arguments=arguments,
        passes=options.passes,
        world_size=world_size,
        slots=options.num_accelerators,
        network=network,
        hosts=options.hosts,
        rate=options.rate,
        hostfile=options.hostfile.read_text(encoding="utf-8") if options.hostfile else None,
        emulated_ms=options.emulate_compute,
        tokens_per_sample=tokens_per_sample,
    )
    for derived in extra_reference(asked).values():
        check(f"{next(iter(files.values()))}, as the reference (schedule sync)", derived, world_size, is_filled)
    return asked


def _require_together(options: argparse.Namespace) -> None:
    if (options.hosts is None) != (options.rate is None):
        raise ValueError("--hosts and --rate belong together: for example --hosts 2 --rate 300mbit")
    if options.hosts is not None and options.hostfile is not None:
        raise ValueError("--hosts and --hostfile exclude each other: shaped hosts are on this machine")
    if options.hosts is not None:
        if not 2 <= options.hosts <= hosts.MOST_HOSTS:
            raise ValueError(f"--hosts {options.hosts} is not allowed; allowed: 2 to {hosts.MOST_HOSTS}")
        try:
            hosts.check_rate(options.rate)
        except ValueError as cause:
            raise ValueError(f"--rate {cause}") from None
        reason = hosts.why_not()
        if reason:
            raise ValueError(f"--hosts {options.hosts}: {reason}")
    if options.hostfile is not None and not options.hostfile.is_file():
        raise ValueError(f"--hostfile {options.hostfile} is not a file; give DeepSpeed's hostfile")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed} is not allowed; allowed: 0 to 2^63 - 1")
    if options.emulate_compute is not None and (options.script or options.script_arguments):
        raise ValueError("--emulate-compute trains a model of its own: leave out --script and what follows --")
    if options.numel is not None and options.emulate_compute is None:
        raise ValueError("--numel is the size of the emulated model: it needs --emulate-compute MS")


def _ranks(options: argparse.Namespace) -> tuple[int, str]:
    """Returns the number of ranks, and in words what joins them."""
    slots = options.num_accelerators
    if options.hosts is not None:
        in_host = slots or 1
        return options.hosts * in_host, f"{options.hosts} hosts x {counted(in_host, 'rank')}, {options.rate}"
    if options.hostfile is not None:
        try:
            found = _hosts_of(options.hostfile.read_text(encoding="utf-8"))
        except (ValueError, OSError) as cause:
            raise ValueError(f"--hostfile {options.hostfile}: {cause}") from cause
        world_size = slots * len(found) if slots else sum(found.values())
        return world_size, f"hostfile {options.hostfile}, {len(found)} hosts"
    if slots is None:
        from deepspeed.accelerator import get_accelerator

        slots = get_accelerator().device_count()
    return slots, "this machine"


def _hosts_of(hostfile: str) -> dict[str, int]:
    """Returns the slots of each host of a hostfile's text.

    Raises:
        ValueError: for a line that names no host, or one that DeepSpeed would not read; with its number.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(hostfile.splitlines(), 1):
        written = line.split("#")[0].strip()
        if not written:
            continue
        match = _HOST_LINE.fullmatch(written)
        if match is None or not _HOST.fullmatch(match[1]):
            raise ValueError(f"line {number} is {shown(line)}; allowed: a host and its ranks, as in 'worker-1 slots=4'")
        if match[1] in slots:
            raise ValueError(f"line {number} names {match[1]} again; allowed: each host once")
        if not 1 <= int(match[2]) <= _MOST_SLOTS:
            raise ValueError(f"line {number} is {shown(line)}; allowed: 1 to {_MOST_SLOTS} slots")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError("it names no host; allowed: lines like 'worker-1 slots=4'")
    return slots


def host_count(comparison: Comparison) -> int | None:
    """Returns how many hosts share the ranks equally; None where that is not known."""
    count = len(_hosts_of(comparison.hostfile)) if comparison.hostfile is not None else comparison.hosts
    return count if count and comparison.world_size % count == 0 else None


def _script(
    options: argparse.Namespace, example_steps: int, emulated_steps: int
) -> tuple[list[str], list[str], int | None]:
    """Returns the script, its arguments, and the tokens of a sample where they are known."""
    steps, seed = options.steps, 1 if options.seed is None else options.seed
    if options.emulate_compute is not None:
        arguments = ["--steps", str(steps or emulated_steps), "--seed", str(seed)]
        arguments += ["--micro_batch_ms", str(options.emulate_compute)]
        return list(EMULATED), [*arguments, "--numel", str(options.numel or EMULATED_NUMEL)], None
    given = list(options.script_arguments)
    script: Path | None = options.script or _example()
    if script is None:
        raise ValueError(
            "--script is missing, and examples/train_gpt.py is not here: it is the default in a checkout of "
            "deepspeed_acco. Give your training script"
        )
    if not script.is_file():
        raise ValueError(f"--script {script} is not a file; give your training script")
    if _is_own(script):
        if steps is not None or options.seed is not None:
            raise ValueError("--steps and --seed are the example's: give your script its own arguments behind --")
        return [str(script)], given, None
    arguments = ["--steps", str(steps or example_steps), "--seed", str(seed), "--out", "{out}", *given]
    lengths = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    lengths.add_argument("--seq_len", type=int, default=EXAMPLE_SEQ_LEN)
    return [str(script)], arguments, lengths.parse_known_args(given)[0].seq_len


def _is_own(script: Path | None) -> bool:
    """Tells whether the script is the user's, and not the example or the emulated model."""
    example = _example()
    return script is not None and (example is None or script.resolve() != example.resolve())


def _example() -> Path | None:
    for root in (Path(__file__).resolve().parents[3], Path()):
        if (root / EXAMPLE).is_file():
            return root / EXAMPLE
    return None


def extra_reference(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Returns the derived reference by its name, nothing where a CONFIG is one."""
    if any(map(measures_reference, comparison.configs.values())):
        return {}
    first = next(iter(comparison.configs))
    return {REFERENCE: reference_of(first, comparison.configs[first])}
