"""Starts real processes for the distributed tests: a pool of ranks that run one function after the other.

A function that raises on any rank fails the test with that rank's traceback; one that hangs is killed after a limit.

Ranks are forked by a server that has imported torch and DeepSpeed once: the imports take seconds, a fork milliseconds.
The server only imports, so that no thread of torch, no group and no kernel is there to be inherited.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

from tests.support.launcher import LIMIT_S as SCRIPT_LIMIT_S
from tests.support.launcher import rank_environment

LIMIT_S = 240
AFTER_ERROR_S = 30  # for each of the others, once a rank has raised or died
IMPORTED_ONCE = [
    *("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.cpp_extension"),
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed_acco"),
    "tests.support.frozen",
]
_pool_numbers = itertools.count()


class RankError(AssertionError):
    """Says that a rank raised; the message holds its number and traceback."""


def _set_environment(rank, world_size, port, environment):
    os.environ.clear()  # the server's, which are as old as it is
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _enter_namespace(name):
    with open(f"/var/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"the network namespace {name} cannot be entered")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def _rank_main(rank, world_size, rendezvous, port, pipe, environment, namespace, device_type):
    _set_environment(rank, world_size, port, environment)
    if namespace is not None:
        _enter_namespace(namespace)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend, options = "gloo", {}
    if device_type == "cuda":
        # As DeepSpeed does: bound to its device, so that torch splits later groups off this one.
        local_rank = rank % torch.cuda.device_count()
        os.environ.update(DS_ACCELERATOR="cuda", LOCAL_RANK=str(local_rank))
        torch.cuda.set_device(local_rank)
        backend = "nccl"
        options = {"device_id": torch.device("cuda", local_rank)} if world_size > 1 else {}
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=LIMIT_S),
        **options,
    )
    while True:
        task = pipe.recv()
        if task is None:
            break
        module, name, arguments = task
        try:
            result = getattr(importlib.import_module(module), name)(**arguments)
            pipe.send(("done", result))
        except BaseException as error:
            pipe.send(("error", f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


def _context(start_method="forkserver"):
    context = multiprocessing.get_context(start_method)
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


class RankPool:
    """Holds ``world_size`` ranks joined by a group of gloo, on CUDA of NCCL; they stay for the next call.

    Args:
        start_method: multiprocessing's name; ``spawn`` gives each rank a new interpreter, as CUDA needs.
        namespaces: of each rank, the network that it is in.
        device_type: cpu or cuda; where there are fewer devices than ranks, several ranks share one.
    """

    def __init__(
        self,
        world_size: int,
        start_method: str = "forkserver",
        namespaces: list[str] | None = None,
        device_type: str = "cpu",
    ):
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory()
        # No rank listens there: DeepSpeed names its shared memory by it.
        self._port = 20_000 + (31 * os.getpid() + next(_pool_numbers)) % 40_000
        rendezvous = os.path.join(self._folder.name, "rendezvous")
        context = _context(start_method)
        self._pipes, self.processes = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            namespace = namespaces[rank] if namespaces else None
            arguments = (rank, world_size, rendezvous, self._port, theirs, rank_environment(), namespace, device_type)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            self._pipes.append(mine)
            self.processes.append(process)

    def start(self, function, per_rank=None, **arguments) -> None:
        """Sends the call to every rank; ``per_rank`` is a list of extra arguments, one dictionary a rank."""
        for rank, pipe in enumerate(self._pipes):
            extra = per_rank[rank] if per_rank else {}
            pipe.send((function.__module__, function.__name__, {**arguments, **extra}))

    def collect(self, ranks=None, limit_s: float = LIMIT_S) -> list:
        """Returns the results in the order of the ranks; raises RankError with what went wrong on any rank. Whatever is
        raised, no rank is left in the call."""
        try:
            results, errors = self._answers(ranks, limit_s)
        except BaseException:  # a test's own time limit, or Ctrl-C
            self.close()
            raise
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return results

    def _answers(self, ranks, limit_s: float) -> tuple[list, list[str]]:
        deadline = time.monotonic() + limit_s
        results, errors = [], []
        for rank in range(self.world_size) if ranks is None else ranks:
            if errors:  # this one may wait for the one that is gone until a timeout of minutes
                deadline = min(deadline, time.monotonic() + AFTER_ERROR_S)
            try:
                if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                    errors.append(f"rank {rank} gave no answer within {limit_s} s")
                    continue
                kind, value = self._pipes[rank].recv()
            except EOFError:
                self.processes[rank].join(5)
                errors.append(f"rank {rank} died with exit code {self.processes[rank].exitcode}")
                continue
            if kind == "done":
                results.append(value)
            else:
                errors.append(value)
        return results, errors

    def run(self, function, per_rank=None, **arguments) -> list:
        """Runs ``function(**arguments)`` on every rank and returns the results in the order of the ranks."""
        self.start(function, per_rank, **arguments)
        return self.collect()

    def answers(self, rank: int) -> bool:
        """Tells whether :meth:`collect` would find that rank's answer."""
        return self._pipes[rank].poll()

    @property
    def is_usable(self) -> bool:
        """Tells whether all ranks live, so that they can take another call."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """Ends all ranks, by force where needed."""
        from deepspeed_acco.tools.launch import launcher

        for pipe in self._pipes:
            try:
                pipe.send(None)
            except (BrokenPipeError, OSError):
                continue
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self.processes = []
        launcher.remove_shared_memory(self._port)
        self._folder.cleanup()


def _script_main(rank, world_size, port, environment, outputs, script, arguments):
    _set_environment(rank, world_size, port, environment)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # OpenMP has read the server's
    for path, stream in zip(outputs, (sys.stdout, sys.stderr)):
        with open(path, "a") as file:  # appends, since all ranks write to it
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [script, f"--local_rank={rank}", *arguments]
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter, and not multiprocessing
        sys.exit(1)
    except KeyboardInterrupt as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(130)


def run_script(script, *arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    """Runs a script as :func:`tests.support.launcher.launch` does, without a launcher and in forked ranks."""
    from deepspeed_acco.tools.launch import launcher

    port, context = launcher.free_port(), _context()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        words = (outputs, str(script), [str(argument) for argument in arguments])
        processes = [
            context.Process(target=_script_main, args=(rank, ranks, port, rank_environment(), *words), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline, running = time.monotonic() + SCRIPT_LIMIT_S, set(processes)
        while running and time.monotonic() < deadline:
            multiprocessing.connection.wait([process.sentinel for process in running], deadline - time.monotonic())
            running = {process for process in running if process.is_alive()}
            if any(process.exitcode for process in processes):
                break
        # Of those that ended by themselves; -9 where only the limit ended them.
        codes = [process.exitcode for process in processes if process.exitcode]
        for process in running:
            process.kill()
            process.join()
            codes.append(process.exitcode)
        launcher.remove_shared_memory(port)
        code = codes[0] if codes else 0
        texts = [Path(path).read_text(errors="replace") for path in outputs]
    return subprocess.CompletedProcess([script, *arguments], code, *texts)
