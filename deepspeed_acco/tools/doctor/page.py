# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the page and the JSON of what was found."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..words import counted, number, printable
from .finding import FAIL, NOT_APPLICABLE, OK, WARN, Finding

_WIDTH = 100
_MARKS = {OK: "ok", WARN: "warn", FAIL: "FAIL", NOT_APPLICABLE: "-"}
_INDENT = 17  # of what is said: behind the mark and the name
VERSION = 1  # of the JSON


def is_well(findings: Mapping[str, Finding]) -> bool:
    """Tells whether nothing failed."""
    return all(finding.status != FAIL for finding in findings.values())


def page_of(header: str, findings: Mapping[str, Finding], took_s: float) -> str:
    """Returns what is printed."""
    lines = [*textwrap.wrap(f"deepspeed_acco doctor: {header}", _WIDTH), ""]
    for name, finding in findings.items():
        lines += _filled(f"{_MARKS[finding.status]:6}{name:{_INDENT - 6}}", finding.sentence)
        for what, text in finding.rows:
            lines += _filled(" " * _INDENT, f"{what}: {text}")
        if finding.advice:
            lines += _filled(" " * _INDENT, f"What to do: {finding.advice}.")
    lines += ["", f"{_summary(findings)} It took {number(took_s, 0)} s."]
    return printable("\n".join(lines))


def _filled(mark: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=" " * _INDENT, break_long_words=False)


def _summary(findings: Mapping[str, Finding]) -> str:
    failed, warned = ([name for name, each in findings.items() if each.status == status] for status in (FAIL, WARN))
    if failed:
        return f"{counted(len(failed), 'check')} failed: {', '.join(failed)}."
    warning = f"; {counted(len(warned), 'warning')}: {', '.join(warned)}" if warned else ""
    return f"Nothing failed{warning}."


def json_of(header: Mapping[str, Any], findings: Mapping[str, Finding], took_s: float) -> dict[str, Any]:
    """Returns the content of the JSON."""
    return {
        "version": VERSION,
        **header,
        "is_well": is_well(findings),
        "took_s": took_s,
        "checks": {
            name: {
                "status": finding.status,
                "sentence": finding.sentence,
                "advice": finding.advice,
                "figures": dict(finding.figures),
            }
            for name, finding in findings.items()
        },
    }
