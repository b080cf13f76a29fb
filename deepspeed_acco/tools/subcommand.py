# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds what the subcommands of ``ds_acco`` share: the look of their help, and packages that only some need."""

from __future__ import annotations

import argparse
import sys
import textwrap
from importlib.util import find_spec
from typing import Any, NoReturn

from .words import printable

_WIDTH = 100  # of a description; argparse leaves it alone here, so that examples keep their lines
INTERRUPTED = 130  # exit status


class MissingExtra(ModuleNotFoundError):
    """Says that a package of an extra is not installed."""


class Parser(argparse.ArgumentParser):
    """Reads arguments; what is wrong with them is said without what would steer the terminal."""

    def error(self, message: str) -> NoReturn:
        """Prints usage and message and ends the process with status 2."""
        super().error(printable(message))


def complain(words: object) -> None:
    """Prints an error or a warning, which begins with the subcommand, without what would steer the terminal."""
    print(printable(f"ds_acco {words}"), file=sys.stderr)


def add_parser(commands, name: str, *, help: str, example: str, description: str = "", **options: Any):
    """Adds a subcommand to what ``add_subparsers`` returned, and returns its ArgumentParser.

    Args:
        example: command lines that work, shown at the end of the help.
        description: default: ``help`` as a sentence.
    """
    sentence = description or f"{help[0].upper()}{help[1:]}."
    return commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(sentence, _WIDTH),
        epilog="example:\n" + textwrap.indent(example, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def require_extra(extra: str, *modules: str) -> None:
    """Raises MissingExtra, naming the extra, when one of the modules is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtra(f'{" and ".join(missing)} not installed: pip install "deepspeed_acco[{extra}]"')
