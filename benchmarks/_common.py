# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks beside it share: their options, their results, the runs that they are made of, their pictures.

Imported before deepspeed_acco: with it a benchmark finds the package and the example of its own checkout.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

LAST_LETTERS = 3000  # of what a failed run printed
# Student's t that holds 95 % in the middle, for 1, 2, ... degrees of freedom; 1.96 would make few seeds look sure.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ---- options and results


def make_parser(about: str | None, has_picture: bool = False) -> argparse.ArgumentParser:
    """Returns a parser with --out, and with --draw for a benchmark whose results have a picture."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = "; the picture is drawn beside it (matplotlib needed)" if has_picture else ""
    parser.add_argument("--out", type=Path, required=has_picture, help=f"JSON file of the results{beside}")
    if has_picture:
        parser.add_argument("--draw", action="store_true", help="measure nothing: draw what --out holds")
    return parser


def origin() -> dict[str, str]:
    """Returns what every result says of itself: the command, the date and the machine."""
    from deepspeed_acco.tools.machine import describe_machine

    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "date": date.today().isoformat(), "machine": describe_machine()}


def as_text(results: Mapping[str, Any]) -> str:
    """Returns JSON with a line for each key, and for each row of a list of rows."""
    lines = []
    for key, value in results.items():
        has_rows = isinstance(value, list) and any(isinstance(row, dict) for row in value)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if has_rows else ""
        lines.append(f" {json.dumps(key)}: " + (f"[\n{rows}\n ]" if has_rows else json.dumps(value)))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(results: Mapping[str, Any], out: Path | None) -> None:
    """Writes the file whole or not at all; nothing without ``out``."""
    if out is not None:
        part = out.with_suffix(".part")
        part.write_text(as_text(results))
        part.replace(out)


def tell(results: Mapping[str, Any], out: Path | None) -> None:
    """Prints the results and writes them."""
    print(as_text(results), end="")
    write(results, out)


def progress(text: str) -> None:
    """Prints a line to stderr that does not wait in a buffer."""
    print(text, file=sys.stderr, flush=True)


def interval(values: Sequence[float]) -> list[float] | None:
    """Returns the mean's 95 % interval by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    t = STUDENT_T[min(len(values) - 1, len(STUDENT_T)) - 1]  # with more values than known a little too wide
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return [round(statistics.mean(values) + sign * half, 3) for sign in (-1, 1)]


# ---- runs


def table_of_losses(summary: Sequence[Mapping[str, Any]], name_of: Callable[[Mapping[str, Any]], str]) -> str:
    """Returns a line for each row below its setting: its final loss, and how far that is above the baseline's."""
    lines, setting = [], None
    for row in summary:
        if row["setting"] != setting:
            setting = row["setting"]
            lines.append(setting)
        text = f"  {name_of(row):<40} {row['val_loss']:.4f}"
        if "mean_percent" in row:
            text += f"  {row['mean_percent']:+.2f} %"
        if row.get("interval_percent"):
            text += "  [{:+.2f}, {:+.2f}]".format(*row["interval_percent"])
        if "percent" in row:
            text += "  by seed " + ", ".join(f"{pair:+.2f}" for pair in row["percent"])
        if "estimate_error" in row:
            text += "  error of the estimate " + ", ".join(f"{error:.2f}" for error in row["estimate_error"])
        lines.append(text)
    return "\n".join(lines)


def read_config(name: str, folder: str = "ds_configs") -> dict[str, Any]:
    """Returns the DeepSpeed JSON of that file stem; ``acco:estimate_fraction=0.75`` changes one of its params."""
    stem, _, change = name.partition(":")
    path = ROOT / folder / f"{stem}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise SystemExit(f"{stem} is not a configuration; allowed: a file of {folder} without .json: {known}")
    config = json.loads(path.read_text())
    if change:
        key, _, value = change.partition("=")
        config["optimizer"]["params"][key] = json.loads(value)
    return config


def run_example(
    config: str,
    options: Mapping[str, Any],
    *,
    ranks: int = 2,
    n: int | None = None,
    lr: float | None = None,
    precision: str = "fp32",
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Runs examples/train_gpt.py once, on CPU ranks; returns the lines of its metrics.jsonl.

    Args:
        config: as in :func:`read_config`.
        options: of the example, without the dashes; a list gives several words.
        n, lr: instead of the JSON's gradient_accumulation_steps and learning rate.
        precision: fp32 leaves the JSON as it is.

    Raises:
        RuntimeError: the run failed; with the end of what it printed.
    """
    from deepspeed_acco.tools.compare.command import interruptible
    from deepspeed_acco.tools.launch import launcher

    settings = read_config(config)
    settings["gradient_accumulation_steps"] = n or settings["gradient_accumulation_steps"]
    if lr is not None:
        settings["optimizer"]["params"]["lr"] = lr
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        used = folder / "ds_config.json"
        used.write_text(json.dumps(settings))
        arguments = ["--deepspeed_config", str(used), "--out", str(folder)]
        for option, value in options.items():
            arguments += [f"--{option}", *(str(word) for word in (value if isinstance(value, list) else [value]))]
        place = launcher.Ranks(world_size=ranks, slots=ranks, is_cpu=True)
        script = [str(ROOT / "examples" / "train_gpt.py")]
        with interruptible():  # a benchmark that is ended ends its ranks
            code = launcher.run(script, arguments, folder, place, environment=environment)
        if code:
            printed = (folder / launcher.LOG).read_text(errors="replace")
            raise RuntimeError(f"{config} failed:\n{printed[-LAST_LETTERS:]}")
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(
    configs: Mapping[str, Mapping[str, Any]], *options: object, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs ``ds_acco compare`` on these JSONs, given by name; returns its results.json.

    Raises:
        RuntimeError: a configuration failed; with the end of what the command printed.
    """
    from deepspeed_acco.tools.launch import launcher

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stem, config in configs.items():
            (folder / f"{stem}.json").write_text(json.dumps(config))
        files = [str(folder / f"{stem}.json") for stem in configs]
        command = [sys.executable, "-m", "deepspeed_acco.tools.cli", "compare", *files, *map(str, options)]
        done = subprocess.run(
            [*command, "--out", str(folder / "out")],
            env={**os.environ, "PYTHONPATH": launcher.search_path(), **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{(done.stdout + done.stderr)[-LAST_LETTERS:]}")
        return json.loads((folder / "out" / "results.json").read_text())


# ---- pictures


def new_figure(width: float, height: float):
    """Returns a matplotlib Figure in inches whose layout keeps all letters inside."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> None:
    """Writes the picture; the same figure gives the same bytes."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
