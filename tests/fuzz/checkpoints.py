# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Fuzzes ``engine.load_checkpoint`` of one rank: flipped bits, cut files, and values put in the place of others.

A checkpoint is either refused, and the run is bit for bit what it was, or it loads what was saved.
"""

import contextlib
import io
import math
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import training
from tests.support.checkpoints import fingerprint, start

CONFIG = training.ds_config(4, 2.0)
VALUES: list[Any] = [None, "", "x", "2", -1, -0.5, 1.5, 10**30, float("nan"), float("inf"), True, [], [1], {}, (), b"x"]
TENSORS = {
    "NaN": lambda t: torch.full_like(t, float("nan")),
    "-inf": lambda t: torch.full_like(t, -float("inf")),
    "float64": lambda t: t.double(),
    "int64": lambda t: t.nan_to_num().long(),
    "shorter": lambda t: t.flatten()[:-1],
    "no dimension": lambda t: t.flatten()[:1].sum(),
    "one more dimension": lambda t: t[None],
    "sparse": lambda t: t.to_sparse(),
    "on meta": lambda t: t.to("meta"),
    "negative": lambda t: -1 - t.abs(),
}
GONE = object()
UNUSED = {"ds_config", "shared_params", "frozen"}  # and a frozen parameter may hold what it likes
# Other values of these mean another training, or the true weights in the place of others, and are no damage.
FREE = "acco schedule weights predictions grad_norm overflow dynamic_loss_scale lr_scheduler clip_grad".split()
FREE += "lr initial_lr weight_decay eps cur_scale scale_factor min_scale".split()


def run(seed: int, count: int) -> Iterator[str]:
    """Yields what goes wrong with ``count`` damaged checkpoints."""
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, _rank(folder), contextlib.redirect_stdout(io.StringIO()):
        engine = start(CONFIG)
        training.run_windows(engine, 2)
        base = Path(folder, "base")
        engine.save_checkpoint(base, tag="saved")
        engine.load_checkpoint(base)
        saved = fingerprint(engine)
        training.run_windows(engine, 1, first_window=2)
        for number in range(count):
            damaged = Path(folder, "damaged")
            shutil.copytree(base, damaged)
            how, is_free = _damage(damaged, choose)
            problem, is_loaded = _try(engine, damaged, saved, is_free)
            shutil.rmtree(damaged)
            if problem:
                yield f"seed {seed}, input {number}, {how}: {problem}"
            if is_loaded or problem:
                engine.destroy()
                engine = start(CONFIG)
                training.run_windows(engine, 3)
        engine.destroy()


@contextlib.contextmanager
def _rank(folder: str) -> Iterator[None]:
    """Makes this process the only rank, unless it is one already."""
    if dist.is_initialized():
        yield
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 40_000))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _try(engine, folder: Path, saved: str, is_free: bool) -> tuple[str, bool]:
    """Returns what went wrong, empty where nothing did, and whether the checkpoint was loaded."""
    before = fingerprint(engine)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.load_checkpoint(folder)
    except ValueError as refused:
        if not str(refused).startswith("ACCO: ") or "could not be checked" in str(refused):
            return f"{type(refused).__name__}: {refused}", False
        return ("" if fingerprint(engine) == before else f"changed the run, and: {refused}"), False
    except BaseException as error:
        return f"{type(error).__name__}: {error}", False
    if not is_free and fingerprint(engine) != saved:
        return "loaded something else", True
    try:
        losses = training.run_windows(engine, 1, first_window=2)["losses"]
    except BaseException as error:
        return f"loaded, and then {type(error).__name__}: {error}", True
    return ("" if all(map(math.isfinite, losses)) else "loaded, and the loss is not finite"), True


def _damage(folder: Path, choose: random.Random) -> tuple[str, bool]:
    """Damages one file; returns how, and whether what it holds now may be meant."""
    path = choose.choice(sorted((folder / "saved").glob("*.pt")))
    kind = choose.choice(("flip", "flip", "cut", "edit", "edit", "edit", "edit"))
    size = path.stat().st_size
    if kind == "cut":
        length = choose.choice((0, 1, choose.randrange(size), size - 1))
        os.truncate(path, length)
        return f"{path.name} cut to {length} of {size}", False
    if kind == "flip":
        at, bit = choose.randrange(size), choose.randrange(8)
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << bit
        path.write_bytes(content)
        return f"{path.name} with bit {bit} of byte {at} flipped", False
    content = torch.load(path, weights_only=False)
    places = [place for place in _places(content, ()) if not UNUSED & set(place[2])]
    owner, key, names = choose.choice(places)
    told = _edit(owner, key, choose)
    torch.save(content, path)
    return f"{path.name} with {told} as {' / '.join(map(str, names))}", not set(FREE).isdisjoint(names)


def _places(owner: Any, above: tuple) -> Iterator[tuple[Any, Any, tuple]]:
    """Yields (what holds it, its key, all names down to it) of everything inside."""
    if isinstance(owner, (Mapping, list)):
        keys = list(owner if isinstance(owner, Mapping) else range(len(owner)))
        for key in keys:
            yield owner, key, (*above, key)
            yield from _places(owner[key], (*above, key))
    elif type(owner).__module__.startswith("deepspeed.") and not isinstance(owner, int):  # an enum is of the process
        yield from _places(getattr(owner, "__dict__", {}), above)


def _edit(owner: Any, key: Any, choose: random.Random) -> str:
    if isinstance(owner[key], torch.Tensor) and choose.random() < 0.7:
        name = choose.choice([name for name in TENSORS if name != "negative" or key == "exp_avg_sq"])
        owner[key] = TENSORS[name](owner[key].detach())
        return f"a tensor that is {name}"
    value = choose.choice([*VALUES, GONE, GONE])
    if value is GONE:
        del owner[key]
        return "nothing"
    owner[key] = value
    return repr(value)
