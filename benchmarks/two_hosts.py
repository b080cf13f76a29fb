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
ACCOS = ("acco", "acco_int8", "acco_int4")  # two rounds a step
STAGES = ("zero0", "zero1", "zero1_reduce", "zero2", "zero2_reduce", "zero3")
CONFIGS = ("acco", "acco_int8", "acco_int4", "wp", "dpu", "sync", "adaptive", "adaptive_int4", "adaptive_wp", *STAGES)
DEFAULT_CONFIGS = ("acco", "acco_int4", "wp", "dpu", "sync", *STAGES)


# ---- the worker, one rank on each host


def ds_config(name: str, n: int, lane: str = "auto", fraction: float = 0.5) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": n,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
    }
    if name.startswith("zero"):
        config["zero_optimization"] = {"stage": int(name[4]), "overlap_comm": True}
        if name.endswith("_reduce"):  # each bucket to the rank that owns it, in place of to all
            config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True}}
    else:
        params = {"lr": 1e-4, "weight_decay": 0.1, "lane": lane, "schedule": "acco"}
        for word in name.split("_"):
            if word in ("int8", "int4"):
                params |= {"estimate_comm": word, "estimate_fraction": fraction}
            elif word == "adaptive":
                params["accumulation"] = "adaptive"
            else:
                params["schedule"] = word
        config["optimizer"] = {"type": "ACCO", "params": params}
    return config


def sent_bytes() -> int:
    """What this host's interface has sent so far, with all headers."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def time_steps(name: str, arguments, module, windows: int, lane: str = "auto") -> dict:
    """Step times in seconds, micro-batches and sent bytes of this rank, without the first two steps; for ACCO what the
    rounds took, by kind, and what was waited for. The ranks wait for each other before a step, except where their
    windows are adaptive."""
    import deepspeed
    import torch

    import deepspeed_acco  # noqa: F401

    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config=ds_config(name, arguments.n, lane, arguments.estimate_fraction),
    )
    measured: dict[str, list] = {"step_s": [], "micro_batches": [], "exposed_s": []}
    sent_so_far = []
    for step in range(windows + 2):
        if not name.startswith("adaptive"):
            torch.distributed.barrier()
        before = engine.optimizer.lane_times() if hasattr(engine.optimizer, "lane_times") else None
        begin, micro_batches = time.perf_counter(), 0
        sent_so_far.append(sent_bytes())
        while engine.global_steps == step:
            engine.backward(engine())
            engine.step()
            micro_batches += 1
        measured["step_s"].append(time.perf_counter() - begin)
        measured["micro_batches"].append(micro_batches)
        if before is not None:
            spent = engine.optimizer.lane_times().since(before)
            measured["exposed_s"].append(spent.exposed_s)
            for kind, seconds in spent.round_s_of.items():
                if spent.rounds_of[kind]:
                    measured.setdefault(kind, []).append(seconds / spent.rounds_of[kind])
    engine.destroy()
    # From one step's begin to the next one's: what waits in the link's queue leaves it behind the step.
    measured["sent_bytes"] = [after - before for before, after in zip(sent_so_far, sent_so_far[1:])]
    return {key: values[2:] for key, values in measured.items()}


def worker(arguments) -> None:
    import deepspeed
    import torch

    from deepspeed_acco.tools.launch.emulated_accelerator import EmulatedAccelerator

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
        alone = time_steps("sync", arguments, fresh(0.0), arguments.windows)
        results.setdefault("commit_alone", []).extend(alone["COMMIT"])
        results.setdefault("commit_sent_bytes", []).extend(alone["sent_bytes"])
        for name in ACCOS:
            if name in arguments.configs:
                alone = time_steps(name, arguments, fresh(0.0), arguments.windows, lane="inline")
                results.setdefault(f"estimate_alone_{name}", []).extend(alone["ESTIMATE"])
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
    from deepspeed_acco.algorithm.window import phase_a_micro_batches

    median = statistics.median
    micro = median(results["micro_batch_s"])
    compute, commit = arguments.n * micro, median(results["commit_alone"])
    estimates = {name: median(results[f"estimate_alone_{name}"]) for name in ACCOS if name in arguments.configs}

    def bound_of_two(name):
        fraction = 0.5 if name == "acco" else arguments.estimate_fraction
        a = phase_a_micro_batches(arguments.n, fraction)
        return max(a * micro, commit) + max((arguments.n - a) * micro, estimates[name])

    bounds = {
        **{name: bound_of_two(name) for name in estimates},
        "wp": max(compute, commit),
        "dpu": max(compute, commit),
        "sync": compute + commit,
    }
    rows = []
    for name in arguments.configs:
        step = median(results[name]["step_s"])
        row = {"config": name, "step_s": round(step, 4), "steps": len(results[name]["step_s"])}
        row["sent_mb_per_step"] = round(statistics.mean(results[name]["sent_bytes"]) / 1e6, 3)
        alone_s = sum(results[name]["micro_batches"]) * micro  # of the same micro-batches without anything else
        row["of_compute_only_samples_per_s"] = round(alone_s / sum(results[name]["step_s"]), 4)
        if name in bounds:
            row["bound_s"] = round(bounds[name], 4)
            row["of_bound"] = round(step / bounds[name], 4)
        if name.startswith("adaptive"):
            row["micro_batches_by_window"] = results[name]["micro_batches"]
        if results[name]["exposed_s"]:
            row["exposed_s"] = round(median(results[name]["exposed_s"]), 4)
            for kind in ("COMMIT", "ESTIMATE", "PREDICT"):
                if kind in results[name]:
                    row[f"{kind.lower()}_beside_compute_s"] = round(median(results[name][kind]), 4)
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
        "round_sent_mb": round(statistics.mean(results["commit_sent_bytes"]) / 1e6, 3),
        "estimate_fraction_of_int": arguments.estimate_fraction,
        "estimate_alone_s": {name: round(value, 4) for name, value in estimates.items()},
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
    parser.add_argument("--estimate_fraction", type=float, default=0.5, help="of acco_int8 and acco_int4")
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

    from deepspeed_acco.tools.launch import launcher as launches
    from deepspeed_acco.tools.launch.shaped_hosts import ShapedHosts

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
