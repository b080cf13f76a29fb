# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Public training scripts that nobody here wrote, unmodified, with ACCO beside DeepSpeed's ZeRO-1 and AdamW.

    python -m tests.public_scripts --checkouts DIR --out tests/public_scripts/results.json
    python -m tests.public_scripts --out tests/public_scripts/results.json --page docs/reference/public-scripts.md

DIR has a git clone of each project by its name (trl, accelerate), which must be as it was committed. Every script
trains a tiny model on Python's own library on two CPU ranks (gloo), started by `accelerate launch` with the project's
stock configuration: with AdamW without this package, with ACCO through `python -m deepspeed_acco` and the JSON that
`ds_acco init` makes. A run saved in the middle is resumed where the script can. Runs that --out has already are kept.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from deepspeed_acco.tools import cli
from deepspeed_acco.tools.machine import describe_machine
from tests.support.launcher import rank_environment

from . import materials
from .scripts import SCRIPTS, Script

RANKS = 2
LIMIT_S = 900
LAST_LETTERS = 3000
STARTED = re.compile(r"ACCO: schedule=(\w+)")
# DeepSpeed trains in fp16 on no CPU. Its own AdamW would be compiled, which takes more than a minute.
ON_CPU = {"fp16": {"enabled": False}}
OF_TRAINERS = {
    **{key: "auto" for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")},
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
}


# ---- configurations


def acco_json(given: dict, folder: Path) -> Path:
    """Writes what `ds_acco init` makes of a DeepSpeed JSON."""
    source, made = folder / "stock.json", folder / "acco.json"
    source.write_text(json.dumps(given))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main(["init", "--from", str(source), "--out", str(made), "--hf"])
    if code:
        raise RuntimeError(f"`ds_acco init` refused {source}: {said.getvalue()}")
    return made


def launch_file(stock: Path, optimizer: str, n: int, folder: Path) -> Path:
    """Writes a file for ``accelerate launch --config_file`` into a folder.

    Args:
        stock: the project's own: such a file, or a DeepSpeed JSON.
        optimizer: ``adamw`` takes it as it is but for what a CPU needs; ``acco`` the JSON that `ds_acco init` makes of
            it, or of a JSON that says the same as the file.
        n: micro-batches a step.
    """
    if stock.suffix == ".json":
        made = {"distributed_type": "DEEPSPEED"}
        given = json.loads(stock.read_text()) | ON_CPU | {"gradient_accumulation_steps": n}
    else:
        made = yaml.safe_load(stock.read_text())
        made["deepspeed_config"]["gradient_accumulation_steps"] = n
        given = OF_TRAINERS | {"zero_optimization": {"stage": made["deepspeed_config"]["zero_stage"]}}
    if stock.suffix == ".json" or optimizer == "acco":
        file = acco_json(given, folder) if optimizer == "acco" else folder / "adamw.json"
        if optimizer == "adamw":
            file.write_text(json.dumps(given))
        made.pop("mixed_precision", None)  # Accelerate takes what a JSON says from there alone
        made["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": False}
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(made | {"num_processes": RANKS, "num_machines": 1, "machine_rank": 0}))
    return path


# ---- runs


@dataclass(frozen=True)
class Run:
    """What one training is: n micro-batches in each of its steps."""

    script: str
    optimizer: str
    n: int
    steps: int
    seed: int

    def __str__(self) -> str:
        return f"{self.script}-{self.optimizer}-n{self.n}-{self.steps}-seed{self.seed}"


class Runner:
    """Runs scripts below one folder, of clones that were not changed."""

    def __init__(self, checkouts: Path, folder: Path):
        self.checkouts, self.folder = checkouts, folder

    def reason_to_skip(self, script: Script) -> str | None:
        if not (self.checkouts / script.checkout / script.file).is_file():
            return f"{script.file} is not in a clone {script.checkout}"
        missing = [name for name in script.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    def train(self, script: Script, run: Run, resumed: Path | None = None) -> dict:
        """Trains once, and goes on from a checkpoint where one is given; returns a row of the results.

        Raises:
            RuntimeError: the script failed, or trained without DeepSpeed or without ACCO.
        """
        name = str(run) + ("-resumed" if resumed else "")
        folder = self.folder / name
        folder.mkdir()
        is_acco = run.optimizer == "acco"
        checkout = self.checkouts / script.checkout
        words = {"models": self.folder, "texts": self.folder, "file": checkout / script.file, "out": folder / "out"}
        words |= {"seed": run.seed, "n": run.n, "steps": run.steps, "half": run.steps // 2, "saved": resumed}
        plugin = ("-m", "deepspeed_acco") if is_acco else ()
        config = launch_file(checkout / script.config, run.optimizer, run.n, folder)
        arguments = [*script.start, *script.arguments, *((script.resume or ()) if resumed else ())]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--main_process_port", "0", *plugin, *(word.format(**words) for word in arguments)]
        begun = time.time()
        printed = self._run(command, script, folder / "log")
        started = STARTED.search(printed)
        row = asdict(run)
        if bool(started) != is_acco:
            raise RuntimeError(f"{name}: the log says ACCO: schedule=... or not, other than asked; see {folder}/log")
        if not list((folder / "out").rglob("*optim_states.pt")):
            raise RuntimeError(f"{name}: no checkpoint of ZeRO; the script trained without DeepSpeed")
        if started:
            row["schedule"] = started[1]
        row["loss"] = script.loss(folder / "out", run.steps)
        return row | {"seconds": round(time.time() - begun)}

    def compare_resumed(self, script: Script, run: Run) -> dict:
        """Resumes a run at the step that it saved; returns a row: the loss and the largest difference of a weight to
        those of the run that went through."""
        whole = self.folder / str(run) / "out"
        row = self.train(script, run, resumed=whole / script.saved.format(half=run.steps // 2))
        difference = largest_difference(whole, self.folder / f"{run}-resumed" / "out")
        return row | {"resumed_at": run.steps // 2, "largest_difference": difference}

    def _run(self, command: list[str], script: Script, log: Path) -> str:
        search = self.checkouts / script.checkout / script.search if script.search else None
        environment = rank_environment() | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "datasets")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [search and str(search), environment["PYTHONPATH"]]))
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, cwd=log.parent, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                code = process.wait(LIMIT_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        printed = log.read_text(errors="replace")
        if code:
            raise RuntimeError(f"{log.parent.name} ended with {code}:\n{printed[-LAST_LETTERS:]}")
        return printed


def largest_difference(first: Path, second: Path) -> float:
    """Returns the largest difference of a weight between two saved models or adapters; 0.0 where all are equal to the
    bit.

    Raises:
        ValueError: there are not the same weights in both.
    """
    weights = []
    for folder in (first, second):
        weights.append({})
        for file in folder.glob("*.safetensors"):
            weights[-1] |= load_file(file)
    if not weights[0] or weights[0].keys() != weights[1].keys():
        raise ValueError(f"{first} and {second} have not the same weights: {len(weights[0])} and {len(weights[1])}")
    if all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()):
        return 0.0
    return max((value.double() - weights[1][name].double()).abs().max().item() for name, value in weights[0].items())


# ---- results


def revision(checkout: Path) -> str:
    """Returns the commit of a clone.

    Raises:
        SystemExit: it is no clone, or was changed.
    """
    done = subprocess.run(["git", "-C", checkout, "status", "--porcelain"], capture_output=True, text=True)
    if done.returncode or done.stdout:
        raise SystemExit(f"{checkout} is not an unchanged git clone:\n{done.stdout or done.stderr}")
    return subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()


def summary(results: dict) -> list[dict]:
    """Returns a row for each script, number of micro-batches and of steps: means of the losses over the seeds that both
    have, how far ACCO's is above AdamW's in percent, and what resuming changed."""
    rows = []
    runs = [run for run in results["runs"] if "resumed_at" not in run]
    for script, n, steps in sorted({_setting(run) for run in runs}):
        own = [run for run in runs if _setting(run) == (script, n, steps)]
        losses = {name: {r["seed"]: r["loss"] for r in own if r["optimizer"] == name} for name in ("adamw", "acco")}
        seeds = sorted(losses["adamw"].keys() & losses["acco"].keys())
        if not seeds:
            continue
        percent = [100 * (losses["acco"][seed] / losses["adamw"][seed] - 1) for seed in seeds]
        row = {
            "script": script,
            "n": n,
            "steps": steps,
            "schedule": next(run["schedule"] for run in own if "schedule" in run),
        }
        row |= {name: round(statistics.mean(by_seed[seed] for seed in seeds), 4) for name, by_seed in losses.items()}
        row |= {"percent": [round(p, 3) for p in percent], "mean_percent": round(statistics.mean(percent), 3)}
        resumed = [run for run in results["runs"] if "resumed_at" in run and _setting(run) == (script, n, steps)]
        rows.append(row | {"resumed_differs": resumed[0]["largest_difference"] if resumed else None})
    return rows


def _setting(run: dict) -> tuple[str, int, int]:
    return run["script"], run["n"], run["steps"]


def table(results: dict) -> str:
    """Returns the summary in Markdown."""
    lines = [
        "| script | n | schedule | steps | AdamW, ZeRO-1 | ACCO | by seed, % | mean, % | resumed |",
        "|" + "---|" * 9,
    ]
    for row in results["summary"]:
        by_seed = ", ".join(f"{value:+.2f}" for value in row["percent"])
        differs = row["resumed_differs"]
        resumed = "" if differs is None else "equal to the bit" if differs == 0 else f"differs by up to {differs:.2g}"
        lines.append(
            f"| {row['script']} | {row['n']} | `{row['schedule']}` | {row['steps']} | {row['adamw']:.4f}"
            f" | {row['acco']:.4f} | {by_seed} | {row['mean_percent']:+.2f} | {resumed} |"
        )
    return "\n".join(lines) + "\n"


def with_results(page: str, results: dict) -> str:
    """Returns a page whose table and date are those of the results."""
    page = re.sub(r"^\| script \| n \|.*?\n(?!\|)", lambda _: table(results), page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^- Date: [\d-]+", f"- Date: {results['date']}", page, flags=re.MULTILINE)


def is_done(results: dict, run: Run, resumed: bool = False) -> bool:
    return any(asdict(run).items() <= row.items() and ("resumed_at" in row) == resumed for row in results["runs"])


def write(results: dict, out: Path) -> None:
    """Writes the file whole or not at all, a line for each run."""
    lines = []
    for key, value in results.items():
        has_rows = isinstance(value, list) and value
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if has_rows else ""
        lines.append(f' "{key}": ' + (f"[\n{rows}\n ]" if has_rows else json.dumps(value)))
    part = out.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(out)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Makes the runs that are not in --out, and writes each: all scripts and seeds with the first n before the next."""
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": []}
    runner = Runner(arguments.checkouts, folder)
    chosen = [script for script in SCRIPTS if not arguments.scripts or script.name in arguments.scripts]
    skipped = {script.name: reason for script in chosen if (reason := runner.reason_to_skip(script))}
    chosen = [script for script in chosen if script.name not in skipped]
    used = dict.fromkeys(script.checkout for script in chosen)
    packages = ("deepspeed", "accelerate", "transformers", "datasets", "peft")
    head = {
        "command": "python -m tests.public_scripts --checkouts DIR --out tests/public_scripts/results.json",
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "versions": {name: version(name) for name in packages if importlib.util.find_spec(name)},
        "checkouts": results.get("checkouts", {}) | {name: revision(arguments.checkouts / name) for name in used},
        "skipped": skipped,
    }
    materials.make(folder, arguments.seeds)
    results = head | {"summary": [], "runs": results["runs"]}

    def add(row: dict) -> None:
        results["runs"].append(row)
        results["summary"] = summary(results)
        write(results, arguments.out)
        print(json.dumps(row), flush=True)

    for n, seed, script in itertools.product(arguments.n, arguments.seeds, chosen):
        steps = arguments.steps or script.steps
        acco, adamw = (Run(script.name, optimizer, n, steps, seed) for optimizer in ("acco", "adamw"))
        for run in (acco, adamw):
            if not is_done(results, run):
                add(runner.train(script, run))
        is_resumed = script.resume is not None and n in script.resume_n and seed == arguments.seeds[0]
        if is_resumed and not is_done(results, acco, resumed=True):
            add(runner.compare_resumed(script, acco))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.public_scripts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="results; the runs in it are kept")
    parser.add_argument("--page", type=Path, help="a page whose table and date become those of --out; runs nothing")
    parser.add_argument("--checkouts", type=Path, help="a folder with a git clone of each project")
    parser.add_argument("--scripts", nargs="+", choices=[script.name for script in SCRIPTS], help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--n", nargs="+", type=int, default=[1, 2], help="micro-batches a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of each run (default: each script's own)")
    parser.add_argument("--keep", type=Path, help="a folder for models, texts and what the scripts write")
    arguments = parser.parse_args()
    if arguments.page:
        arguments.page.write_text(with_results(arguments.page.read_text(), json.loads(arguments.out.read_text())))
        return
    if arguments.checkouts is None:
        parser.error("--checkouts is needed: a folder with git clones of trl and accelerate")
    arguments.checkouts = arguments.checkouts.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.keep or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        measure(arguments, folder)


if __name__ == "__main__":
    main()
