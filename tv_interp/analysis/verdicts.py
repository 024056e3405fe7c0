"""A claim about a model, its verdict, and the table of them.

A verdict is *appears* or *does not* where the 95 % interval lies on one side of the least effect
that counts, and *undecided* where it does not, or where the question makes no sense (a vector that
does not work cannot converge). No verdict without its control.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..display import Shown, wrapped
from ..errors import FileError
from ..files import write_text
from ..scores import Scores

Verdict = Literal["appears", "does not", "undecided"]
Side = Literal["above", "below"]
Source = Literal["all", "knowledge", "categorization", "ours"]
Found = tuple[float, float, float, Verdict, str]
"""Value, lower and upper end, verdict, and why it is undecided."""
LEAST = 0.25
"""Least share of the gap between recipients and few-shot prompts that counts as working."""
SAME = 0.75
"""One local vector converged with the others where it does at least this share of their work."""
REDUNDANT = 0.5
"""Answers are redundant where taking away all but one costs less than this share of the loss."""
HURTS = 0.1
"""Least fall of the metric that counts as being used; least rise of a distance that counts."""
SEPARATE = 2.0
"""Two classes are separate where their means are this many standard deviations apart."""
_MARKS = {"all": "*", "knowledge": "k", "categorization": "c", "ours": "o"}


@dataclass(frozen=True)
class Claim:
    """One claim, asked of one model on one task.

    Attributes:
        text: The claim.
        source: Where the paper says it holds: ``"all"``, ``"knowledge"`` or ``"categorization"``;
            ``"ours"`` for what it does not say.
        model: Name of the model.
        task: Name of the task.
        family: Its family.
        effect: The effect that decides; NaN where it could not be measured.
        lo: Lower end of its 95 % interval.
        hi: Upper end.
        least: What the interval is held against.
        side: On which side of it the claim says that the effect is.
        control: What the effect was held against, or what was measured beside it.
        verdict: Whether the claim appears.
        reason: Why it is undecided; empty otherwise.
    """

    text: str
    source: Source
    model: str
    task: str
    family: str
    effect: float
    lo: float
    hi: float
    least: float
    side: Side
    control: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Claims(Shown):
    """What `check_claims` found.

    Attributes:
        rows: One for each claim and task.
        settings: ``n_demos``, ``n_prompts`` and ``seed`` of the prompts.
    """

    rows: tuple[Claim, ...]
    settings: Mapping[str, Any]

    def to_pandas(self) -> Any:
        """Write one row a claim and task."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def to_markdown(self) -> str:
        """Write a table for a model card: a line a claim, a column a task, verdict and interval."""
        tasks = list(dict.fromkeys(row.task for row in self.rows))
        lines = ["| claim | " + " | ".join(tasks) + " | control |", "|---" * (len(tasks) + 2) + "|"]
        for text in dict.fromkeys(row.text for row in self.rows):
            found = {row.task: row for row in self.rows if row.text == text}
            first = next(iter(found.values()))
            sign = ">" if first.side == "above" else "<"
            cells = [_cell(found[task]) if task in found else "" for task in tasks]
            controls = "; ".join(dict.fromkeys(row.control for row in found.values()))
            name = f"{_MARKS[first.source]} {text} ({sign} {first.least:g})".replace("*", r"\*")
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {controls} |")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON; the same claims give the same bytes.

        Raises:
            FileError: if the file cannot be written.
        """
        rows = [json.dumps({k: _plain(v) for k, v in asdict(row).items()}) for row in self.rows]
        settings = json.dumps(dict(self.settings))
        text = f'{{"settings": {settings}, "rows": [\n ' + ",\n ".join(rows) + "\n]}\n"
        write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Claims:
        """Read what `save` wrote.

        Raises:
            FileError: if there is no such file, or it holds no claims.
        """
        try:
            held = json.loads(Path(path).read_text("utf-8"))
            given: list[dict[str, Any]] = held["rows"]
            known: list[dict[str, Any]] = [
                {k: np.nan if v is None else v for k, v in row.items()} for row in given
            ]
            return cls(tuple(Claim(**row) for row in known), held["settings"])
        except OSError as error:
            raise FileError(f"expected a file of claims, got {path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} is no claims file of tv_interp: {error}") from error

    def __str__(self) -> str:
        """A table at 80 columns, grouped by claim."""
        models = ", ".join(dict.fromkeys(row.model for row in self.rows))
        lines = [
            f"Claims of arXiv 2406.16007 on {models}: effect [95 % interval], verdict.",
            f"{self.settings['n_demos']} demonstrations, {self.settings['n_prompts']} prompts.",
            "In the paper: k knowledge, c categorization, * both; o ours.",
        ]
        for text in dict.fromkeys(row.text for row in self.rows):
            members = [row for row in self.rows if row.text == text]
            mark = _MARKS[members[0].source]
            sign = ">" if members[0].side == "above" else "<"
            lines += ["", f"{mark} {text} (effect {sign} {members[0].least:g})"]
            for r in members:
                number = "not measured"
                if np.isfinite(r.effect):
                    number = f"{r.effect:+.2f} [{r.lo:+.2f},{r.hi:+.2f}]"
                lines.append(f"    {r.task:<26}{number:<22} {r.verdict:<11}{r.reason}".rstrip())
            controls = "; ".join(dict.fromkeys(row.control for row in members))
            lines.append(f"    control: {controls}")
        return "\n".join(wrapped(lines))


def _plain(value: Any) -> Any:
    """Round numbers, and write what was not measured as null."""
    if isinstance(value, float):
        return round(value, 4) if np.isfinite(value) else None
    return value


def _cell(row: Claim) -> str:
    if not np.isfinite(row.effect):
        return f"{row.verdict}: {row.reason or 'not measured'}"
    reason = f", {row.reason}" if row.reason else ""
    return f"**{row.verdict}** {row.effect:+.2f} [{row.lo:+.2f}, {row.hi:+.2f}]{reason}"


def judge(
    effect: Scores,
    least: float,
    *,
    over: xr.DataArray | None = None,
    side: Side = "above",
) -> Found:
    """Hold the interval of a mean effect, or of a share, against the least that counts.

    Args:
        effect: Effects over ``prompt`` alone.
        least: What counts.
        over: What the effect is a share of, ``[prompt]``; None for the mean itself.
        side: Whether the claim is that the effect is ``"above"`` or ``"below"`` that.

    Returns:
        Value, lower and upper end, verdict, and why it is undecided.
    """
    scores = replace(effect, total=over)
    if over is not None and not scores.total_is_clear():
        return np.nan, np.nan, np.nan, "undecided", "no gap"
    table = scores.ci("mean" if over is None else "recovered")
    value, lo, hi = (float(table[name]) for name in ("value", "lo", "hi"))
    return value, lo, hi, verdict_of(lo, hi, least, side), ""


def verdict_of(lo: float, hi: float, least: float, side: Side = "above") -> Verdict:
    """Decide by an interval: wholly on the claim's side is *appears*, on the other *does not*."""
    if not lo <= hi:
        return "undecided"
    above, under = lo > least, hi < least
    if not (above or under):
        return "undecided"
    return "appears" if above == (side == "above") else "does not"
