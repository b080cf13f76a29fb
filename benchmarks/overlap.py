# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What rounds cost that run beside computation, on one device and without a network.

    python benchmarks/overlap.py --out benchmarks/results/overlap_NAME.json

One rank trains the same transformer with ACCO and with DeepSpeed's own ZeRO-1; the engines take turns. A delay on the
rounds' own stream (on a CPU: in their thread) stands for the network: so many times the computation's time in each
round. On CUDA it is copies to the host's memory, which need no multiprocessor, as a network adapter's need none. C is
the computation of a window without DeepSpeed, in the same turns. On CUDA the kernels of some windows of acco, with the
smallest delay, are drawn by their streams.
"""

import json
import os
import random
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from _common import make_parser, new_figure, origin, progress, save, write

from deepspeed_acco.tools.palette import PARTS, colors_of

CONFIGS = {  # micro-batches a window, and the optimizer
    "zero1": (4, {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}}),
    "sync": (4, {"type": "ACCO", "params": {"lr": 1e-4, "schedule": "sync"}}),
    "acco": (4, {"type": "ACCO", "params": {"lr": 1e-4, "schedule": "acco"}}),
    "local": (4, {"type": "ACCO", "params": {"lr": 1e-4, "schedule": "local"}}),
    **{
        f"acco_sm_{share}": (4, {"type": "ACCO", "params": {"lr": 1e-4, "schedule": "acco", "sm_share": share}})
        for share in (0.5, 0.25, 0.125)
    },
}
DELAYED = ("sync", "acco", "local")  # the others without a delay alone: one rank has nothing to gather in zero1
PIECE_BYTES = 2**26


def parse_arguments():
    parser = make_parser(__doc__, has_picture=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--turns", type=int, default=7, help="of each configuration, after two that do not count")
    parser.add_argument("--windows", type=int, default=2, help="of a turn")
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 0.4, 0.8], help="of a round, in times of C")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    return parser.parse_args()


def make_module(args):
    import torch

    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(
        args.width, max(1, args.width // 128), 4 * args.width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return torch.nn.TransformerEncoder(layer, args.depth, enable_nested_tensor=False)


class Delay:
    """Puts a delay into the gather of each round, on the stream or in the thread of the rounds."""

    def __init__(self, device):
        self.seconds = 0.0
        self._piece_s = 0.0  # of one copy to the host; 0 where the host computes
        if device.type == "cuda":
            self._calibrate(device)

    def _calibrate(self, device):
        import torch

        self._source = torch.ones(PIECE_BYTES, dtype=torch.uint8, device=device)
        self._target = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                self._target.copy_(self._source, non_blocking=True)
            end.record()
            end.synchronize()
        self._piece_s = begin.elapsed_time(end) / 1e4

    def __call__(self):
        if not self._piece_s:
            time.sleep(self.seconds)
            return
        for _ in range(round(self.seconds / self._piece_s)):
            self._target.copy_(self._source, non_blocking=True)

    @contextmanager
    def in_rounds(self):
        """Delays every gather of a round inside the block."""
        from deepspeed_acco.runtime.communicator import Communicator

        def delayed(function):
            def run(*arguments, **options):
                self()
                return function(*arguments, **options)

            return run

        with mock.patch.object(Communicator, "all_gather", delayed(Communicator.all_gather)):
            yield


class Trainer:
    """Trains whole windows of one configuration on one fixed micro-batch."""

    def __init__(self, name, args, x):
        import deepspeed

        import deepspeed_acco  # noqa: F401

        self.n, optimizer = CONFIGS[name]
        module = make_module(args)
        config = {
            "train_micro_batch_size_per_gpu": args.batch,
            "gradient_accumulation_steps": self.n,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "optimizer": optimizer,
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
        self._x = x

    def windows(self, count):
        for _ in range(count * self.n):
            self.engine.backward(self.engine(self._x).float().square().mean())
            self.engine.step()

    def times(self):
        of = getattr(self.engine.optimizer, "lane_times", None)
        return of() if of else None


class Bare:
    """Computes the same gradients, without an optimizer."""

    def __init__(self, args, x, n):
        import torch

        self.n, self._x = n, x
        self._module = make_module(args).to(x.device, torch.bfloat16)

    def windows(self, count):
        for _ in range(count):
            for _ in range(self.n):
                (self._module(self._x).float().square().mean() / self.n).backward()
            self._module.zero_grad(set_to_none=True)

    def times(self):
        return None


GAP_US = 15.0  # kernels of one stream that are as close are drawn as one


def record_timeline(trainer) -> dict[str, list[list[float]]]:
    """Returns when the device was busy in two windows: by stream, [start, end] in ms, the training stream first."""
    import torch

    trainer.windows(1)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.windows(2)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    busy: dict[int, list[list[float]]] = {}
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    first = min(event["ts"] for event in kernels)
    for event in sorted(kernels, key=lambda event: event["ts"]):
        spans = busy.setdefault(event["args"]["stream"], [])
        start, end = event["ts"] - first, event["ts"] - first + event["dur"]
        if spans and start - spans[-1][1] < GAP_US:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    by_load = sorted(busy.values(), key=lambda spans: -len(spans))
    training = max(by_load, key=lambda spans: sum(end - start for start, end in spans))
    others = [spans for spans in by_load if spans is not training]
    return {
        name: [[round(start / 1e3, 3), round(end / 1e3, 3)] for start, end in spans]
        for name, spans in (("training", training), ("rounds", sorted(sum(others, []))))
    }


def draw(results):
    """Returns a figure: the step of each configuration by the delay, and when which stream was busy."""
    timeline = results.get("timeline")
    figure = new_figure(9.0, 5.4 if timeline else 3.2)
    panels = figure.subplots(2 if timeline else 1, 1, squeeze=False, height_ratios=[2, 1] if timeline else None)
    axes = panels[0, 0]
    names = list(dict.fromkeys(row["config"] for row in results["rows"] if row["config"] != "bare"))
    colors = colors_of(names)
    for name in names:
        rows = [row for row in results["rows"] if row["config"] == name]
        points = [(row["delay_over_c"], row["step_over_c"]) for row in rows]
        axes.plot(*zip(*points), marker="o", color=colors[name], label=name)
    axes.axhline(1.0, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("delay of a round, in times of the computation C")
    axes.set_ylabel("step, in times of C")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, ncols=4)
    axes.set_title(
        f"{results['device']}: {results['parameters'] / 1e6:.0f}M parameters, n = {results['n']}", fontsize=11
    )
    if timeline:
        lanes = panels[1, 0]
        for place, (name, part) in enumerate((("rounds", "exposed"), ("training", "compute"))):
            spans = [(start, end - start) for start, end in timeline[name]]
            lanes.broken_barh(spans, (place - 0.35, 0.7), color=PARTS[part])
        lanes.set_yticks([0, 1], ["rounds", "training"])
        lanes.set_xlabel("ms, two windows of acco")
    return figure


def main():
    args = parse_arguments()
    picture = args.out.with_suffix(".png")
    if args.draw:
        save(draw(json.loads(args.out.read_text())), picture)
        return
    os.environ.setdefault("DS_ACCELERATOR", args.device)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 20_000))
    import torch

    from deepspeed_acco.tools.kernel_benchmark import device_name

    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # the rounds have a core, too

    def wait():
        """Returns when training has come here; a round may go on, as it does between two windows of a long run."""
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    x = torch.randn(args.batch, args.seq_len, args.width, device=device).bfloat16()
    delay = Delay(device)
    trainers = {name: Trainer(name, args, x) for name in args.configs}
    n = max(trainer.n for trainer in trainers.values())
    bare = Bare(args, x, n)
    numel = sum(p.numel() for p in next(iter(trainers.values())).engine.module.parameters())
    chance = random.Random(0)
    spent = {}
    with delay.in_rounds():

        def turn(trainer):
            wait()
            before, begin = trainer.times(), time.perf_counter()
            trainer.windows(args.windows)
            wait()
            seconds = (time.perf_counter() - begin) / args.windows
            after = trainer.times()
            return seconds, after.since(before) if after else None

        for trainer in (bare, *trainers.values()):
            for _ in range(2):
                turn(trainer)
        compute_s = statistics.median(turn(bare)[0] for _ in range(3))
        for number in range(args.turns):
            progress(f"turn {number + 1}/{args.turns}")
            cells = [(name, share) for name in trainers if name in DELAYED for share in args.delays]
            cells += [(name, 0.0) for name in ("bare", *trainers) if name not in DELAYED]
            for name, share in chance.sample(cells, len(cells)):
                delay.seconds = share * compute_s
                trainer = bare if name == "bare" else trainers[name]
                trainer.windows(1)  # a round that began under another delay ends
                spent.setdefault((name, share), []).append(turn(trainer))
    compute_s = statistics.median(seconds for seconds, _ in spent["bare", 0.0])
    rows = []
    for (name, share), turns in sorted(spent.items()):
        step_s = statistics.median(seconds for seconds, _ in turns)
        row = {"config": name, "delay_over_c": share, "step_ms": 1e3 * step_s, "step_over_c": step_s / compute_s}
        if turns[0][1] is not None and turns[0][1].rounds:
            rounds = sum(times.rounds for _, times in turns)
            round_s = sum(times.round_s for _, times in turns)
            exposed_s = sum(times.exposed_s for _, times in turns)
            row |= {"round_ms": 1e3 * round_s / rounds, "hidden_share": 1 - exposed_s / round_s}
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    shape = {key: getattr(args, key) for key in ("width", "depth", "seq_len", "batch", "windows", "turns")}
    results = {**origin(), "device": device_name(device), "parameters": numel, "n": n, **shape, "rows": rows}
    if device.type == "cuda" and "acco" in trainers:
        delay.seconds = args.delays[0] * compute_s
        results["timeline"] = record_timeline(trainers["acco"])
    for row in rows:
        print(json.dumps(row))
    write(results, args.out)
    save(draw(results), picture)
    for trainer in trainers.values():
        if hasattr(trainer.engine, "destroy"):
            trainer.engine.destroy()


if __name__ == "__main__":
    main()
