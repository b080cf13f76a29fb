# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a script or module that does not import this package, with ACCO registered; its JSON alone names ACCO.

deepspeed --module deepspeed_acco train.py ARGUMENTS
torchrun --nproc-per-node 2 -m deepspeed_acco train.py ARGUMENTS
accelerate launch -m deepspeed_acco -m trl.scripts.sft ARGUMENTS
"""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
import traceback
from pathlib import Path

from .engine import leaving

_PACKAGE = Path(__file__).parent
_INITIALIZE = ("deepspeed", "__init__.py", "initialize")
_LAUNCHERS_OWN = "--local_rank"  # DeepSpeed's launcher puts it in front of everything else
_PROGRAM = "python -m deepspeed_acco"
_USAGE = f"usage: {_PROGRAM} [-m MODULE | SCRIPT] [ARGUMENTS]"


def main() -> None:
    """Runs what the command line names as the interpreter would, in this process.

    Raises:
        SystemExit: with code 2, where it names no script or module that is there; with code 1, where
            deepspeed.initialize refuses its configuration, which is told in place of the traceback.
    """
    try:
        _run()
    except ValueError as error:
        call = _call_that_was_refused(error)
        if call is None:
            raise
        lines = [f"{_PROGRAM}: error: {error}", f"  {call}", "  `ds_acco check` lists all problems of a DeepSpeed JSON"]
        print("\n".join(lines), file=sys.stderr, flush=True)
        leaving.watch(type(error).__name__, code=1)
        raise SystemExit(1) from None


def _run() -> None:
    words = sys.argv[1:]
    own = [words.pop(0)] if words and words[0].startswith(_LAUNCHERS_OWN) else []
    is_module = words[:1] == ["-m"]
    target, arguments = (words[int(is_module) :] + [""])[0], words[int(is_module) + 1 :]
    sys.argv[1:] = own + arguments
    if is_module and target:
        sys.argv[0] = target
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    elif os.path.isfile(target):
        sys.argv[0] = target
        sys.path[0] = os.path.dirname(os.path.abspath(target))  # as of a script, in place of the working folder
        runpy.run_path(target, run_name="__main__")
    else:
        given = f"{target!r} is no file" if target else "no script or module was given"
        print(f"{_USAGE}\n{_PROGRAM}: error: {given}", file=sys.stderr)
        raise SystemExit(2)


def _call_that_was_refused(error: ValueError) -> str | None:
    """Returns where the script called deepspeed.initialize, which refused its configuration; None for any other error:
    one of the script's own, or raised while it handled another."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [(Path(frame.filename), frame.name) for frame in frames]
    is_ours = type(error) is ValueError and str(error).startswith("ACCO: ") and _PACKAGE in names[-1][0].parents
    calls = [index for index, (file, name) in enumerate(names) if (*file.parts[-2:], name) == _INITIALIZE]
    if not is_ours or not calls or (error.__context__ and not error.__suppress_context__):
        return None
    callers = frames[: calls[0]]
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    of_script = [frame for frame in callers if not _is_in(Path(frame.filename), [*installed, _PACKAGE])]
    call = (of_script or callers)[-1]
    return f"deepspeed.initialize was called from {call.filename}, line {call.lineno}, in {call.name}"


def _is_in(file: Path, folders: list[Path]) -> bool:
    return not file.is_absolute() or any(folder in file.parents for folder in folders)  # <frozen runpy> is no path


if __name__ == "__main__":
    main()
