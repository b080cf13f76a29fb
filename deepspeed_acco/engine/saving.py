# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the former checkpoint of a tag whole until the new one is, and tells all ranks where one could not write.

DeepSpeed writes each file under its last name. Where a tag is written anew (``tag="best"``, a step trained twice) a
kill in the middle leaves files of two steps, which are no checkpoint; the former one, maybe the only one, is gone. Here
every rank writes its files beside the last names (``NAME.saving``). When all ranks have written all, each renames its
own, that of the module first where layers have files of their own; ``latest`` is replaced last. Files and not the
folder are renamed, since ranks may have disks of their own and a tag's folder may hold more than DeepSpeed's files.
While a tag is written anew both checkpoints take disk space.

A kill within the few milliseconds of renaming leaves some files under their last names and the others complete beside
theirs: loading refuses that mixture and says what to rename (checkpoint_shards.py).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from ..runtime.failures import CommFailed
from .deepspeed_engine import Engine
from .log import describe_bytes

SUFFIX = ".saving"
_PROBE_BYTES = 1 << 16


class CheckpointNotSaved(RuntimeError):
    """Says on every rank that a checkpoint was not saved, and why; training can go on."""


def is_whole_when_written(engine: Engine) -> bool:
    """Tells whether a file is there when the checkpoint engine's ``save`` returns: not with those that write later."""
    return isinstance(engine.checkpoint_engine, TorchCheckpointEngine)


def save(engine: Engine, original: Callable[[Saving], Any], save_dir: str, tag: Any, names_latest: bool) -> Any:
    """Runs DeepSpeed's save and publishes its files; every rank must call it.

    Args:
        original: writes all files by :meth:`Saving.write`, then calls :meth:`Saving.publish`.
        tag: None: the step's, as DeepSpeed names it.
        names_latest: whether ``latest`` shall name the tag.
    Raises:
        CheckpointNotSaved: on every rank, where any of them could not write.
    """
    saving = Saving(engine, save_dir, tag, names_latest)
    saving.make_folder()
    try:
        with engine.optimizer.driver.bounded("save_checkpoint"):
            return original(saving)
    except (CheckpointNotSaved, CommFailed):
        raise
    except Exception as cause:
        saving.give_up(cause)
        raise


class Saving:
    """Takes the place of DeepSpeed's writing for one checkpoint."""

    def __init__(self, engine: Engine, save_dir: str, tag: Any, names_latest: bool):
        self._engine, self._folder, self._tag = engine, save_dir, tag
        self._names_latest = names_latest
        self._save, self._commit = engine.checkpoint_engine.save, engine.checkpoint_engine.commit
        self._paths: list[str] = []  # of this rank's files, by their last names
        self._failure = ""
        self._is_renaming = self._is_published = False

    def make_folder(self) -> None:
        """Makes the folder on every rank, before DeepSpeed does on one while the others wait."""
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as cause:
            self._failure = _told(cause, self._folder)
        self._require_all_well("at the beginning of a save")

    def write(self, state_dict: Any, path: str) -> None:
        """Writes one file beside its last name. A failure is kept until this rank's last file, its shard: before that
        DeepSpeed may wait for the others, and after it overwrites its scripts in the folder."""
        if not self._failure:
            self._try_to_write(state_dict, path)
        if self._failure and path.endswith("_optim_states.pt"):
            raise RuntimeError(self._failure)

    def _try_to_write(self, state_dict: Any, path: str) -> None:
        beside = f"{path}{SUFFIX}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._paths.append(path)
            self._save(state_dict, beside)
            if os.path.exists(path):
                _flush(beside)  # or a power cut after the renaming leaves neither
        except Exception as cause:  # of torch's writer, or of pickling a client_state
            self._failure = _told(cause, beside)

    def publish(self, commit_info: Any) -> bool:
        """Gives all files their last names once all ranks have written theirs; in the place of the checkpoint engine's
        ``commit``, which it calls."""
        latest, engine = os.path.join(self._folder, "latest"), self._engine
        is_first_of_disk = engine.use_node_local_storage() and engine.local_rank == 0
        names_latest = self._names_latest and (is_first_of_disk or engine.global_rank == 0)
        try:
            if not self._failure:
                self._commit(commit_info)
            if not self._failure and names_latest:
                with open(f"{latest}{SUFFIX}", "w", encoding="utf-8") as file:
                    file.write(f"global_step{engine.global_steps}" if self._tag is None else str(self._tag))
                _flush(file.name)
        except Exception as cause:
            self._failure = _told(cause, f"{latest}{SUFFIX}")
        self._require_all_well("behind its files of a checkpoint")
        self._is_renaming = True
        if engine.pipeline_parallelism:
            # The file of a layer does not tell its step. Where one is new, the module's is, and some shard is not yet.
            for path in filter(_is_of_module, self._paths):
                self._rename(path)
            self._require_all_well("behind the renaming of the file with the module")
            self._paths = [path for path in self._paths if not _is_of_module(path)]
        for path in self._paths:
            self._rename(path)
        self._require_all_well("behind the renaming of its files")
        if names_latest:
            self._rename(latest)
        self._require_all_well("at the end of a save")
        self._is_published = True
        return True

    def give_up(self, cause: Exception) -> None:
        """Tells the other ranks, who wait for this one, that it has left the save by an error of its own."""
        if not self._is_published:
            self._failure = self._failure or _told(cause, self._folder)
            self._require_all_well("behind its files of a checkpoint")

    def _rename(self, path: str) -> None:
        try:
            os.replace(f"{path}{SUFFIX}", path)
        except OSError as cause:
            self._failure = self._failure or _told(cause, path)

    def _require_all_well(self, place: str) -> None:
        failures = self._engine.optimizer.gather_objects(self._failure, place)
        told = "; ".join(f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure)
        if not told:
            return
        if self._is_renaming:
            raise CheckpointNotSaved(
                f"ACCO: the checkpoint in {self._folder} was written, but some of its files still have the ending "
                f"{SUFFIX}. {told}. Rename them, or save again"
            )
        for path in [*self._paths, os.path.join(self._folder, "latest")]:
            with suppress(OSError):
                os.remove(f"{path}{SUFFIX}")
        raise CheckpointNotSaved(
            f"ACCO: the checkpoint in {self._folder} was not saved; what was there before is as it was, and training "
            f"can go on. {told}. Mend that, or save to another folder"
        )


def _is_of_module(path: str) -> bool:
    return os.path.basename(path).startswith("mp_rank_")


def _flush(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _told(cause: Exception, path: str) -> str:
    """Returns what could not be written, why, and how much space there is."""
    reason = _asked_again(path) or cause if isinstance(cause, RuntimeError) else cause
    number = reason.errno if isinstance(reason, OSError) else None
    why = (
        f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
        if number
        else f"{type(reason).__name__}: {reason}"
    )
    return f"{path} could not be written: {why}; {_free(path)} free there"


def _asked_again(path: str) -> OSError | None:
    """Returns why the file system takes no more: torch's writer says only that it failed."""
    if os.path.isdir(path):
        return None
    try:
        with open(path, "ab", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as why:
        return why
    return None


def _free(path: str) -> str:
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        return describe_bytes(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown amount"
