"""What the experiments hand back: checks with thresholds, findings without, arrays to draw."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from ..display import WIDTH, Shown, wrapped
from ..files import make_directory, write_text

Rule = Literal["relative", "absolute", "below", "above"]
_NAME = 44
"""Characters of a line that a name takes."""


@dataclass(frozen=True)
class Check:
    """A measured number held against its prediction.

    Attributes:
        name: What was measured.
        value: Number.
        rule: ``"relative"`` or ``"absolute"`` distance to the prediction at most the limit; or
            the value itself ``"below"`` or ``"above"`` the limit.
        limit: Threshold.
        expected: Prediction; for one-sided rules what the theory says, if it says a number.
    """

    name: str
    value: float
    rule: Rule
    limit: float
    expected: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the threshold is met; a value that is no number never does."""
        if self.rule == "below":
            return self.value < self.limit
        if self.rule == "above":
            return self.value > self.limit
        assert self.expected is not None
        scale = abs(self.expected) if self.rule == "relative" else 1.0
        return abs(self.value - self.expected) <= self.limit * scale

    @property
    def threshold(self) -> str:
        """Say the threshold in a few characters."""
        if self.rule == "relative":
            return f"within {100 * self.limit:g} %"
        if self.rule == "absolute":
            return f"within {self.limit:g}"
        return f"{'<' if self.rule == 'below' else '>'} {self.limit:g}"


@dataclass(frozen=True)
class Finding:
    """A measured number without a threshold: weak, not reproduced, or beyond the theory.

    Attributes:
        name: What was measured.
        value: Number.
        comment: What was expected, and what this says.
    """

    name: str
    value: float
    comment: str


@dataclass(frozen=True)
class Section:
    """One question: its checks, findings and arrays."""

    checks: tuple[Check, ...] = ()
    findings: tuple[Finding, ...] = ()
    data: Mapping[str, xr.DataArray] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class LinearReport(Shown):
    """All that `run_linear` measured.

    Attributes:
        sections: By question, in order.
        settings: Preset, seed, sizes and versions.
    """

    sections: Mapping[str, Section]
    settings: Mapping[str, Any]

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks."""
        return tuple(check for section in self.sections.values() for check in section.checks)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings."""
        return tuple(each for section in self.sections.values() for each in section.findings)

    @property
    def data(self) -> dict[str, xr.DataArray]:
        """All arrays, by name."""
        return {k: v for section in self.sections.values() for k, v in section.data.items()}

    @property
    def passed(self) -> bool:
        """Whether every check met its threshold."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        """A table of checks and findings, at 80 columns."""
        lines = [f"{'measured':<{_NAME + 2}}{'value':>10}{'predicted':>10}  threshold"]
        for title, section in self.sections.items():
            lines += ["", *wrapped([title])]
            for c in section.checks:
                expected = "" if c.expected is None else f"{c.expected:.4f}"
                numbers = f"{_short(c.value):>10}{expected:>10}  {c.threshold}"
                lines += _row(c.name, numbers)
                if not c.passed:
                    lines.append(f"{'MISSED':>{_NAME + 12}}")
            for f in section.findings:
                lines += _row(f.name, f"{_short(f.value):>10}")
                indent = " " * 6
                lines += textwrap.wrap(
                    f"({f.comment})", WIDTH, initial_indent=indent, subsequent_indent=indent
                )
        missed = [c for c in self.checks if not c.passed]
        lines.append(f"\n{len(self.checks) - len(missed)} of {len(self.checks)} thresholds met")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Write everything as plain values."""
        return {
            "settings": dict(self.settings),
            "passed": self.passed,
            "sections": {
                title: {
                    "checks": [
                        {**vars(c), "threshold": c.threshold, "passed": c.passed}
                        for c in section.checks
                    ],
                    "findings": [dict(vars(f)) for f in section.findings],
                    "data": {name: array.to_dict() for name, array in section.data.items()},
                }
                for title, section in self.sections.items()
            },
        }

    def save(self, directory: str | os.PathLike) -> Path:
        """Write ``linear.json``: all numbers with their thresholds, and all arrays.

        Args:
            directory: Made if it is not there.

        Returns:
            The file.

        Raises:
            FileError: if it cannot be written.
        """
        path = make_directory(directory) / "linear.json"
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path


def _row(name: str, numbers: str) -> list[str]:
    """Write a name, on as many lines as it takes, and what stands beside its last."""
    *above, last = textwrap.wrap(name, _NAME, subsequent_indent="  ")
    return [*(f"  {line}" for line in above), f"  {last:<{_NAME}}{numbers}"]


def _short(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.4f}"
