# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Final validation loss of the default example under each schedule and under DeepSpeed's ZeRO-1, on the same batches.

    python benchmarks/convergence.py --seeds 1 2 3 --out benchmarks/results/convergence.json

Also draws the curves beside the JSON (matplotlib needed).
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.example_runs import run_example  # noqa: E402

COLOURS = {"sync": "black", "acco": "tab:blue", "wp": "tab:orange", "dpu": "tab:red", "zero1": "tab:grey"}


def draw(curves: dict[str, list[dict]], seed: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    for name, lines in curves.items():
        style = "--" if name == "zero1" else "-"
        axes.plot(
            [line["step"] for line in lines],
            [line["val_loss"] for line in lines],
            style,
            label=f"{name}  {lines[-1]['val_loss']:.3f}",
            color=COLOURS.get(name),
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title(f"examples/train_gpt.py, 2 ranks, seed {seed}: the same batches under each schedule", fontsize=9)
    axes.legend(title="last value", frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["sync", "acco", "wp", "dpu", "zero1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        curves = {}
        for name in arguments.configs:
            curves[name] = run_example(name, "--seed", str(seed), "--steps", str(arguments.steps))
            val_loss = curves[name][-1]["val_loss"]
            rows.append({"seed": seed, "config": name, "val_loss": val_loss})
            print(f"seed {seed} {name}: {val_loss:.4f}", file=sys.stderr, flush=True)
        if arguments.out and seed == arguments.seeds[0]:
            draw(curves, seed, arguments.out.with_suffix(".png"))
    sync = {row["seed"]: row["val_loss"] for row in rows if row["config"] == "sync"}
    for row in rows:
        if row["seed"] in sync:
            row["percent_above_sync"] = round(100 * (row["val_loss"] / sync[row["seed"]] - 1), 2)
    summary = {
        "command": " ".join(["python", "benchmarks/convergence.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "steps": arguments.steps,
        "rows": rows,
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
