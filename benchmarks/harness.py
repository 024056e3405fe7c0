"""What the benchmarks share: CPU time, what was run where, and the tables of README.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def cpu(function: Callable, *, device: str = "cpu"):
    """Result and seconds: of CPU time, or of the wall clock where a GPU does the work."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = function()
        torch.cuda.synchronize()
        return out, time.perf_counter() - start
    start = time.process_time()
    out = function()
    return out, time.process_time() - start


def provenance() -> str:
    """What was run where."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformer-lens", "numpy"))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"Commit {commit}; {packages}; Python {platform.python_version()}; "
        f"{os.cpu_count()} cores of {platform.machine()}, one thread used; load {load}."
    )


def keep(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Add results to those that a file beside the benchmarks has, and hand back all."""
    kept = HERE / name
    known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    known.update(results)
    kept.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", "utf-8")
    return known


def write_section(script: str, text: str) -> None:
    """Put a text into README.md, between the two marks of a script."""
    readme = HERE / "README.md"
    start, end = f"<!-- made by {script} --write -->", f"<!-- end of {script} -->"
    head, _, rest = readme.read_text("utf-8").partition(start)
    tail = rest.partition(end)[2]
    readme.write_text(f"{head}{start}\n\n{text}\n\n{end}{tail}", "utf-8")
