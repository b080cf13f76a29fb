# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Step time on two hosts with a slow link: ACCO's schedules and DeepSpeed's stages beside the bound.

Two network namespaces on this machine, joined by a bridge and shaped with tc, stand for the hosts (Linux, root and
iproute2 needed); DeepSpeed's launcher starts one rank in each. The accelerator is emulated (emulated.py).

    python benchmarks/two_hosts.py --rate 300mbit --out benchmarks/results/two_hosts.json

All timings come from one run: the micro-batches alone, the rounds with nothing beside them (ACCO's own schedule
``sync``), and the configurations in alternation, several passes each. Medians over all steps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve()
SUBNET = "10.77.0."
CONFIGS = ("acco", "wp", "dpu", "sync", "adaptive", "adaptive_wp", "zero0", "zero1", "zero2", "zero3")
DEFAULT_CONFIGS = tuple(name for name in CONFIGS if not name.startswith("adaptive"))


def shell(command: str, check: bool = True) -> None:
    subprocess.run(command, shell=True, check=check, capture_output=not check)


class TwoHosts:
    """Context manager: namespaces accohost0 and accohost1, each with eth0 shaped to ``rate``."""

    def __init__(self, rate: str):
        self.rate = rate

    def __enter__(self):
        self.__exit__()
        shell("ip link add accobr0 type bridge && ip link set accobr0 up")
        for host in (0, 1):
            name = f"accohost{host}"
            shell(f"ip netns add {name}")
            shell(f"ip link add accoveth{host} type veth peer name eth0 netns {name}")
            shell(f"ip link set accoveth{host} master accobr0 && ip link set accoveth{host} up")
            shell(f"ip netns exec {name} ip addr add {SUBNET}{host + 1}/24 dev eth0")
            shell(f"ip netns exec {name} ip link set eth0 up && ip netns exec {name} ip link set lo up")
            shell(f"ip netns exec {name} tc qdisc add dev eth0 root tbf rate {self.rate} burst 256kb latency 100ms")
        return self

    def __exit__(self, *_):
        for host in (0, 1):
            shell(f"ip netns del accohost{host}", check=False)
            shell(f"ip link del accoveth{host}", check=False)
        shell("ip link del accobr0", check=False)

    def launch(self, folder: Path, arguments: list[str], timeout_s: float) -> str:
        """Runs this script as a worker on both hosts through DeepSpeed's launcher; returns what host 0 printed."""
        hostfile = folder / "hostfile"
        hostfile.write_text(f"{SUBNET}1 slots=1\n{SUBNET}2 slots=1\n")
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE.parents[1]),
        }
        processes = []
        for host in (0, 1):
            command = ["ip", "netns", "exec", f"accohost{host}", sys.executable, "-m", "deepspeed.launcher.runner"]
            command += ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(host)]
            command += ["--master_addr", f"{SUBNET}1", "--master_port", "29511", str(HERE), "--worker", *arguments]
            output = subprocess.PIPE if host == 0 else subprocess.DEVNULL
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
            )
        try:
            printed, _ = processes[0].communicate(timeout=timeout_s)
            if processes[1].wait(60) or processes[0].returncode:
                raise RuntimeError(f"a worker failed:\n{printed[-4000:]}")
            return printed
        finally:
            for process in processes:
                process.kill()


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

    from benchmarks.emulated import EmulatedAccelerator

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

    with tempfile.TemporaryDirectory() as folder, TwoHosts(arguments.rate) as hosts:
        results = Path(folder) / "results.json"
        steps = arguments.passes * (arguments.windows + 2)
        estimate_s = 120 + steps * len(arguments.configs) * arguments.n * arguments.micro_batch_ms / 1e3 * 4
        print(f"two hosts at {arguments.rate}: at most {estimate_s:.0f} s", file=sys.stderr, flush=True)
        hosts.launch(Path(folder), [*sys.argv[1:], "--results", str(results)], timeout_s=estimate_s)
        summary = summarise(json.loads(results.read_text()), arguments)
    print(json.dumps(summary, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
