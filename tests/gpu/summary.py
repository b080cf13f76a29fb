# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Puts what the parts of acceptance.sh printed into one JSON: ``python -m tests.gpu.summary NAME LOGS FILE PART``."""

import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from deepspeed_acco.tools.machine import describe_machine


def _device() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].split(", ")
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"device": name, "driver": driver, "cuda": str(torch.version.cuda), "nccl of torch": nccl}


def _tests(path: Path) -> dict:
    suite = next(ElementTree.parse(path).getroot().iter("testsuite")).attrib
    counts = {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in ElementTree.parse(path).getroot().iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def main(name: str, logs: Path, out: Path, words: list[str]) -> None:
    """Writes the file; a part that gave nothing has its exit code alone.

    Args:
        words: the parts as they were asked for.
    """
    parts = {}
    for line in (logs / "parts").read_text().splitlines():
        part, code, seconds = line.split()
        told: dict = {"exit_code": int(code), "seconds": int(seconds)}
        if (logs / f"{part}.xml").is_file():
            told |= _tests(logs / f"{part}.xml")
        if part == "sanitizer":
            text = (logs / "sanitizer.log").read_text()
            told["errors"] = [int(count) for count in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)]
            told["launches"] = re.findall(r"launches: .*", text)
        if part == "kernels" and (logs / "kernels.json").is_file():
            told |= json.loads((logs / "kernels.json").read_text())
        parts[part] = told
    command = f"tests/gpu/acceptance.sh {name} {' '.join(words)}"
    results = {"command": command, "date": date.today().isoformat(), "machine": describe_machine(), **_device()}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in {**results, **parts}.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
