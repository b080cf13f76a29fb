# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Step time on two shaped hosts with 1, 2 and 4 ranks each, and what each host sends in a step, with a picture.

    python benchmarks/ranks_per_host.py --out benchmarks/results/ranks_per_host.json
    python benchmarks/ranks_per_host.py --out benchmarks/results/ranks_per_host.json --draw

The model, the link and the micro-batches of a rank stay (``ds_acco compare``: root and iproute2 needed). ``flat`` is
acco with ``ranks_per_host`` = 1: rounds that do not look at hosts.
"""

import copy
import json

from _common import compare, make_parser, new_figure, origin, progress, read_config, save, tell

from deepspeed_acco.algorithm.step_time import WARM_UP_STEPS
from deepspeed_acco.tools.palette import colors_of

CONFIGS = ("acco", "acco_int4", "flat", "zero0", "zero1")


def configs_of(arguments) -> dict[str, dict]:
    """Returns the JSONs; "auto" would measure for longer than a run lasts, so the split is given."""
    configs = {}
    for name in arguments.configs:
        config = copy.deepcopy(read_config("acco" if name == "flat" else name, "benchmarks/configs"))
        config["gradient_accumulation_steps"] = arguments.n
        params = config["optimizer"]["params"]
        if name == "flat":
            params["ranks_per_host"] = 1
        if "estimate_comm" in params:
            params["estimate_fraction"] = arguments.int4_fraction
        configs[name] = config
    return configs


def measure(arguments, ranks_per_host: int) -> dict:
    """Returns a row: what computes and communicates alone, and each configuration's step and bytes."""
    hosts = ("--hosts", 2, "--ranks-per-host", ranks_per_host, "--rate", arguments.rate)
    work = ("--emulate-compute", arguments.micro_batch_ms, "--numel", arguments.numel)
    lengths = ("--steps", arguments.windows + WARM_UP_STEPS, "--passes", arguments.passes)
    results = compare(configs_of(arguments), *hosts, *work, *lengths)
    row = {"ranks_per_host": ranks_per_host, **results["reference"]}
    for config in results["configs"]:
        figures = {"step_s": config["step_s"]["median"], "of_bound": config["of_bound"]}
        row[config["name"]] = figures | {"interface_bytes": config["interface_bytes"]}
    fastest = min(row[name]["step_s"] for name in arguments.configs if name.startswith("zero"))
    row["fastest_stage_over"] = {
        name: round(fastest / row[name]["step_s"], 3) for name in arguments.configs if not name.startswith("zero")
    }
    return row


def draw(results: dict):
    """Returns a figure: bars of the steps for each number of ranks, and of what a host sends."""
    figure = new_figure(9.0, 4.2)
    rows, names = results["rows"], results["configs"]
    colors = colors_of(names)
    places = range(len(rows))
    width = 0.8 / len(names)
    panels = (("step_s", 1.0, "seconds of a step"), ("interface_bytes", 1e-6, "MB that a host sends in a step"))
    for axes, (key, factor, label) in zip(figure.subplots(1, 2), panels):
        for number, name in enumerate(names):
            at = [place + (number - (len(names) - 1) / 2) * width for place in places]
            heights = [(row[name][key] or 0) * factor for row in rows]
            axes.bar(at, heights, width * 0.9, color=colors[name], label=name)
        axes.set_xticks(list(places), [f"2 hosts x {row['ranks_per_host']}" for row in rows])
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if key == "step_s":
            for place, row in zip(places, rows):
                axes.hlines(row["compute_s"], place - 0.45, place + 0.45, color="black", linestyle=":", linewidth=1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"Two hosts at {results['rate']}; dotted: computation alone", fontsize=11)
    return figure


def parse_arguments():
    parser = make_parser(__doc__, has_picture=True)
    parser.add_argument("--ranks-per-host", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rate", default="200mbit", help="of each host's link, as tc spells it")
    parser.add_argument("--numel", type=int, default=10_000_000, help="parameters")
    parser.add_argument("--n", type=int, default=8, help="micro-batches of a step")
    parser.add_argument("--micro_batch_ms", type=float, default=250.0)
    parser.add_argument("--int4_fraction", type=float, default=0.75, help="estimate_fraction of acco_int4")
    parser.add_argument("--windows", type=int, default=6, help="measured steps of a run")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), help="flat, or files of benchmarks/configs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.draw:
        results = json.loads(arguments.out.read_text())
    else:
        results = origin()
        for key in ("rate", "numel", "n", "micro_batch_ms", "int4_fraction", "configs"):
            results[key] = getattr(arguments, key)
        results |= {"steps_of_each": arguments.windows * arguments.passes, "rows": []}
        for ranks_per_host in arguments.ranks_per_host:
            results["rows"].append(measure(arguments, ranks_per_host))
            progress(f"2 hosts x {ranks_per_host}: {results['rows'][-1]['fastest_stage_over']}")
        tell(results, arguments.out)
    save(draw(results), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
