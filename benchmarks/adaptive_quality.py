# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Validation loss of adaptive windows beside ZeRO-1 on as many samples, one of two ranks slowed down.

    python benchmarks/adaptive_quality.py --out benchmarks/results/adaptive_quality.json
    python benchmarks/adaptive_quality.py --out benchmarks/results/adaptive_quality.json --draw

First the example with ds_configs/acco_adaptive.json. Its batch is what the clock made of it, so then DeepSpeed's ZeRO-1
with the two batches next to that (n micro-batches and n + 1), and for the first seed with the nominal one. All runs
have the same learning rate, the same schedule of it over the samples and the same data. ZeRO-1's loss at the batch that
resulted lies between its two runs, on a straight line. The picture has the losses against samples and against
seconds of training. Nothing else should run meanwhile: seconds are measured, and they make
the batch, too.
"""

import json
import statistics
import time

from _common import (
    interval,
    make_parser,
    new_figure,
    origin,
    progress,
    read_config,
    run_example,
    save,
    write,
)

from deepspeed_acco.tools.palette import SERIES

RANKS = 2
ADAPTIVE, BASELINE = "acco_adaptive", "zero1"


def train(arguments, config: str, seed: int, steps: int, n: int | None = None) -> dict:
    """One run, and its curve."""
    options = {key: getattr(arguments, key) for key in ("preset", "seq_len")} | {"steps": steps, "seed": seed}
    lines = run_example(config, options | {"slow": [1, arguments.slowness]}, ranks=RANKS, n=n, lr=arguments.lr)
    curve = {key: [line[key] for line in lines] for key in ("step", "samples", "seconds", "val_loss")}
    run = {
        "config": config,
        "seed": seed,
        "n": n,
        "samples_per_step": curve["samples"][-1] / curve["step"][-1],
        **curve,
    }
    words = f"{run['samples_per_step']:.0f} samples a step, {curve['step'][-1]} steps, {curve['seconds'][-1]:.0f} s"
    progress(f"{config} seed {seed}: {words}, val_loss {curve['val_loss'][-1]:.4f}")
    return run


def make_runs(arguments) -> list[dict]:
    config = read_config(BASELINE)
    nominal, micro_batch = config["gradient_accumulation_steps"], config["train_micro_batch_size_per_gpu"]
    runs = [train(arguments, ADAPTIVE, seed, arguments.steps) for seed in arguments.seeds]
    samples = statistics.mean(run["samples"][-1] for run in runs)
    below = int(statistics.mean(run["samples_per_step"] for run in runs) // (micro_batch * RANKS))
    for seed in arguments.seeds:
        of_first = {nominal} if seed == arguments.seeds[0] else set()  # for the picture: the same JSON but for ACCO
        for n in sorted({below, below + 1} | of_first):
            runs.append(train(arguments, BASELINE, seed, round(samples / (n * micro_batch * RANKS)), n))
    return runs


def between(run: dict, two: list[dict], key: str) -> float:
    """The last ``key`` of ZeRO-1 at the batch of ``run``, on the line through its runs with the batches beside it."""
    low, high = two
    part = (run["samples_per_step"] - low["samples_per_step"]) / (high["samples_per_step"] - low["samples_per_step"])
    return low[key][-1] + part * (high[key][-1] - low[key][-1])


def summarize(runs: list[dict]) -> dict:
    rows, percent = [], []
    for config, n in dict.fromkeys((run["config"], run["n"]) for run in runs):
        own = [run for run in runs if (run["config"], run["n"]) == (config, n)]
        last = {key: statistics.mean(run[key][-1] for run in own) for key in ("samples", "step", "seconds", "val_loss")}
        batch = statistics.mean(run["samples_per_step"] for run in own)
        rows.append({"config": config, "n": n, "samples_per_step": round(batch, 1)})
        rows[-1] |= {key: round(value, 4) for key, value in last.items()}
    for run in runs:
        if run["config"] == ADAPTIVE:
            two = [other for other in runs if other["config"] == BASELINE and other["seed"] == run["seed"]][-2:]
            percent.append(100 * (run["val_loss"][-1] / between(run, two, "val_loss") - 1))
    above = {"percent": [round(value, 3) for value in percent], "mean_percent": round(statistics.mean(percent), 3)}
    return {"rows": rows, "above_zero1_at_the_same_batch": above | {"interval_percent": interval(percent)}}


def table(summary: dict) -> str:
    lines = [f"{'':<14} n  samples/step  steps  samples  seconds  val_loss   (means over seeds)"]
    for row in summary["rows"]:
        lines.append(
            f"{row['config']:<14}{row['n'] or '':>2}  {row['samples_per_step']:>12.0f}  {row['step']:>5.0f}"
            f"  {row['samples']:>7.0f}  {row['seconds']:>7.1f}  {row['val_loss']:.4f}"
        )
    above = summary["above_zero1_at_the_same_batch"]
    text = f"adaptive against ZeRO-1 at the batch that resulted: {above['mean_percent']:+.2f} %"
    if above["interval_percent"]:
        text += ", 95 % interval [{:+.2f}, {:+.2f}]".format(*above["interval_percent"])
    return "\n".join([*lines, text + ", by seed " + ", ".join(f"{value:+.2f}" for value in above["percent"])])


def draw(results: dict):
    """Returns a figure: the curves of the first seed against samples and against seconds."""
    runs = results["runs"]
    figure = new_figure(11.0, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    shown = [run for run in runs if run["seed"] == runs[0]["seed"]]
    for axes, key in zip(panels, ("samples", "seconds")):
        for run, dashes in zip(shown, ("-", ":", "--", "-.")):
            name = "adaptive acco" if run["config"] == ADAPTIVE else "ZeRO-1"
            label = f"{name}, {run['samples_per_step']:.0f} a step: {run['val_loss'][-1]:.3f}"
            axes.plot(run[key], run["val_loss"], dashes, label=label, color=SERIES[run["config"]])
        axes.grid(alpha=0.3)
    panels[0].locator_params(axis="x", nbins=5)
    panels[0].set(xlabel="samples trained", ylabel="validation loss (nats per byte)")
    panels[1].set(xlabel="seconds of training, without the validations")
    panels[0].legend(title="samples a step: last value", frameon=False)
    words = f"2 ranks, rank 1 is {results['slowness']:g} times slower, lr {results['lr']:g}, seed {runs[0]['seed']}"
    figure.suptitle(f"examples/train_gpt.py, {words}", fontsize=11)
    return figure


def main() -> None:
    parser = make_parser(__doc__, has_picture=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of the nominal batch (default: %(default)s)")
    lr = read_config(BASELINE)["optimizer"]["params"]["lr"]
    parser.add_argument("--lr", type=float, default=lr, help="of all runs (default: %(default)s, as in the JSONs)")
    parser.add_argument("--seq_len", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--preset", default="small", help="(default: %(default)s)")
    parser.add_argument("--slowness", type=float, default=3.0, help="of rank 1 (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.draw:
        results = json.loads(arguments.out.read_text())
    else:
        results = measure_all(arguments)
        print(table(results))
        write(results, arguments.out)
    save(draw(results), arguments.out.with_suffix(".png"))


def measure_all(arguments) -> dict:
    begin = time.perf_counter()
    runs = make_runs(arguments)
    progress(f"the whole measurement took {time.perf_counter() - begin:.0f} s")
    setting = {key: getattr(arguments, key) for key in ("preset", "seq_len", "steps", "slowness", "lr")}
    return {**origin(), **setting, **summarize(runs), "runs": runs}


if __name__ == "__main__":
    main()
