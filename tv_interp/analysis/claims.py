"""The claims of arXiv 2406.16007, asked of a model: effect, interval, control, verdict.

A verdict is *appears* or *does not* where the 95 % interval lies on one side of the least effect
that counts, and *undecided* where it does not, or where the question makes no sense (a vector that
does not work cannot converge). No verdict without its control: effects of vectors are differences
to the strongest of their controls, chosen on other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..errors import ModelError, TvInterpError
from ..prompts import Task, get_task, make_prompts
from ..scores import Scores
from .comparison import VectorReport, compare_vectors, wrapped
from .convergence import ablate_demos, measure_convergence
from .geometry import CONCRETE, measure_geometry

Verdict = Literal["appears", "does not", "undecided"]
Side = Literal["above", "below"]
LEAST = 0.25
"""Least share of the gap between recipients and few-shot prompts that counts as working."""
SAME = 0.75
"""One local vector converged with the others where it does at least this share of their work."""
REDUNDANT = 0.5
"""Answers are redundant where taking away all but one costs less than this share of the loss."""
HURTS = 0.1
"""Least fall of the metric that counts as being used."""


@dataclass(frozen=True)
class Claim:
    """One claim, asked of one model on one task.

    Attributes:
        text: The claim.
        source: Where the paper says it holds: ``"all"``, ``"knowledge"`` or ``"categorization"``.
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
    source: str
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


@dataclass(frozen=True)
class Claims:
    """What `check_claims` found.

    Attributes:
        rows: One for each claim and task.
    """

    rows: tuple[Claim, ...]

    def to_pandas(self) -> Any:
        """Write one row a claim and task."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def __str__(self) -> str:
        """A table at 80 columns, grouped by claim."""
        models = ", ".join(dict.fromkeys(row.model for row in self.rows))
        lines = [
            f"Claims of arXiv 2406.16007 on {models}: effect [95 % interval], verdict.",
            "In the paper: k knowledge, c categorization, * both.",
        ]
        for text in dict.fromkeys(row.text for row in self.rows):
            members = [row for row in self.rows if row.text == text]
            mark = {"all": "*", "knowledge": "k", "categorization": "c"}[members[0].source]
            sign = ">" if members[0].side == "above" else "<"
            lines += ["", f"{mark} {text} (effect {sign} {members[0].least:g})"]
            for r in members:
                number = "not measured"
                if np.isfinite(r.effect):
                    number = f"{r.effect:+.2f} [{r.lo:+.2f},{r.hi:+.2f}]"
                lines.append(f"    {r.task:<26}{number:<22}{r.verdict:<11}{r.reason}".rstrip())
            controls = "; ".join(dict.fromkeys(row.control for row in members))
            lines.append(f"    control: {controls}")
        return "\n".join(wrapped(lines))


def check_claims(
    model: Any,
    tasks: Sequence[str | Task],
    *,
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Claims:
    """Ask every claim of arXiv 2406.16007 of a model, task by task.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        tasks: Tasks or names of shipped ones.
        n_demos: Demonstrations.
        n_prompts: Prompts in each half.
        seed: Decides everything that is drawn.
        progress: Whether to show progress.

    Returns:
        One row for each claim and task, in the order of the claims; those that need a knockout are
        left out on models that take no edits of attention scores.

    Raises:
        UnknownName: for an unknown task.
        PromptError: if the prompts cannot be built.
        TvInterpError: if there are no tasks.
    """
    if not tasks:
        raise TvInterpError("empty selection: expected at least one task")
    settings: dict[str, Any] = {"n_demos": n_demos, "n_prompts": n_prompts, "seed": seed}
    rows: list[Claim] = []
    for each in tasks:
        task = get_task(each)
        report = compare_vectors(model, task, progress=progress, **settings)
        asked = _Asked(report)
        rows += asked.vectors()
        rows.append(asked.convergence(model, task, settings))
        rows += asked.ablations(model, task, settings)
        if task.name in CONCRETE:
            rows += asked.geometry(model, task.name, settings)
    texts = list(dict.fromkeys(row.text for row in rows))
    return Claims(tuple(sorted(rows, key=lambda row: texts.index(row.text))))


def judge(
    effect: Scores,
    least: float,
    *,
    over: xr.DataArray | None = None,
    side: Side = "above",
) -> tuple[float, float, float, Verdict, str]:
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
        return np.nan, np.nan, np.nan, "undecided", "nothing to be a share of"
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


class _Asked:
    """The claims on one task, from its comparison of vectors."""

    def __init__(self, report: VectorReport) -> None:
        self.report = report
        self.select = report.settings["select"]
        self.test = report.scores[f"test/{self.select}"]
        self.local_works: Verdict = "undecided"

    def claim(
        self,
        text: str,
        source: str,
        least: float,
        control: str,
        found: tuple,
        side: Side = "above",
    ) -> Claim:
        s = self.report.settings
        value, lo, hi, verdict, reason = found
        return Claim(
            text, source, s["model"], s["task"], s["family"], value, lo, hi, least, side,
            control, verdict, reason,
        )  # fmt: skip

    def vectors(self) -> list[Claim]:
        """Ask whether local and global vectors work, and what averaging does to them."""
        local = self._works("local vectors work in dummy prompts", "all", "dummy: local", "dummy")
        self.local_works = local.verdict
        out = [local]
        have = {f"{row.recipient}: {row.name}" for row in self.report.rows}
        single, averaged = "zero-shot: global, other query", "zero-shot: global, Trial Avg"
        if {single, averaged} <= have:
            text = "a global vector works in zero-shot prompts"
            out.append(self._works(f"{text}, one trial", "knowledge", single, "zero-shot"))
            out.append(self._works(f"{text}, Trial Avg", "knowledge", averaged, "zero-shot"))
            out.append(
                self._against("Trial Avg helps the global vector", "knowledge", averaged, single)
            )
        found = self._against(
            "Pos Avg fails where all local vectors work", "all", "dummy: local",
            "dummy: local, Pos Avg",
        )  # fmt: skip
        out.append(self._needs_local(found))
        return out

    def _at(self, site: str, layer: int) -> xr.DataArray:
        return self.test.data.sel(site=site, layer=layer, drop=True)

    def _gap(self, recipient: str) -> xr.DataArray:
        runs = self.report.runs[f"test/{self.select}"].data
        return runs.sel(site="few-shot", drop=True) - runs.sel(site=recipient, drop=True)

    def _works(self, text: str, source: str, site: str, recipient: str) -> Claim:
        """Hold a vector against the strongest control at its own layer, as a share of the gap."""
        layer = self.report.row(site).layer
        dev = self.report.scores[f"dev/{self.select}"].mean().sel(layer=layer)
        controls = self.report.controls(recipient)
        plain = float(self.report.run(recipient, "dev").mean())
        strongest = max(controls, key=lambda name: float(dev.sel(site=name)))
        runs = self.report.runs[f"test/{self.select}"].data
        if float(dev.sel(site=strongest)) > plain:
            base, name = self._at(strongest, layer), strongest.split(": ")[1]
        else:  # controls that harm must not make a vector look good
            base, name = runs.sel(site=recipient, drop=True), "the recipients as they are"
        effect = replace(self.test, data=self._at(site, layer) - base)
        found = judge(effect, LEAST, over=self._gap(recipient))
        return self.claim(text, source, LEAST, f"{name} ({recipient})", found)

    def _against(self, text: str, source: str, site: str, other: str) -> Claim:
        """Hold one curve against another, each at its own best layer, as a share of the gap."""
        ours, theirs = (self._at(s, self.report.row(s).layer) for s in (site, other))
        effect = replace(self.test, data=ours - theirs)
        found = judge(effect, LEAST, over=self._gap(self.report.row(site).recipient))
        return self.claim(text, source, LEAST, other, found)

    def _needs_local(self, claim: Claim) -> Claim:
        if self.local_works == "appears":
            return claim
        return replace(claim, verdict="undecided", reason="no local vectors")

    def convergence(self, model: Any, task: Task, settings: dict[str, Any]) -> Claim:
        """Ask whether one local vector does the work of all."""
        found = measure_convergence(model, task, **settings)
        layer = self.report.row("dummy: local").layer
        at = found.effect_ratio().sel(layer=layer)
        value, lo, hi = (float(at[name]) for name in ("value", "lo", "hi"))
        verdict = verdict_of(lo, hi, SAME)
        reason = "" if np.isfinite(value) else "no effect to share"
        claim = self.claim(
            "local vectors converge: one does the work of all", "knowledge", SAME,
            "dummies as they are, and all local vectors", (value, lo, hi, verdict, reason),
        )  # fmt: skip
        return self._needs_local(claim)

    def ablations(self, model: Any, task: Task, settings: dict[str, Any]) -> list[Claim]:
        """Take away k of n answers, and as many connectives; none where nothing can be cut."""
        prompts = make_prompts(model, task, **settings)
        n = prompts.n_demos

        def lost(metric: str, at: str, k: int) -> Scores:
            """Measure what taking k positions away costs, ``[prompt]``."""
            data = scores[metric, at].data.isel(part=0, drop=True)
            cost = data.isel(demo=0, drop=True) - data.isel(demo=k, drop=True)
            return replace(scores[metric, at], data=cost)

        def apart(metric: str) -> Scores:
            """Subtract what taking all connectives costs from what taking all answers costs."""
            ours, theirs = (lost(metric, at, n) for at in ("answer", "is"))
            return replace(ours, data=ours.data - theirs.data)

        try:
            scores = {
                (metric, at): ablate_demos(model, prompts, at=at, how=["knockout"], metric=metric)
                for metric in (self.select, "label_rate")
                for at in ("answer", "is")
            }
        except ModelError:  # this model takes no edits of attention scores
            return []
        whole = lost(self.select, "answer", n).data
        specific = float(apart(self.select).ci("mean")["lo"]) > 0
        control = "as many connectives taken away"
        out = []
        asked: tuple[tuple[str, str, int, float, Side], ...] = (
            (
                "answers are redundant: all but one can be taken away",
                *("knowledge", n - 1, REDUNDANT, "below"),
            ),
            (
                "accuracy falls gradually: half of the answers cost some",
                *("categorization", n // 2, HURTS, "above"),
            ),
        )
        for text, source, k, least, side in asked:
            found = judge(lost(self.select, "answer", k), least, over=whole, side=side)
            if not specific:
                found = (*found[:3], "undecided", "control as large")
            out.append(self.claim(text, source, least, control, found, side))
        text = "without the answers, the model answers with no label"
        out.append(self.claim(text, "all", LEAST, control, judge(apart("label_rate"), LEAST)))
        return out

    def geometry(self, model: Any, task: str, settings: dict[str, Any]) -> list[Claim]:
        """Take the concrete factor out of the answers, early and late."""
        found = measure_geometry(model, task, **settings)
        concrete = found.settings["concrete"]
        data = found.ablated.data
        last = data.sizes["layer"] - 1
        late = max(1, round(last * 2 / 3))
        control = "random subspace of equal removed variance"
        out: list[Claim] = []
        asked: tuple[tuple[str, int, Side], ...] = (
            ("taking the concrete feature out of all layers hurts", 0, "above"),
            ("taking the concrete feature out of late layers does not hurt", late, "below"),
        )
        for text, layer, side in asked:
            at = data.sel(layer=layer, drop=True)
            random = at.sel(site=f"random, variance of {concrete}", drop=True)
            effect = replace(found.ablated, data=random - at.sel(site=concrete, drop=True))
            verdict = judge(effect, HURTS, side=side)
            out.append(self.claim(text, "categorization", HURTS, control, verdict, side))
        if out[0].verdict != "appears":  # where nothing hurts, late layers show nothing
            out[1] = replace(out[1], verdict="undecided", reason="nor do all layers")
        return out
