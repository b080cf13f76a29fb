# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Step time on two hosts with a slow link: ACCO's schedules and DeepSpeed's stages beside the bound.

Two network namespaces on this machine, joined by a bridge and shaped with tc, stand for the hosts (Linux, root and
iproute2 needed); DeepSpeed's launcher starts one rank in each. The accelerator is emulated. ``ds_acco compare --hosts 2
--emulate-compute 250`` measures the same with a process for every run; here one process has all of them.

    python benchmarks/two_hosts.py --rate 300mbit --out benchmarks/results/two_hosts.json

All timings come from one run: the micro-batches alone, the rounds with nothing beside them (ACCO's own schedule
``sync``), and the configurations in alternation, several passes each. Medians over all steps.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
CONFIGS = ("acco", "wp", "dpu", "sync", "adaptive", "adaptive_wp", "zero0", "zero1", "zero2", "zero3")
DEFAULT_CONFIGS = tuple(name for name in CONFIGS if not name.startswith("adaptive"))


# ---- the worker, one rank on each host


def ds_config(name: str, n: int, lane: str = "auto") -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": n,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
    }
    if name.startswith("zero"):
        stage = int(name[-1])
        config["zero_optimization"] = {"stage": stage, "overlap_comm": True}
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True}}
    else:
        schedule = {"adaptive": "acco"}.get(name, name.removeprefix("adaptive_"))
        config["optimizer"] = {
            "type": "ACCO",
            "params": {"lr": 1e-4, "weight_decay": 0.1, "schedule": schedule, "lane": lane},
        }
        if name.startswith("adaptive"):
            config["optimizer"]["params"]["accumulation"] = "adaptive"
    return config


def time_steps(name: str, arguments, module, windows: int, lane: str = "auto") -> dict:
    """Step times in seconds and micro-batches of this rank, without the first two steps; for ACCO what the rounds took
    and what was waited for. The ranks wait for each other before a step, except where their windows are adaptive."""
    import deepspeed
    import torch

    import deepspeed_acco  # noqa: F401

    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=ds_config(name, arguments.n, lane)
    )
    steps, micro_batches, rounds, exposed = [], [], [], []
    for step in range(windows + 2):
        if not name.startswith("adaptive"):
            torch.distributed.barrier()
        before = engine.optimizer.lane_times() if hasattr(engine.optimizer, "lane_times") else None
        kept = (before.round_s, before.exposed_s, before.rounds) if before else None
        begin = time.perf_counter()
        micro_batches.append(0)
        while engine.global_steps == step:
            engine.backward(engine())
            engine.step()
            micro_batches[-1] += 1
        steps.append(time.perf_counter() - begin)
        if kept:
            after = engine.optimizer.lane_times()
            rounds.append((after.round_s - kept[0]) / max(1, after.rounds - kept[2]))
            exposed.append(after.exposed_s - kept[1])
    engine.destroy()
    measured = {"step_s": steps, "micro_batches": micro_batches, "round_s": rounds, "exposed_s": exposed}
    return {key: values[2:] for key, values in measured.items()}


def worker(arguments) -> None:
    import deepspeed
    import torch

    from deepspeed_acco.emulated import EmulatedAccelerator

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = {}

    def fresh(milliseconds):
        torch.manual_seed(1)
        return EmulatedAccelerator(arguments.numel, milliseconds).bfloat16()

    # The micro-batches alone, and the rounds with nothing beside them.
    module = fresh(arguments.micro_batch_ms)
    alone = []
    for _ in range(2 * arguments.n):
        begin = time.perf_counter()
        module().backward()
        alone.append(time.perf_counter() - begin)
    results["micro_batch_s"] = alone[1:]
    for _ in range(arguments.passes):
        results.setdefault("commit_alone", []).extend(
            time_steps("sync", arguments, fresh(0.0), arguments.windows)["round_s"]
        )
        for name in arguments.configs:
            measured = time_steps(name, arguments, fresh(arguments.micro_batch_ms), arguments.windows)
            for key, values in measured.items():
                results.setdefault(name, {}).setdefault(key, []).extend(values)
            if torch.distributed.get_rank() == 0:
                print(f"progress {name} {statistics.median(measured['step_s']):.3f} s/step", flush=True)
    if torch.distributed.get_rank() == 0:
        Path(arguments.results).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


# ---- the command


def summarise(results: dict, arguments) -> dict:
    """Medians, and for each ACCO schedule its bound: what computes and what communicates at the same time."""
    median = statistics.median
    micro = median(results["micro_batch_s"])
    a = min(max(round(arguments.n / 2), 1), arguments.n - 1)
    compute, commit = arguments.n * micro, median(results["commit_alone"])
    bounds = {
        "acco": max(a * micro, commit) + max((arguments.n - a) * micro, commit),
        "wp": max(compute, commit),
        "dpu": max(compute, commit),
        "sync": compute + commit,
    }
    rows = []
    for name in arguments.configs:
        step = median(results[name]["step_s"])
        row = {"config": name, "step_s": round(step, 4), "steps": len(results[name]["step_s"])}
        alone_s = sum(results[name]["micro_batches"]) * micro  # of the same micro-batches without anything else
        row["of_compute_only_samples_per_s"] = round(alone_s / sum(results[name]["step_s"]), 4)
        if name in bounds:
            row["bound_s"] = round(bounds[name], 4)
            row["of_bound"] = round(step / bounds[name], 4)
        if name.startswith("adaptive"):
            row["micro_batches_by_window"] = results[name]["micro_batches"]
        if results[name]["exposed_s"]:
            row["exposed_s"] = round(median(results[name]["exposed_s"]), 4)
            row["round_beside_compute_s"] = round(median(results[name]["round_s"]), 4)
        rows.append(row)
    return {
        "command": " ".join(["python", "benchmarks/two_hosts.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, two network namespaces",
        "numel": arguments.numel,
        "dtype": "bf16",
        "n": arguments.n,
        "rate": arguments.rate,
        "micro_batch_s": round(micro, 4),
        "compute_s": round(compute, 4),
        "round_alone_s": round(commit, 4),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="300mbit", help="of each host's link, as tc spells it")
    parser.add_argument("--numel", type=int, default=10_000_000, help="parameters")
    parser.add_argument("--micro_batches", dest="n", type=int, default=8, help="of a step; at least, where adaptive")
    parser.add_argument("--micro_batch_ms", type=float, default=250.0)
    parser.add_argument("--windows", type=int, default=6, help="measured steps of a configuration in one pass")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--configs", nargs="+", default=list(DEFAULT_CONFIGS), choices=CONFIGS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    import tempfile

    from deepspeed_acco import launches
    from deepspeed_acco.hosts import ShapedHosts

    with tempfile.TemporaryDirectory() as folder, ShapedHosts(2, arguments.rate) as hosts:
        results = Path(folder) / "results.json"
        steps = arguments.passes * (arguments.windows + 2)
        estimate_s = 120 + steps * len(arguments.configs) * arguments.n * arguments.micro_batch_ms / 1e3 * 4
        print(f"two hosts at {arguments.rate}: at most {estimate_s:.0f} s", file=sys.stderr, flush=True)
        place = launches.Place(world_size=2, hosts=hosts, is_cpu=True)
        script_arguments = ["--worker", *sys.argv[1:], "--results", str(results)]
        if launches.run([str(HERE)], script_arguments, Path(folder), place, limit_s=estimate_s):
            printed = (Path(folder) / launches.LOG).read_text(errors="replace")
            raise RuntimeError(f"a worker failed or took too long:\n{printed[-4000:]}")
        summary = summarise(json.loads(results.read_text()), arguments)
    print(json.dumps(summary, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
