# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Step time against R/C, measured on two shaped hosts beside what ``ds_acco plan`` predicts, with a picture.

    python benchmarks/sweep.py --out benchmarks/results/sweep.json
    python benchmarks/sweep.py --ranks-per-host 4 --out benchmarks/results/sweep_2x4.json
    python benchmarks/sweep.py --out benchmarks/results/sweep.json --draw

The network and the model stay, the emulated computation varies: a comparison for each point (``ds_acco compare``: root
and iproute2 needed). The plan gets one measured round for all points, the median of those with nothing beside them, and
each point's own micro-batch time; it also says with which ``estimate_fraction`` quantized configurations are measured.
Crossings are where a step takes as long as the fastest of DeepSpeed's stages that were measured.
"""

import json
import math
import statistics
from dataclasses import replace

from _common import compare, make_parser, new_figure, origin, progress, read_config, save, tell

from deepspeed_acco.algorithm.step_time import WARM_UP_STEPS
from deepspeed_acco.tools.palette import colors_of
from deepspeed_acco.tools.plan import model as plan
from deepspeed_acco.tools.plan.advice import stops_paying
from deepspeed_acco.tools.words import counted

CONFIGS = ("acco", "acco_int4", "wp", "dpu", "zero0", "zero1")
HOSTS = 2


def plan_name(config: str) -> str:
    return config.replace("_", "-")


def cluster_of(arguments, model: plan.Model, work: plan.Work, round_s: float) -> plan.Cluster:
    """Returns the hosts, with a network that makes the measured round."""
    anywhere = plan.Cluster(HOSTS * arguments.ranks_per_host, 1e9, backend="gloo", hosts=HOSTS)
    return plan.calibrated(model, anywhere, work, round_s)


def is_split_by_plan(config: str) -> bool:
    """Tells whether the plan chooses the phase A of a configuration: it quantizes, and its schedule has two phases."""
    mode = plan.modes().get(plan_name(config))
    return mode is not None and mode.is_quantized and mode.schedule.has_two_phases


def planned_fraction(arguments, config: str, micro_batch_ms: float) -> float:
    """Returns the phase A of such a configuration, as a part of the window, from the guess of R."""
    model = plan.Model(arguments.numel)
    work = plan.Work(micro_batch_ms / 1e3, arguments.n, update_s_per_parameter=1e-9)
    cluster = cluster_of(arguments, model, work, arguments.round_ms / 1e3)
    return plan.split_of(plan_name(config), model, cluster, work) / arguments.n


def measure(arguments, micro_batch_ms: float) -> dict:
    """Returns one point: what computes and communicates alone, and each configuration's step in seconds."""
    split = filter(is_split_by_plan, arguments.configs)
    fractions = {name: planned_fraction(arguments, name, micro_batch_ms) for name in split}
    configs = {name: read_config(name, "benchmarks/configs") for name in arguments.configs}
    for name, config in configs.items():
        config["gradient_accumulation_steps"] = arguments.n
        if name in fractions:
            config["optimizer"]["params"]["estimate_fraction"] = fractions[name]
    hosts = ("--hosts", HOSTS, "--ranks-per-host", arguments.ranks_per_host, "--rate", arguments.rate)
    model = ("--emulate-compute", f"{micro_batch_ms:.3f}", "--numel", arguments.numel)
    lengths = ("--steps", arguments.windows + WARM_UP_STEPS, "--passes", arguments.passes)
    results = compare(configs, *hosts, *model, *lengths)
    steps = {config["name"]: config["step_s"]["median"] for config in results["configs"]}
    return {**results["reference"], "estimate_fractions": fractions, "steps": steps}


def points(arguments, measured: list[dict]) -> tuple[float, dict, list[dict]]:
    """Returns the round that the plan was given, where ACCO stops paying by it, and each point's steps beside its
    own."""
    round_s = statistics.median(point["round_s"] for point in measured)
    model = plan.Model(arguments.numel)
    stages = [name for name in arguments.configs if name.startswith("zero")]
    rows, crossings = [], {}
    for point in measured:
        work = plan.Work(point["micro_batch_s"], arguments.n, update_s_per_parameter=1e-9)
        cluster = cluster_of(arguments, model, work, round_s)
        fractions = point["estimate_fractions"]
        for name in ("acco", "acco_int4", "acco_int4_commit8", "wp"):
            if name in arguments.configs and stages:
                crossing = stops_paying(model, cluster, work, stages, plan_name(name))
                crossings[name] = None if crossing == math.inf else crossing
        row = {"round_over_compute": round(round_s / point["compute_s"], 4), "compute_s": round(point["compute_s"], 4)}
        row["estimate_fractions"] = fractions
        for name, step in point["steps"].items():
            own = replace(work, estimate_fraction=fractions.get(name))
            predicted = plan.predict(plan_name(name), model, cluster, own).step_s
            figures = {"step_s": step, "predicted_s": predicted, "error": predicted / step - 1}
            row[name] = {key: round(value, 4) for key, value in figures.items()}
        rows.append(row)
    return round_s, crossings, rows


def measured_crossing(rows: list[dict], name: str) -> float | None:
    """Returns the R/C between two points where ``name`` stops being faster than the fastest stage, on a straight
    line."""
    stages = [key for key in rows[0] if key.startswith("zero")]
    lead = [
        (row["round_over_compute"], min(row[stage]["step_s"] for stage in stages) / row[name]["step_s"] - 1)
        for row in sorted(rows, key=lambda row: row["round_over_compute"])
    ]
    for (left, ahead), (right, behind) in reversed(list(zip(lead, lead[1:]))):
        if ahead > 0 >= behind:
            return round(left + (right - left) * ahead / (ahead - behind), 3)
    return None


MARKERS = ("o", "s", "^", "v", "D", "P", "X")


def draw(results: dict):
    """Returns a figure of steps over C against R/C: marks are measured, lines predicted."""
    figure = new_figure(8.0, 5.0)
    axes = figure.subplots()
    rows = results["points"]
    ratios = [row["round_over_compute"] for row in rows]
    colors = colors_of(results["configs"])
    # Marks grow smaller, so that those that coincide are all seen.
    for place, (name, color) in enumerate(colors.items()):
        over_compute = {key: [row[name][key] / row["compute_s"] for row in rows] for key in ("predicted_s", "step_s")}
        look = {"markersize": 10 - place, "markeredgecolor": "white", "markeredgewidth": 0.5}
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(ratios, over_compute["predicted_s"], color=color)
        axes.plot(ratios, over_compute["step_s"], marker, color=color, label=name, zorder=3 + place, **look)
    for name, crossing in results["measured_crossings"].items():
        if crossing is not None:
            label = f"{name} stops paying: R/C = {crossing:.3g}"
            axes.axvline(crossing, color=colors[name], linestyle=":", label=label)
    axes.set_xlabel("R / C: a round with nothing beside it, over the computation of a step")
    axes.set_ylabel("seconds of a step / C")
    hosts = f"{HOSTS} hosts x {counted(results.get('ranks_per_host', 1), 'rank')}"  # earlier results: one
    axes.set_title(f"{hosts} at {results['rate']}: measured (marks) and predicted (lines)", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def parse_arguments():
    parser = make_parser(__doc__, has_picture=True)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.3, 0.45, 0.6, 0.8, 1.0, 1.2, 2.0, 4.0])
    parser.add_argument("--rate", default="300mbit", help="of each host's link, as tc spells it")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="they share its link (default: %(default)s)")
    parser.add_argument("--numel", type=int, default=5_000_000, help="parameters")
    parser.add_argument("--n", type=int, default=10, help="micro-batches of a step")
    parser.add_argument("--round_ms", type=float, default=330.0, help="a guess of R; what counts is measured")
    parser.add_argument("--windows", type=int, default=4, help="measured steps of a run")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), help="files of benchmarks/configs (%(default)s)")
    return parser.parse_args()


def measure_all(arguments) -> dict:
    measured = []
    for ratio in arguments.ratios:
        micro_batch_ms = arguments.round_ms / ratio / arguments.n
        try:
            measured.append(measure(arguments, micro_batch_ms))
        except RuntimeError as failure:  # stock DeepSpeed aborts now and then at its end (exits.py)
            progress(f"R/C about {ratio:g}, measured again: {failure}")
            measured.append(measure(arguments, micro_batch_ms))
        steps = ", ".join(f"{name} {step:.3f}" for name, step in measured[-1]["steps"].items())
        progress(f"R/C about {ratio:g}: {steps} s/step")
    round_s, crossings, rows = points(arguments, measured)
    return {
        **origin(),
        **{key: getattr(arguments, key) for key in ("rate", "ranks_per_host", "numel", "n", "configs")},
        "steps_per_point": arguments.windows * arguments.passes,
        "round_alone_s": round(round_s, 4),
        "predicted_crossings": crossings,
        "measured_crossings": {name: measured_crossing(rows, name) for name in crossings},
        "largest_error": {name: max(abs(row[name]["error"]) for row in rows) for name in arguments.configs},
        "points": rows,
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.draw:
        results = json.loads(arguments.out.read_text())
    else:
        results = measure_all(arguments)
        tell(results, arguments.out)
    save(draw(results), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
