"""Breaks one of several ranks in every place of training, and checks what the others do:

    python -m tests.faults [--modes acco wp ...] [--faults kill stop ...] [--places forward load ...] [--markdown FILE]

Every cell has ranks of its own. It is right where every rank that is left raises an error that says what happened, at
most two seconds after comm_timeout_s, or ends with the bits of a run that nobody has disturbed.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import hashlib
import itertools
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from deepspeed_acco.tools.launch.shaped_hosts import INTERFACE, ShapedHosts, why_not
from tests.support import faults, training
from tests.support.ranks import RankPool

TIMEOUT_S = 3
SLACK_S = 2.0  # beyond comm_timeout_s
PAUSE_S = 1.0
LIMIT_S = 60
MICRO_BATCHES = 4
FAULTY_WINDOW, LOOKING_WINDOW, LAST_WINDOW = 2, 3, 5

# ---- what is crossed with what


@dataclass(frozen=True)
class Mode:
    """Holds what is trained."""

    params: dict = field(default_factory=dict)
    precision: str = "fp32"
    ranks: int = 3
    only_places: tuple[str, ...] = ()  # none: all


MODES = {
    "acco": Mode(),
    "local": Mode({"schedule": "local"}),
    "wp": Mode({"schedule": "wp"}),
    "sync": Mode({"schedule": "sync"}),
    "int4": Mode({"estimate_comm": "int4"}, "bf16"),
    "adaptive": Mode({"accumulation": "adaptive", "max_window": 2 * MICRO_BATCHES}),
    "fp16": Mode(precision="fp16"),
    # One of two hosts loses a rank; no survivor exchanges with it on both levels.
    "two levels": Mode(
        {"ranks_per_host": 2}, ranks=4, only_places=("reduce of COMMIT", "sums of a host", "gather of COMMIT")
    ),
}
ESTIMATE_PLACES = ("reduce of ESTIMATE", "gather of ESTIMATE")
ROUND_PLACES = ESTIMATE_PLACES + ("reduce of COMMIT", "gather of COMMIT")
SAVE_PLACES = tuple(f"save: {place}" for place in ("begin", "module", "shard", "commit", "end"))
PLACES = (*ROUND_PLACES, "sums of a host", "forward", "backward", "eval", *SAVE_PLACES, "load", "exit", "start")
ANYWHERE = tuple(place for place in PLACES if place != "start")


@dataclass(frozen=True)
class Fault:
    """Holds what happens to the victim.

    Attributes:
        places: where it can.
        is_gone: the victim is never heard of again.
        must_be_exact: nobody may raise.
        own: a part of the text of the exception that is the victim's own business.
    """

    places: tuple[str, ...]
    is_gone: bool = False
    must_be_exact: bool = False
    own: str = ""


FAULTS = {
    "kill": Fault(ANYWHERE, is_gone=True),
    "stop": Fault(ANYWHERE, is_gone=True),
    "stop and continue": Fault(ANYWHERE, must_be_exact=True),
    "NaN": Fault(("backward",), must_be_exact=True),
    "exception": Fault(ANYWHERE, own="the user's own mistake"),
    "no memory": Fault(ANYWHERE, own="no memory is left"),
    "full disk": Fault(SAVE_PLACES[1:4]),
    "cut link": Fault(ANYWHERE),
    "other config": Fault(("start",)),
}


@dataclass(frozen=True)
class Cell:
    """Holds one mode, fault and place."""

    mode: str
    fault: str
    place: str

    def __str__(self) -> str:
        return f"{self.mode}: {self.fault} in {self.place}"

    @property
    def victim(self) -> int:
        """Returns the rank that it happens to: rank 0 alone writes the module's file."""
        return 0 if self.place == "save: module" else 1


def cells(modes=MODES, kinds=FAULTS, places=PLACES) -> Iterator[Cell]:
    """Yields every cell that there can be."""
    for mode, kind, place in itertools.product(modes, kinds, places):
        has_estimate = MODES[mode].params.get("schedule", "acco") == "acco"
        only = MODES[mode].only_places
        if place not in FAULTS[kind].places or (only and place not in only):
            continue
        if (place in ESTIMATE_PLACES and not has_estimate) or (place == "sums of a host" and not only):
            continue
        yield Cell(mode, kind, place)


# ---- one rank


class _Trigger:
    """Lets the fault happen once, in its place, on the victim."""

    def __init__(self, cell: Cell | None, is_victim: bool):
        self._cell = cell if is_victim else None
        self.is_armed = False

    def at(self, place: str) -> bool:
        """Does what the fault is, here; tells whether a NaN is wanted."""
        cell = self._cell
        if not self.is_armed or cell is None or cell.place != place:
            return False
        self._cell = None
        if cell.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif cell.fault.startswith("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif cell.fault == "exception":
            raise RuntimeError(FAULTS["exception"].own)
        elif cell.fault == "no memory":
            raise MemoryError(FAULTS["no memory"].own)
        elif cell.fault == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif cell.fault == "cut link":
            subprocess.run(["ip", "link", "set", INTERFACE, "down"], check=True)
        return cell.fault == "NaN"


def _watch(trigger: _Trigger) -> None:
    """Puts the trigger into every place that is not in the loop below."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from deepspeed_acco.runtime.communicator import Communicator
    from deepspeed_acco.runtime.encoding import Encoding
    from deepspeed_acco.runtime.round import RoundWork

    kind = [""]

    def run(original, _, this, *arguments):
        kind[:] = ["COMMIT" if this.writes_state else "ESTIMATE"]
        return original(this, *arguments)

    def reduce(original, _, *arguments):
        trigger.at(f"reduce of {kind[0]}")
        return original(*arguments)

    def gather(original, _, *arguments, **options):
        if not options.get("is_look"):
            trigger.at(f"gather of {kind[0]}")
        return original(*arguments, **options)

    def encode(original, _, *arguments, **options):
        trigger.at("sums of a host")
        return original(*arguments, **options)

    def save(original, _, state_dict, path):
        trigger.at("save: shard" if "optim_states" in path else "save: module")
        return original(state_dict, path)

    def commit(original, _, info):
        trigger.at("save: commit")
        return original(info)

    def load(original, _, *arguments, **options):
        trigger.at("load")
        return original(*arguments, **options)

    faults.from_now_on(RoundWork, "run", run)
    faults.from_now_on(Communicator, "reduce_scatter_sum", reduce)
    faults.from_now_on(Communicator, "all_gather", gather)
    faults.from_now_on(Encoding, "encode", encode)
    for name, replacement in (("save", save), ("commit", commit), ("load", load)):
        faults.from_now_on(TorchCheckpointEngine, name, replacement)


def train(mode: str, cell: Cell | None, folder: str, replay=None, is_inline: bool = False) -> dict:
    """Trains, evaluates, saves, loads and trains on, and returns how it ended: with which bits, or which error after
    how many seconds of waiting.

    Args:
        replay: recorded counts of adaptive windows.
        is_inline: rounds block.
    """
    import torch.distributed as dist

    from deepspeed_acco.runtime.lanes import RoundFailed

    is_victim = cell is not None and dist.get_rank() == cell.victim
    trigger = _Trigger(cell, is_victim)
    _watch(trigger)
    params = {**MODES[mode].params, "comm_timeout_s": TIMEOUT_S, **({"lane": "inline"} if is_inline else {})}
    config = training.ds_config(MICRO_BATCHES, 1.0, MODES[mode].precision, **params)
    if cell is not None and cell.fault == "other config" and is_victim:
        config["optimizer"]["params"]["lr"] *= 2
    steps: list[float] = [time.monotonic()]  # when each succeeded
    windows: list = []
    engine = None
    try:
        engine = training.start_engine(config)
        digest = _train(engine, trigger, folder, steps, windows, replay)
    except Exception as error:
        waited = time.monotonic() - steps[-1]
        chain = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        is_lost = isinstance(error, RoundFailed) and not _raises(RoundFailed, engine)
        return {"error": " <- ".join(map(str, chain)), "waited": waited, "is_lost": is_lost}
    return {"digest": digest, "windows": windows}


def _raises(kind: type, engine) -> bool:
    """Tells whether training on raises an error of that kind."""
    dtype = next(engine.module.parameters()).dtype
    try:
        for micro_batch in range(2 * MICRO_BATCHES):
            engine.backward(engine(*training.batch(0, 0, micro_batch, dtype)))
            engine.step()
    except kind:
        return True
    return False


def _train(engine, trigger: _Trigger, folder, steps: list[float], windows: list, replay) -> str:
    import torch
    import torch.distributed as dist

    import deepspeed_acco

    rank = dist.get_rank()
    dtype = next(engine.module.parameters()).dtype
    if engine.optimizer.settings.is_adaptive:
        deepspeed_acco.on_window(engine, windows.append)
    if replay is not None:
        deepspeed_acco.replay_windows(engine, replay)

    def succeeded():
        steps.append(time.monotonic())

    def train_until(last_window):
        while engine.global_steps < last_window:
            window, micro_batch = engine.global_steps, 0
            trigger.is_armed = window >= FAULTY_WINDOW
            while engine.global_steps == window:
                is_second = micro_batch == 1
                x, y = training.batch(rank, window, micro_batch, dtype)
                if is_second:
                    trigger.at("forward")
                loss = engine(x, y)
                engine.backward(loss * float("nan") if is_second and trigger.at("backward") else loss)
                engine.step()
                micro_batch += 1
                succeeded()

    train_until(LOOKING_WINDOW)
    engine.eval()
    with torch.no_grad():
        engine(*training.batch(77, 0, 0, dtype))
        trigger.at("eval")
    engine.train()
    succeeded()
    train_until(LOOKING_WINDOW + 1)
    trigger.at("save: begin")
    engine.save_checkpoint(folder, tag="saved")
    trigger.at("save: end")
    succeeded()
    train_until(LAST_WINDOW)
    engine.load_checkpoint(folder)
    succeeded()
    train_until(LAST_WINDOW)
    weights = training.true_master_weights(engine)
    succeeded()
    trigger.at("exit")
    engine.destroy()
    return hashlib.sha256(torch.cat([weight.flatten() for weight in weights]).numpy().tobytes()).hexdigest()


# ---- one cell


def _is_stopped(process) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def _continue_after_a_while(pool: RankPool, victim: int) -> None:
    process, deadline = pool.processes[victim], time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and not pool.answers(victim):
        if _is_stopped(process):
            time.sleep(PAUSE_S)
            os.kill(process.pid, signal.SIGCONT)
            return
        time.sleep(0.01)


_SHAPED = threading.Lock()  # a process has one set of shaped hosts


def run(mode: str, cell: Cell | None = None, **arguments) -> list[dict | None]:
    """Returns how every rank ended; None for one that is gone."""
    world_size = MODES[mode].ranks
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        namespaces = None
        if cell is not None and cell.fault == "cut link":
            stack.enter_context(_SHAPED)
            hosts = stack.enter_context(ShapedHosts(world_size, "1gbit"))
            namespaces = [hosts.enter(host)[-1] for host in range(world_size)]
        pool = RankPool(world_size, namespaces=namespaces)
        try:
            pool.start(train, mode=mode, cell=cell, folder=folder, **arguments)
            if cell is not None and cell.fault == "stop and continue":
                _continue_after_a_while(pool, cell.victim)
            gone = {cell.victim} if cell is not None and FAULTS[cell.fault].is_gone else set()
            left = [rank for rank in range(world_size) if rank not in gone]
            ends = dict(zip(left, pool.collect(ranks=left, limit_s=LIMIT_S)))
        finally:
            for process in pool.processes:
                process.kill()
            pool.close()
    return [ends.get(rank) for rank in range(world_size)]


def reference(cell: Cell, ends: list[dict | None]) -> str:
    """Returns the bits of a run that nobody has disturbed, with the NaN where there was one, and with the counts that
    the disturbed run's adaptive windows had."""
    windows = next(end["windows"] for end in ends if end is not None and "digest" in end)
    replay = windows if MODES[cell.mode].params.get("accumulation") == "adaptive" else None
    spoiled = Cell(cell.mode, "NaN", cell.place) if cell.fault == "NaN" else None
    digests = {end["digest"] for end in run(cell.mode, spoiled, replay=replay, is_inline=replay is None)}
    assert len(digests) == 1, "the ranks of an undisturbed run have the same weights"
    return digests.pop()


def judge(cell: Cell, slack_s: float = SLACK_S) -> tuple[str, list[str]]:
    """Returns what the cell's ranks did, in two words for the table, and what is wrong about it."""
    fault = FAULTS[cell.fault]
    ends = run(cell.mode, cell)
    wrong, waits = [], []
    expected = reference(cell, ends) if any(end is not None and "digest" in end for end in ends) else ""
    for rank, end in enumerate(ends):
        if end is None:
            continue
        if "digest" in end:
            if end["digest"] != expected:
                wrong.append(f"rank {rank} ended with other weights")
            continue
        if rank == cell.victim and fault.own and fault.own in end["error"]:
            continue
        waits.append(end["waited"])
        if end["is_lost"]:
            wrong.append(f"rank {rank} trains on after: {end['error']}")
        if fault.must_be_exact:
            wrong.append(f"rank {rank} raised: {end['error']}")
        elif not _is_named(cell, end["error"]):
            wrong.append(f"rank {rank} does not say what happened: {end['error']}")
        elif end["waited"] > TIMEOUT_S + slack_s:
            wrong.append(f"rank {rank} waited for {end['waited']:.1f} s: {end['error']}")
    told = f"error {max(waits):.1f} s" if waits else "exact" if expected else "own error"
    return "WRONG" if wrong else told, wrong


def _is_named(cell: Cell, text: str) -> bool:
    if cell.fault == "other config":
        return "the data-parallel ranks differ" in text and "'lr'" in text
    if cell.fault == "full disk":
        return os.strerror(errno.ENOSPC) in text and "saved" in text
    if FAULTS[cell.fault].own and "was not saved" in text:
        return f"rank {cell.victim}: " in text and FAULTS[cell.fault].own in text
    return f"another rank has ended, or did not answer within comm_timeout_s = {TIMEOUT_S} s" in text


# ---- the command


def _table(results: dict[Cell, str]) -> str:
    lines = []
    for mode in dict.fromkeys(cell.mode for cell in results):
        of_mode = {(cell.place, cell.fault): told for cell, told in results.items() if cell.mode == mode}
        kinds = [kind for kind in FAULTS if any(fault == kind for _, fault in of_mode)]
        places = [place for place in PLACES if any(where == place for where, _ in of_mode)]
        lines += [f"### {mode}", "", f"| in | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
        lines += [
            f"| {place} | " + " | ".join(of_mode.get((place, kind), "") for kind in kinds) + " |" for place in places
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Runs the cells that were asked for; returns 1 where one of them is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (default: %(default)s)")
    parser.add_argument(
        "--slack", type=float, default=SLACK_S, help="seconds beyond comm_timeout_s (default: %(default)s)"
    )
    parser.add_argument("--markdown", help="write the table there")
    arguments = parser.parse_args()
    chosen = list(cells(arguments.modes, arguments.faults, arguments.places))
    if why_not() and "cut link" in arguments.faults:
        print(f"without cut links: {why_not()}", file=sys.stderr)
        chosen = [cell for cell in chosen if cell.fault != "cut link"]
    results, problems = {}, []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for number, (cell, (told, wrong)) in enumerate(
            zip(chosen, pool.map(lambda cell: judge(cell, arguments.slack), chosen)), 1
        ):
            results[cell] = told
            print(f"[{number}/{len(chosen)}] {cell}: {told}", flush=True)
            for text in wrong:
                print(f"    {text}", flush=True)
                problems.append(f"{cell}: {text}")
    print(f"{len(chosen)} cells, {len({problem.split(': ', 2)[1] for problem in problems})} wrong")
    if arguments.markdown:
        command = shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]])
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        head = f"Command: `{command}`\nDate: {datetime.date.today()}. Machine: {machine}\n\n"
        Path(arguments.markdown).write_text(head + _table(results))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
