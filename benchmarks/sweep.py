# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Step time against R/C, measured on two shaped hosts beside what ``ds_acco plan`` predicts, with a picture.

    python benchmarks/sweep.py --out benchmarks/results/sweep.json

The network and the model stay, the emulated computation varies (two_hosts.py: root and iproute2 needed). The plan gets
one measured round for all points, the median of those with nothing beside them, and each point's own micro-batch time;
it also says with which ``estimate_fraction`` acco_int4 is measured. Crossings are where a step takes as long as the
fastest of DeepSpeed's stages that were measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CONFIGS = ("acco", "acco_int4", "wp", "dpu", "zero0", "zero1")
COLOURS = {
    "acco": "#0072B2",
    "acco_int4": "#009E73",
    "wp": "#E69F00",
    "dpu": "#D55E00",
    "zero0": "#CC79A7",
    "zero1": "#000000",
}


def plan_name(config: str) -> str:
    return config.replace("_", "-")


def planned_fraction(arguments, micro_batch_ms: float) -> float:
    """Of acco_int4, from the guess of R."""
    from deepspeed_acco.tools.plan import model as plan

    model = plan.Model(arguments.numel)
    work = plan.Work(micro_batch_ms / 1e3, arguments.n, update_s_per_parameter=1e-9)
    cluster = plan.calibrated(model, plan.Cluster(2, 1e9, backend="gloo"), work, arguments.round_ms / 1e3)
    return plan.split_of("acco-int4", model, cluster, work) / arguments.n


def measure(arguments, micro_batch_ms: float) -> dict:
    """What two_hosts.py printed for one point."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "two_hosts.py"), "--configs", *arguments.configs]
        command += ["--rate", arguments.rate, "--numel", str(arguments.numel), "--micro_batches", str(arguments.n)]
        command += ["--micro_batch_ms", f"{micro_batch_ms:.3f}", "--windows", str(arguments.windows)]
        command += ["--passes", str(arguments.passes), "--out", str(out)]
        command += ["--estimate_fraction", str(planned_fraction(arguments, micro_batch_ms))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def points(measured: list[dict]) -> tuple[float, dict, list[dict]]:
    """The round that the plan was given, where ACCO stops paying by it, and each point's steps beside its own."""
    from dataclasses import replace

    from deepspeed_acco.tools.plan import model as plan
    from deepspeed_acco.tools.plan.advice import stops_paying

    round_s = statistics.median(point["round_alone_s"] for point in measured)
    first = measured[0]
    model = plan.Model(first["numel"])
    rows, crossings = [], {}
    names = [row["config"] for row in first["rows"]]
    for point in measured:
        work = plan.Work(point["micro_batch_s"], point["n"], update_s_per_parameter=1e-9)
        cluster = plan.calibrated(model, plan.Cluster(2, 1e9, backend="gloo"), work, round_s)
        stages = [name for name in names if name.startswith("zero")]
        for name in ("acco", "acco_int4", "wp"):
            if name in names and stages:
                crossings[name] = stops_paying(model, cluster, work, stages, plan_name(name))
        row = {"round_over_compute": round(round_s / point["compute_s"], 4), "compute_s": point["compute_s"]}
        row["estimate_fraction_of_int"] = point["estimate_fraction_of_int"]
        for config in point["rows"]:
            name, step = config["config"], config["step_s"]
            own = replace(work, estimate_fraction=point["estimate_fraction_of_int"]) if "int" in name else work
            predicted = plan.predict(plan_name(name), model, cluster, own).step_s
            row[name] = {"step_s": step, "predicted_s": round(predicted, 4), "error": round(predicted / step - 1, 4)}
        rows.append(row)
    return round_s, crossings, rows


def measured_crossing(rows: list[dict], name: str) -> float | None:
    """The R/C between two points where ``name`` stops being faster than the fastest stage, on a straight line."""
    stages = [key for key in rows[0] if key.startswith("zero")]
    lead = [
        (row["round_over_compute"], min(row[stage]["step_s"] for stage in stages) / row[name]["step_s"] - 1)
        for row in sorted(rows, key=lambda row: row["round_over_compute"])
    ]
    for (left, ahead), (right, behind) in reversed(list(zip(lead, lead[1:]))):
        if ahead > 0 >= behind:
            return round(left + (right - left) * ahead / (ahead - behind), 3)
    return None


def draw(summary: dict, path: Path) -> None:
    """Steps over C against R/C: dots are measured, lines predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    rows = summary["points"]
    ratios = [row["round_over_compute"] for row in rows]
    for name in summary["configs"]:
        colour = COLOURS.get(name, "#009E73")
        for key, style in (("predicted_s", {"linestyle": "-"}), ("step_s", {"marker": "o", "linestyle": ""})):
            values = [row[name][key] / row["compute_s"] for row in rows]
            axes.plot(ratios, values, color=colour, label=name if key == "predicted_s" else None, **style)
    for name, crossing in summary["measured_crossings"].items():
        if crossing is None:
            continue
        label = f"{name} stops paying: R/C = {crossing:.2f}"
        axes.axvline(crossing, color=COLOURS[name], linestyle=":", label=label)
    axes.set_xlabel("R / C: a round with nothing beside it, over the computation of a step")
    axes.set_ylabel("seconds of a step / C")
    axes.set_title(f"Two hosts at {summary['rate']}: measured (dots) and predicted (lines)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.3, 0.45, 0.6, 0.8, 1.0, 1.2, 2.0, 4.0])
    parser.add_argument("--rate", default="300mbit", help="of each host's link, as tc spells it")
    parser.add_argument("--numel", type=int, default=5_000_000, help="parameters")
    parser.add_argument("--n", type=int, default=10, help="micro-batches of a step")
    parser.add_argument("--round_ms", type=float, default=330.0, help="a guess of R; what counts is measured")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measured = []
    for ratio in arguments.ratios:
        micro_batch_ms = arguments.round_ms / ratio / arguments.n
        try:
            measured.append(measure(arguments, micro_batch_ms))
        except RuntimeError as failure:  # stock DeepSpeed aborts now and then at its end (exits.py)
            print(f"R/C about {ratio:g}, measured again: {failure}", file=sys.stderr, flush=True)
            measured.append(measure(arguments, micro_batch_ms))
        steps = ", ".join(f"{row['config']} {row['step_s']:.3f}" for row in measured[-1]["rows"])
        print(f"R/C about {ratio:g}: {steps} s/step", file=sys.stderr, flush=True)
    round_s, crossings, rows = points(measured)
    summary = {
        "command": " ".join(["python", "benchmarks/sweep.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, two network namespaces",
        "rate": arguments.rate,
        "numel": arguments.numel,
        "n": arguments.n,
        "configs": arguments.configs,
        "steps_per_point": arguments.windows * arguments.passes,
        "round_alone_s": round(round_s, 4),
        "predicted_crossings": crossings,
        "measured_crossings": {name: measured_crossing(rows, name) for name in crossings},
        "largest_error": {name: max(abs(row[name]["error"]) for row in rows) for name in arguments.configs},
        "points": rows,
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")
        draw(summary, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
