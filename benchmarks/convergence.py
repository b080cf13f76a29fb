# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Final validation loss of the example under each configuration, paired with DeepSpeed's ZeRO-1 on the same batches.

    python benchmarks/convergence.py --out benchmarks/results/convergence.json
    python benchmarks/convergence.py --out benchmarks/results/convergence.json --lr 1e-3 --ranks 4
    python benchmarks/convergence.py --out benchmarks/results/convergence.json --lr 1e-3 --batch-factor 4 --steps 75
    python benchmarks/convergence.py --out benchmarks/results/convergence.json --draw

Runs are added to those in --out, and those that are there already are not made again: another configuration, seed or
setting is one more command, and an interrupted one goes on. Every run of a setting sees the same batches, so the
difference to ZeRO-1 is taken seed by seed, and its interval is Student's over the seeds.
"""

import json
import statistics
import time
from datetime import date

from _common import (
    interval,
    make_parser,
    new_figure,
    origin,
    progress,
    read_config,
    run_example,
    save,
    table_of_losses,
    write,
)

from deepspeed_acco.tools.palette import SERIES, colors_of

BASELINE = "zero1"
SETTING = (
    "preset",
    "seq_len",
    "steps",
    "ranks",
    "batch_factor",
    "micro_batch",
    "n",
    "lr",
    "precision",
)  # what all runs of a row share

# ---- runs


def settings_of(arguments) -> dict:
    config = read_config(BASELINE)
    setting = {key: getattr(arguments, key) for key in SETTING if hasattr(arguments, key)}
    n = config["gradient_accumulation_steps"] * arguments.batch_factor
    lr = arguments.lr or config["optimizer"]["params"]["lr"]
    return setting | {"micro_batch": config["train_micro_batch_size_per_gpu"], "n": n, "lr": lr}


def make_run(setting: dict, config: str, seed: int) -> dict:
    own = read_config(config)["train_micro_batch_size_per_gpu"]
    if own != setting["micro_batch"]:
        raise SystemExit(f"{config} has the micro-batch {own}, {BASELINE} another; give both the same to compare them")
    options = {key: setting[key] for key in ("preset", "seq_len", "steps")} | {"seed": seed}
    begin = time.perf_counter()
    changes = {key: setting[key] for key in ("ranks", "n", "lr", "precision")}
    metrics = run_example(config, options, **changes)
    curve = {key: [line[key] for line in metrics] for key in ("step", "samples", "val_loss")}
    took = {"wall_s": round(time.perf_counter() - begin), "date": date.today().isoformat()}
    return {**setting, "config": config, "seed": seed, **took, **curve}


def is_of(run: dict, setting: dict) -> bool:
    return all(run[key] == value for key, value in setting.items())


# ---- summary


def settings_in(runs: list[dict]) -> list[dict]:
    found = []
    for run in runs:
        setting = {key: run[key] for key in SETTING}
        if setting not in found:
            found.append(setting)
    return found


def in_words(setting: dict) -> str:
    batch = setting["micro_batch"] * setting["n"] * setting["ranks"]
    words = f"{setting['ranks']} ranks, {batch} sequences of {setting['seq_len']} a step, {setting['steps']} steps"
    return f"{words}, lr {setting['lr']:g}, {setting['precision']}, {setting['preset']}"


def summarize(runs: list[dict]) -> list[dict]:
    """For each setting and configuration the difference to the baseline with the same seed, in percent of its loss."""
    rows = []
    for setting in settings_in(runs):
        of_setting = [run for run in runs if is_of(run, setting)]
        baseline = {run["seed"]: run["val_loss"][-1] for run in of_setting if run["config"] == BASELINE}
        for config in sorted({run["config"] for run in of_setting}, key=order):
            own = {run["seed"]: run["val_loss"][-1] for run in of_setting if run["config"] == config}
            row = {"setting": in_words(setting), **setting, "config": config, "seeds": sorted(own)}
            row["val_loss"] = round(statistics.mean(own.values()), 4)
            pairs = [100 * (own[seed] / baseline[seed] - 1) for seed in sorted(own) if seed in baseline]
            if pairs and config != BASELINE:
                row["percent"] = [round(pair, 3) for pair in pairs]
                row["mean_percent"] = round(statistics.mean(pairs), 3)
                row["interval_percent"] = interval(pairs)
            rows.append(row)
    return rows


def order(config: str) -> tuple[int, str]:
    known = [BASELINE, *SERIES]
    return (known.index(config) if config in known else len(known), config)


# ---- picture


def draw(results: dict):
    """Returns a figure: the curves of the setting with the most configurations, its first seed, and all final
    differences with intervals."""
    settings = settings_in(results["runs"])
    setting = max(settings, key=lambda one: len({run["config"] for run in results["runs"] if is_of(run, one)}))
    seed = min(run["seed"] for run in results["runs"] if is_of(run, setting))
    rows = [row for row in results["summary"] if "mean_percent" in row]
    colors = colors_of(sorted({run["config"] for run in results["runs"]}, key=order))
    figure = new_figure(13.0, max(5.0, 1.6 + 0.28 * len(rows)))
    curves, differences = figure.subplots(1, 2, width_ratios=(1, 1.1))
    shown = [run for run in results["runs"] if is_of(run, setting) and run["seed"] == seed]
    for run in sorted(shown, key=lambda run: order(run["config"])):
        label = f"{run['config']}  {run['val_loss'][-1]:.3f}"
        style = "--" if run["config"] == BASELINE else "-"
        curves.plot(run["step"], run["val_loss"], style, label=label, color=colors[run["config"]])
    curves.set(xlabel="optimizer step", ylabel="validation loss (nats per byte)")
    curves.set_title(f"Seed {seed}: " + in_words(setting).replace(" steps, ", " steps,\n"), fontsize=10)
    curves.legend(title="last value", frameon=False)

    labels = []
    for place, row in enumerate(rows):
        color = colors[row["config"]]
        if row.get("interval_percent"):
            differences.plot(row["interval_percent"], [place, place], color=color, linewidth=2)
        differences.plot(row["percent"], [place] * len(row["percent"]), "|", color=color, markersize=9)
        differences.plot([row["mean_percent"]], [place], "o", color=color)
        batch = row["micro_batch"] * row["n"] * row["ranks"]
        label = f"{row['config']}, {row['ranks']} ranks, batch {batch}, {row['steps']} steps, lr {row['lr']:g}"
        labels.append(label + (f", {row['precision']}" if row["precision"] != "fp32" else ""))
    differences.axvline(0, color=colors[BASELINE], linestyle="--", linewidth=1)
    differences.axvspan(-0.5, 0.5, color="#ECECEC", linewidth=0)
    differences.set_xscale("symlog", linthresh=1)
    differences.set_xticks([-1, -0.5, 0, 0.5, 1, 3, 10], ["-1", "-0.5", "0", "0.5", "1", "3", "10"])
    differences.set_yticks(range(len(rows)), labels, fontsize=9)
    differences.invert_yaxis()
    differences.set_xlabel("final validation loss against ZeRO-1, %\n(logarithmic beyond 1)")
    differences.set_title("Each seed (|), their mean and its 95 % interval;\nshaded: within 0.5 %", fontsize=10)
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def parse_arguments():
    parser = make_parser(__doc__, has_picture=True)
    parser.add_argument(
        "--configs",
        nargs="+",
        default=[BASELINE, "acco", "wp", "dpu"],
        help="files of ds_configs (%(default)s); acco:estimate_fraction=0.75 changes one of its params",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--batch-factor", type=int, default=1, help="multiplies gradient_accumulation_steps (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, help="of all configurations (default: the JSONs')")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--seq_len", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--preset", default="small", help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    command, machine = (origin()[key] for key in ("command", "machine"))
    results: dict = {"machine": machine, "commands": [], "summary": [], "runs": []}
    if arguments.out.is_file():
        results |= json.loads(arguments.out.read_text())
    if not arguments.draw:
        make_missing_runs(arguments, results, command)
    save(draw(results), arguments.out.with_suffix(".png"))
    print(table_of_losses(results["summary"], lambda row: row["config"]))


def make_missing_runs(arguments, results: dict, command: str) -> None:
    """Adds the runs that are asked for and not there yet; written after each."""
    setting = settings_of(arguments)
    wanted = [(seed, config) for seed in arguments.seeds for config in arguments.configs]
    have = {(run["seed"], run["config"]) for run in results["runs"] if is_of(run, setting)}
    missing = [pair for pair in wanted if pair not in have]
    if missing and command not in results["commands"]:
        results["commands"].append(command)
    for number, (seed, config) in enumerate(missing, 1):
        run = make_run(setting, config, seed)
        progress(f"{number}/{len(missing)} seed {seed} {config}: {run['val_loss'][-1]:.4f}, {run['wall_s']} s")
        results["runs"].append(run)
        results["summary"] = summarize(results["runs"])
        write(results, arguments.out)


if __name__ == "__main__":
    main()
