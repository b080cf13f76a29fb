# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Measures for ``ds_acco plan --calibrate``: one short run of the user's script under the reference that
``ds_acco compare`` measures C and R in, the schedule ``sync``.

It is a comparison of this one configuration: launched, recorded and written down by the same code, so that the plan
reads the same ``results.json``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..compare.command import interruptible
from ..compare.configs import REFERENCE, reference_of
from ..compare.options import Comparison, add_run_arguments, comparison_of, host_count
from ..compare.results import RESULTS, write_results
from ..subcommand import require_extra
from ..typed_json import load

DEFAULT_OUT = Path("runs") / "calibrate"
# The example evaluates ten times, and steps behind an evaluation are not timed: this leaves nine.
EXAMPLE_STEPS = 20
EMULATED_STEPS = 8
_ONLY_HERE = ("script", "num_accelerators", "rate", "hostfile", "emulate_compute", "numel", "steps", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--calibrate`` and what belongs to it; ``--hosts`` is the plan's."""
    group = parser.add_argument_group(
        "calibrate",
        "Runs a script under CONFIG, with ACCO's schedule sync in place of its optimizer's, and plans from what it "
        "measures: parameters and their bytes, n, the micro-batch, one round. The script's own arguments, behind --, "
        "say how long it runs: about ten steps, since the first two and those after an evaluation are not timed.",
    )
    group.add_argument("--calibrate", metavar="CONFIG", type=Path, help="a DeepSpeed JSON; --hosts are shaped then")
    add_run_arguments(group, group, EXAMPLE_STEPS, EMULATED_STEPS)
    group.add_argument("--out", type=Path, help=f"its folder, measured anew each time (default: {DEFAULT_OUT})")


def refuse_without(options: argparse.Namespace) -> None:
    """Raises ValueError for what has a meaning only with ``--calibrate``."""
    given = [f"--{name.replace('_', '-')}" for name in _ONLY_HERE if getattr(options, name) is not None]
    given += ["what follows --"] if options.script_arguments else []
    if given:
        raise ValueError(f"plan: {given[0]} needs --calibrate CONFIG, the JSON that the script is to run under")


class MeasurementFailed(RuntimeError):
    """Says why a measurement failed: the run ended badly, or nothing of it can be timed."""


def measure(options: argparse.Namespace) -> tuple[Path, int | None]:
    """Runs the script to its end and returns the path of results.json and the number of hosts, None where it is not
    known. No process of it is left, also on KeyboardInterrupt, which a signal raises.

    Raises:
        ValueError: for options that cannot be, before anything runs.
        MeasurementFailed: the script failed, with the end of its log.
    """
    require_extra("tools", "numpy", "psutil", "tqdm")
    from ..compare import folder  # psutil, numpy: not for a plan without a measurement
    from ..compare import runs as comparing
    from ..compare.measure import results_of

    out = DEFAULT_OUT if options.out is None else options.out
    with ExitStack() as while_held:
        try:
            comparison = _comparison(options)
            while_held.enter_context(folder.held(out))
            _clear(out)
            folder.prepare(out, comparison)
        except (ValueError, OSError) as cause:
            raise ValueError(f"plan: {cause}") from cause
        path = out / RESULTS
        try:
            with interruptible():
                runs = comparing.run_all(comparison, out, options.hostfile)
                if not runs.failed:
                    write_results(path, results_of(comparison, runs.finished, runs.failed))
        except (RuntimeError, OSError) as cause:
            raise MeasurementFailed(f"plan: {cause}") from cause
    if runs.failed:
        raise MeasurementFailed(f"plan: the measured run failed: {runs.failed[REFERENCE]}")
    print(f"measured: {path}; `ds_acco plan --results {path}` plans from it again", file=sys.stderr)
    return path, host_count(comparison)


def _comparison(options: argparse.Namespace) -> Comparison:
    """Returns the comparison of the reference alone."""
    asked = argparse.Namespace(**{**vars(options), "configs": [options.calibrate], "passes": 1, "seed": None})
    comparison = comparison_of(asked, EXAMPLE_STEPS, EMULATED_STEPS)
    if comparison.world_size == 1:
        raise ValueError(
            "--calibrate with one rank measures no communication. Give --num_accelerators 2 or more, --hosts or "
            "--hostfile"
        )
    ((name, config),) = comparison.configs.items()
    ((_, file),) = comparison.files.items()
    reference = reference_of(name, config)
    return replace(comparison, configs={REFERENCE: reference}, files={REFERENCE: file})


def _clear(out: Path) -> None:
    """Removes an earlier measurement; a comparison's folder, and anybody else's, is left to ``folder.prepare``."""
    from ..compare import folder

    asked: Any = {}
    with suppress(ValueError):  # one that is damaged is not known to be ours
        asked = load(out / folder.COMMAND)
    if isinstance(asked, dict) and isinstance(asked.get("configs"), dict) and list(asked["configs"]) == [REFERENCE]:
        for part in (folder.CONFIGS, folder.RUNS):
            shutil.rmtree(out / part, ignore_errors=True)
        for file in (RESULTS, "report.html", folder.COMMAND):
            (out / file).unlink(missing_ok=True)
