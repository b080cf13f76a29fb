# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Final validation loss of the example under each configuration, paired with DeepSpeed's ZeRO-1 on the same batches.

    python benchmarks/convergence.py --out benchmarks/results/convergence.json
    python benchmarks/convergence.py --out benchmarks/results/convergence.json --lr 1e-3 --ranks 4
    python benchmarks/convergence.py --out benchmarks/results/convergence.json --lr 1e-3 --batch-factor 4 --steps 75
    python benchmarks/convergence.py --out benchmarks/results/convergence.json --summary

Runs are added to those in --out, and those that are there already are not made again: another configuration, seed or
setting is one more command, and an interrupted one goes on. Every run of a setting sees the same batches, so the
difference to ZeRO-1 is taken seed by seed, and its interval is Student's over the seeds. A picture is drawn beside the
JSON (matplotlib needed).
"""

import argparse
import json
import math
import statistics
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.example_runs import machine, read_config, run_example  # noqa: E402

BASELINE = "zero1"
COLOURS = {
    "zero1": "black",
    "sync": "tab:grey",
    "acco": "tab:blue",
    "acco:estimate_fraction=0.75": "tab:cyan",
    "wp": "tab:orange",
    "dpu": "tab:red",
    "acco_int8": "tab:green",
    "acco_int4": "tab:purple",
}
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
# Student's t that holds 95 % in the middle, for 1, 2, ... degrees of freedom; 1.96 would make few seeds look sure.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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
    options = {"--preset": setting["preset"], "--seq_len": setting["seq_len"], "--steps": setting["steps"]}
    arguments = [str(word) for option in (options | {"--seed": seed}).items() for word in option]
    begin = time.perf_counter()
    changes = {key: setting[key] for key in ("ranks", "n", "lr", "precision")}
    metrics = run_example(config, *arguments, **changes)
    curve = {key: [line[key] for line in metrics] for key in ("step", "samples", "val_loss")}
    took = {"wall_s": round(time.perf_counter() - begin), "date": date.today().isoformat()}
    return {**setting, "config": config, "seed": seed, **took, **curve}


def is_of(run: dict, setting: dict) -> bool:
    return all(run[key] == value for key, value in setting.items())


def write(path: Path, results: dict) -> None:
    """A run a line."""
    rows = {key: ",\n".join(f"  {json.dumps(row)}" for row in results[key]) for key in ("commands", "summary", "runs")}
    body = ",\n".join(f' "{key}": [\n{text}\n ]' for key, text in rows.items())
    partly = path.with_suffix(".partly")
    partly.write_text(f'{{\n "machine": {json.dumps(results["machine"])},\n{body}\n}}\n')
    partly.replace(path)


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


def summarise(runs: list[dict]) -> list[dict]:
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


def interval(values: list[float]) -> list[float] | None:
    """Of the mean, 95 %, by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    t = STUDENT_T[min(len(values) - 1, len(STUDENT_T)) - 1]  # with more values than known a little too wide
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return [round(statistics.mean(values) + sign * half, 3) for sign in (-1, 1)]


def order(config: str) -> tuple[int, str]:
    known = list(COLOURS)
    return (known.index(config) if config in known else len(known), config)


def table(summary: list[dict]) -> str:
    lines, setting = [], None
    for row in summary:
        if row["setting"] != setting:
            setting = row["setting"]
            lines.append(setting)
        text = f"  {row['config']:<28} {row['val_loss']:.4f}"
        if "mean_percent" in row:
            text += f"  {row['mean_percent']:+.2f} %"
        if row.get("interval_percent"):
            text += "  [{:+.2f}, {:+.2f}]".format(*row["interval_percent"])
        if "percent" in row:
            text += "  by seed " + ", ".join(f"{pair:+.2f}" for pair in row["percent"])
        lines.append(text)
    return "\n".join(lines)


# ---- picture


def draw(results: dict, path: Path) -> None:
    """Curves of the setting with the most configurations, its first seed, and all final differences with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = settings_in(results["runs"])
    setting = max(settings, key=lambda one: len({run["config"] for run in results["runs"] if is_of(run, one)}))
    seed = min(run["seed"] for run in results["runs"] if is_of(run, setting))
    rows = [row for row in results["summary"] if "mean_percent" in row]
    height = max(4.6, 1.2 + 0.24 * len(rows))
    figure, (curves, differences) = pyplot.subplots(1, 2, figsize=(11.5, height), width_ratios=(1, 1.15))
    shown = [run for run in results["runs"] if is_of(run, setting) and run["seed"] == seed]
    for run in sorted(shown, key=lambda run: order(run["config"])):
        label, colour = f"{run['config']}  {run['val_loss'][-1]:.3f}", COLOURS.get(run["config"])
        style = "--" if run["config"] == BASELINE else "-"
        curves.plot(run["step"], run["val_loss"], style, label=label, color=colour)
    curves.set(xlabel="optimizer step", ylabel="validation loss (nats per byte)")
    curves.set_title(f"Seed {seed}: {in_words(setting)}", fontsize=9)
    curves.legend(title="last value", frameon=False)

    labels = []
    for place, row in enumerate(rows):
        colour = COLOURS.get(row["config"], "tab:brown")
        if row.get("interval_percent"):
            differences.plot(row["interval_percent"], [place, place], color=colour, linewidth=2)
        differences.plot(row["percent"], [place] * len(row["percent"]), "|", color=colour, markersize=9)
        differences.plot([row["mean_percent"]], [place], "o", color=colour)
        batch = row["micro_batch"] * row["n"] * row["ranks"]
        label = f"{row['config']}, {row['ranks']} ranks, batch {batch}, {row['steps']} steps, lr {row['lr']:g}"
        labels.append(label + (f", {row['precision']}" if row["precision"] != "fp32" else ""))
    differences.axvline(0, color="black", linestyle="--", linewidth=1)
    differences.axvspan(-0.5, 0.5, color="tab:green", alpha=0.12, linewidth=0)
    differences.set_xscale("symlog", linthresh=1)
    differences.set_xticks([-1, -0.5, 0, 0.5, 1, 3, 10], ["-1", "-0.5", "0", "0.5", "1", "3", "10"])
    differences.set_yticks(range(len(rows)), labels, fontsize=8)
    differences.invert_yaxis()
    differences.set_xlabel("final validation loss against ZeRO-1, % (beyond 1 logarithmic)")
    differences.set_title("Seeds (|), their mean, its 95 % interval; green: 0.5 %", fontsize=9)
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--summary", action="store_true", help="make no runs: summary and picture of those in --out")
    parser.add_argument("--out", type=Path, required=True, help="JSON; runs that it has are kept")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    results = {"machine": machine(), "commands": [], "summary": [], "runs": []}
    if arguments.out.is_file():
        results |= json.loads(arguments.out.read_text())
    setting = settings_of(arguments)
    wanted = [(seed, config) for seed in arguments.seeds for config in arguments.configs]
    have = {(run["seed"], run["config"]) for run in results["runs"] if is_of(run, setting)}
    missing = [] if arguments.summary else [pair for pair in wanted if pair not in have]
    command = " ".join(["python", "benchmarks/convergence.py", *sys.argv[1:]])
    if missing and command not in results["commands"]:
        results["commands"].append(command)
    for number, (seed, config) in enumerate(missing, 1):
        run = make_run(setting, config, seed)
        progress = f"{number}/{len(missing)} seed {seed} {config}: {run['val_loss'][-1]:.4f}, {run['wall_s']} s"
        print(progress, file=sys.stderr, flush=True)
        results["runs"].append(run)
        results["summary"] = summarise(results["runs"])
        write(arguments.out, results)
    results["summary"] = summarise(results["runs"])
    write(arguments.out, results)
    draw(results, arguments.out.with_suffix(".png"))
    print(table(results["summary"]))


if __name__ == "__main__":
    main()
