# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Validation loss of the schedules in equal time: what `ds_acco compare` measured of a step says how many steps each
makes while ``local`` makes 150, and benchmarks/convergence.py what so many steps bring.

    ds_acco compare ... --out runs/slow
    python benchmarks/equal_clock.py --times runs/slow/results.json --out benchmarks/results/equal_clock.json
    python benchmarks/equal_clock.py --draw --out benchmarks/results/equal_clock.json

Several --times are several networks. Times that differ by less than 3 % count as equal. Each run has a schedule of the
learning rate as long as itself. Trainings that convergence.json lacks are named, with the command that makes them.
DeepSpeed's own stages train as ZeRO-1 does.
"""

import json
import statistics
from pathlib import Path

from _common import make_parser, new_figure, origin, progress, save, write
from convergence import BASELINE, order

from deepspeed_acco.tools.palette import colors_of

FIRST, STEPS = "local", 150
ALIKE = 0.03
SETTING = {"ranks": 2, "batch_factor": 1, "lr": 1e-3, "precision": "fp32", "preset": "small", "seq_len": 64}
CONVERGENCE = Path(__file__).with_name("results") / "convergence.json"


def trained_as(name: str) -> str:
    """Returns the configuration of convergence.json that trains as one of `ds_acco compare` does."""
    return BASELINE if name.startswith("zero") else name


def rows_of(times: dict, runs: list[dict], missing: set[str]) -> list[dict]:
    """Returns a row for each configuration whose steps were timed, with the mean of its trainings' curves over the
    seeds; adds the command of a training that is not there to ``missing``."""
    step_s = {config["name"]: config["step_s"]["median"] for config in times["configs"] if config["step_s"]}
    if FIRST not in step_s:
        raise SystemExit(f"{times['command']} timed no {FIRST}, whose {STEPS} steps are the time that all have")
    network = f"R = {times['reference']['round_s'] / times['reference']['compute_s']:.2f} C"
    rows = []
    for name in sorted(step_s, key=order):
        times_as_fast = step_s[FIRST] / step_s[name]
        steps = STEPS if abs(times_as_fast - 1) < ALIKE else round(STEPS * times_as_fast)
        wanted = SETTING | {"config": trained_as(name), "steps": steps}
        own = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
        if not own:
            missing.add(f"--lr {SETTING['lr']:g} --steps {steps} --configs {trained_as(name)}")
            continue
        curve = [round(statistics.mean(losses), 4) for losses in zip(*(run["val_loss"] for run in own), strict=True)]
        row = {"network": network, "config": name, "step_s": round(step_s[name], 3), "steps": steps}
        row |= {"seeds": sorted(run["seed"] for run in own), "val_loss": curve[-1]}
        rows.append(row | {"curve_s": [round(step * step_s[name], 1) for step in own[0]["step"]], "curve": curve})
    return rows


def draw(results: dict):
    """Returns a figure: loss against seconds, a panel for each network."""
    networks = list(dict.fromkeys(row["network"] for row in results["rows"]))
    colors = colors_of(list(dict.fromkeys(row["config"] for row in results["rows"])))
    figure = new_figure(6.5 * len(networks), 5.0)
    for axes, network in zip(figure.subplots(1, len(networks), sharey=True, squeeze=False)[0], networks):
        for row in (row for row in results["rows"] if row["network"] == network):
            label = f"{row['config']}  {row['steps']} steps, {row['val_loss']:.3f}"
            style = "--" if row["config"].startswith("zero") else "-"
            axes.plot(row["curve_s"], row["curve"], style, label=label, color=colors[row["config"]])
        axes.set_title(network, fontsize=10)
        axes.set_xlabel("seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, title="last value, mean of the seeds")
    figure.axes[0].set_ylabel("validation loss (nats per byte)")
    return figure


def main() -> None:
    parser = make_parser(__doc__, has_picture=True)
    parser.add_argument("--times", nargs="+", type=Path, help="results.json of `ds_acco compare`, with local")
    parser.add_argument("--convergence", type=Path, default=CONVERGENCE, help="(default: benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.draw:
        results = json.loads(arguments.out.read_text())
    elif not arguments.times:
        parser.error("--times is needed: what `ds_acco compare` measured")
    else:
        runs, missing = json.loads(arguments.convergence.read_text())["runs"], set()
        rows = [row for file in arguments.times for row in rows_of(json.loads(file.read_text()), runs, missing)]
        if missing:
            script = f"python benchmarks/convergence.py --out {arguments.convergence}"
            raise SystemExit(
                "\n".join(["these trainings are missing:", *(f"{script} {one}" for one in sorted(missing))])
            )
        results = origin() | {"rows": rows}
    write(results, arguments.out)
    save(draw(results), arguments.out.with_suffix(".png"))
    for row in results["rows"]:
        progress(f"{row['network']} {row['config']:18} {row['steps']:4} steps of {row['step_s']} s: {row['val_loss']}")


if __name__ == "__main__":
    main()
