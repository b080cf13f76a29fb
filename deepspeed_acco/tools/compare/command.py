# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs ``ds_acco compare``: the same script under several DeepSpeed JSONs, in alternation, measured side by side."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...optim.build_locks import describe_locks
from .. import units
from ..subcommand import INTERRUPTED, add_parser, complain, require_extra
from ..words import printable
from .options import EMULATED_STEPS, EXAMPLE_STEPS, Comparison, add_run_arguments, comparison_of

DEFAULT_OUT = Path("runs") / "compare"
_MOST_PASSES = 1000


def add_command(commands) -> None:
    """Adds the subcommand to what ``add_subparsers`` returned."""
    parser = add_parser(
        commands,
        "compare",
        help="measures ACCO beside DeepSpeed's own stages: one script under several JSONs, in alternation",
        usage="%(prog)s CONFIG [CONFIG ...] [options] [-- ARGUMENTS OF THE SCRIPT]",
        description="Runs the same script under each DeepSpeed JSON, with the same seed and data, pass by pass through "
        "DeepSpeed's launcher, and writes results.json and report.html. A run of schedule sync, derived from the "
        "first CONFIG, is always among them: computation and communication are measured there one after the other. "
        "The same command goes on where it was interrupted. ARGUMENTS may hold {out}, the run's own folder, and "
        "{config}, the JSON, which else is given by --deepspeed_config.",
        example="ds_acco compare ds_configs/acco.json ds_configs/zero1.json --num_accelerators 2\n"
        "ds_acco compare ds_configs/acco.json --hosts 2 --ranks-per-host 4 --rate 300mbit --passes 6 --out runs/slow",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", type=Path, help="DeepSpeed JSONs; the stem is the name")
    what, where = parser.add_argument_group("what is run"), parser.add_argument_group("where")
    add_run_arguments(what, where, EXAMPLE_STEPS, EMULATED_STEPS)
    what.add_argument(
        "--passes", type=units.count_up_to(_MOST_PASSES), default=3, help="runs of each JSON (default: %(default)s)"
    )
    what.add_argument("--seed", type=int, help="of weights and data (default: 1)")
    where.add_argument("--hosts", type=units.count, help="so many shaped hosts on this machine (root, iproute2)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder (default: %(default)s)")
    parser.set_defaults(run=run, takes_script_arguments=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once; more of them do not disturb the cleaning up."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is ignored, and stays so
        numbers.append(signal.SIGHUP)

    def interrupt(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(options: argparse.Namespace) -> int:
    """Returns 0, 1 when a configuration failed, 2 for bad arguments, 130 when interrupted."""
    require_extra("tools", "numpy", "psutil", "tqdm")
    from ..report import figures  # numpy, and perhaps matplotlib: not for a --help
    from . import folder

    with ExitStack() as while_held:
        try:
            comparison = comparison_of(options)
            figures.require_matplotlib()  # now, not after all the runs
            while_held.enter_context(folder.held(options.out))
            folder.prepare(options.out, comparison)
        except (ValueError, OSError) as cause:
            complain(f"compare: {cause}")
            return 2
        except (ModuleNotFoundError, RuntimeError) as cause:
            complain(f"compare: {cause}")
            return 1
        for text in describe_locks():
            complain(f"compare: {text}")
        return _measure(comparison, options)


def _measure(comparison: Comparison, options: argparse.Namespace) -> int:
    from . import runs as comparing

    try:
        with interruptible():
            runs = comparing.run_all(comparison, options.out, options.hostfile)
            return _finish(comparison, options.out, runs)
    except KeyboardInterrupt:
        complain("compare: interrupted; the same command goes on from here")
        return INTERRUPTED
    except (RuntimeError, OSError) as cause:  # a full disk, for example: the same command goes on from here
        complain(f"compare: {cause}")
        return 1


def _finish(comparison, out: Path, runs) -> int:
    """Writes results.json and report.html and prints the verdict."""
    from ..report import command as report
    from .measure import results_of
    from .results import RESULTS, write_results

    path, results = out / RESULTS, results_of(comparison, runs.finished, runs.failed)
    write_results(path, results)
    page = report.write(path)
    print(printable("\n".join([*results.verdict, str(path), str(page)])))
    return 1 if runs.failed else 0
