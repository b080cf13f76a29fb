# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: writes for each test its outcome and what its processes recorded, one JSON object a line.

``ACCO_SUITE_RESULTS``: that file. ``ACCO_SUITE_SELECTION``: a JSON object; ``done`` are tests to leave out, ``only``
the ones to run (null: all).
"""

import inspect
import json
import os

EVENTS = os.environ["ACCO_SUITE_EVENTS"]
RESULTS = os.environ["ACCO_SUITE_RESULTS"]

_reports = {}


def _write(**result) -> None:
    with open(RESULTS, "a") as file:
        file.write(json.dumps(result) + "\n")


def _is_other_stage(item) -> bool:
    """By the test's name, its parameters or the defaults of its arguments."""
    if any(word in item.nodeid for word in ("Zero2", "Zero3", "Stage2", "Stage3")):
        return True
    arguments = {name: one.default for name, one in inspect.signature(item.function).parameters.items()}
    arguments.update(item.callspec.params if hasattr(item, "callspec") else {})
    return any("stage" in name and isinstance(value, int) and value != 1 for name, value in arguments.items())


def pytest_collection_modifyitems(config, items):
    with open(os.environ["ACCO_SUITE_SELECTION"]) as file:
        selection = json.load(file)
    kept, left_out = [], []
    for item in items:
        is_selected = selection["only"] is None or item.nodeid in selection["only"]
        if item.nodeid in selection["done"] or not is_selected:
            left_out.append(item)
        elif _is_other_stage(item):
            _write(id=item.nodeid, outcome="other stage", reason="", events=[])
            left_out.append(item)
        else:
            kept.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_runtest_logstart(nodeid):
    _reports[nodeid] = []
    open(EVENTS, "w").close()
    _write(id=nodeid, outcome="started")


def pytest_runtest_logreport(report):
    _reports[report.nodeid].append(report)


def _reason(report) -> str:
    if report.outcome == "skipped":
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)


def pytest_runtest_logfinish(nodeid):
    outcome, reason = "passed", ""
    for report in _reports.pop(nodeid):
        if report.outcome != "passed" and outcome == "passed":
            outcome, reason = report.outcome, _reason(report)
    with open(EVENTS) as file:
        events = [json.loads(line) for line in file]
    _write(id=nodeid, outcome=outcome, reason=reason, events=events)
