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

_LAUNCHERS_OWN = "--local_rank"  # DeepSpeed's launcher puts it in front of everything else
_USAGE = "usage: python -m deepspeed_acco [-m MODULE | SCRIPT] [ARGUMENTS]"


def main() -> None:
    """Runs what the command line names as the interpreter would, in this process.

    Raises:
        SystemExit: with code 2, where it names no script or module that is there.
    """
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
        print(f"{_USAGE}\npython -m deepspeed_acco: error: {given}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
