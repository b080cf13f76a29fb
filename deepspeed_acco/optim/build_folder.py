# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps built libraries: where they lie, who else could have written there, and whether one is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
from pathlib import Path


def build_root() -> Path:
    """Returns the folder in which torch builds operators, one folder for each."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else _own_root()


def _own_root() -> Path:
    # As torch.utils.cpp_extension, whose import takes long: where locks are its builds have been.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def trusted_folder(name: str) -> Path:
    """Returns the folder of that name for a library, made where there is none. One that another user could have filled
    is told and not taken, but the one in the user's own cache.

    Raises:
        RuntimeError: neither can be trusted.
    """
    objections: list[str] = []
    for root in dict.fromkeys((build_root(), _own_root())):
        root.mkdir(parents=True, exist_ok=True)
        objection = _objection(root, is_root=True)
        folder = root / name
        if not objection:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            objection = _objection(folder)
        if not objection:
            if objections:
                say(f"{objections[0]} and is not trusted with the native kernels: they are built in {folder}")
            return folder
        objections.append(objection)
    raise RuntimeError(
        f"{' and '.join(objections)}, and a library that is loaded from there could be another user's. Remove it, or "
        "set TORCH_EXTENSIONS_DIR to a folder of your own"
    )


def _objection(path: Path, is_root: bool = False) -> str:
    """Returns why another user could have put what lies there, a link or what it points to; empty where none could.

    Args:
        is_root: a group may share it, or all where nobody moves what is another's: what lies in it is looked at, too.
    """
    for status in (path.lstat(), path.stat()):
        if status.st_uid not in (os.geteuid(), 0):  # root can do so anyway
            return f"{path} belongs to user {_user_name(status.st_uid)}"
    mode = path.stat().st_mode
    is_open = mode & stat.S_IWOTH and not mode & stat.S_ISVTX if is_root else mode & (stat.S_IWGRP | stat.S_IWOTH)
    return f"{path} can be written by other users" if is_open else ""


def _user_name(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def why_not_loadable(library: Path) -> str:
    """Returns why that library may not be loaded; empty where it is what was put there.

    Whoever maps a library that was cut is ended by SIGBUS, and one that was changed computes anything.
    """
    try:
        objection = _objection(library)
        if objection:
            return objection
        recorded = _record_of(library).read_text()
    except FileNotFoundError:
        return "there is none for this machine and these versions"
    return "" if recorded == _record(library, library.name) else f"{library} is cut or was changed"


def put(built: Path, library: Path) -> None:
    """Moves a library to its place, with its hash beside it. Whoever looks in between sees two that do not match."""
    built.chmod(0o600)  # whatever the umask
    _replace_text(_record_of(library), _record(built, library.name))
    built.replace(library)


def _record_of(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _record(file: Path, name: str) -> str:
    return f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}\n"  # as sha256sum writes it


def _replace_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def say(text: str) -> None:
    """Prints a line, on one rank of each host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"ACCO: {text}", file=sys.stderr, flush=True)
