# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Writes for ``ds_acco report`` one HTML file with the pictures and figures of a comparison, or of one run.

The file needs nothing outside of itself: pictures are SVG in data URIs, and its own policy forbids it to load anything.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..compare.results import RESULTS, read_results
from ..subcommand import add_parser, complain
from ..words import printable
from . import figures as pictures
from .read_run import read_run


def add_command(commands) -> None:
    """Adds ``report`` to the object of ``ArgumentParser.add_subparsers``."""
    parser = add_parser(
        commands,
        "report",
        help="writes one HTML file with the pictures of a comparison or of one run",
        example="ds_acco report runs/compare",
    )
    parser.add_argument(
        "source",
        metavar="RUN",
        type=Path,
        help="results.json of `ds_acco compare` or its folder; or the folder of one run with metrics.jsonl, "
        "rank*.jsonl or the CSV files of DeepSpeed's monitor",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in that folder")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    source, out = options.source, options.out
    try:
        pictures.require_matplotlib()
        if not source.exists():
            raise ValueError(f"{source} does not exist; give a results.json, its folder, or the folder of one run")
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ValueError(f"--out {out} is not allowed; allowed: a file in a folder that exists")
        if source.is_dir() and not (source / RESULTS).is_file():
            written = write_run(source, out)
        else:
            written = write(source / RESULTS if source.is_dir() else source, out)
    except (ValueError, OSError) as error:
        complain(f"report: {error}")
        return 2
    except ModuleNotFoundError as error:
        complain(f"report: {error}")
        return 1
    print(printable(str(written)))
    return 0


def write(results: Path, out: Path | None = None) -> Path:
    """Writes the report of a comparison and returns its path.

    Args:
        results: the ``results.json`` of ``ds_acco compare``.
        out: the HTML file; default: ``report.html`` beside ``results``.

    Raises:
        ValueError: ``results`` cannot be read; says why and what to do.
        ModuleNotFoundError: there is no matplotlib; says how to install it.
    """
    pictures.require_matplotlib()
    from .comparison_page import comparison_page

    page = comparison_page(read_results(results))
    return _written(page, out or results.parent / "report.html")


def write_run(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of one run and returns its path.

    Args:
        folder: has metrics.jsonl, rank*.jsonl and/or the CSV files of DeepSpeed's monitor.
        out: the HTML file; default: ``report.html`` in ``folder``.

    Raises:
        ValueError, ModuleNotFoundError: as :func:`write`.
    """
    pictures.require_matplotlib()
    from .run_page import run_page

    return _written(run_page(read_run(folder)), out or folder / "report.html")


def _written(page: str, path: Path) -> Path:
    path.write_text(page, encoding="utf-8")
    return path
