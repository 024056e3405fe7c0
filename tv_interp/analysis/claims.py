"""The claims of arXiv 2406.16007, asked of a model: effect, interval, control, verdict.

Effects of vectors are differences to the strongest of their controls, chosen on other prompts. What
the paper does not ask but a reader of it will (contradicting demonstrations, the 2 x 2 of local and
global vectors) is asked too, and marked as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from ..errors import ModelError, PromptError, TvInterpError
from ..prompts import Task, get_task, make_prompts
from ..scores import Scores
from ..scores.statistics import cluster_ids, jackknife
from .comparison import RANDOM, VectorReport, compare_vectors, random_answer_donors
from .convergence import ablate_demos, convergence_boundary, cross_vectors, measure_convergence
from .features import CONCRETE, N_BLOCKS, Geometry, measure_geometry
from .verdicts import (
    HURTS,
    LEAST,
    REDUNDANT,
    SAME,
    SEPARATE,
    Claim,
    Claims,
    Found,
    Side,
    Source,
    Verdict,
    judge,
    verdict_of,
)


def check_claims(
    model: Any,
    tasks: Sequence[str | Task],
    *,
    n_demos: int = 8,
    n_prompts: int = 200,
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
            rows += asked.geometry(measure_geometry(model, task.name, **settings))
        rows += asked.two_by_two(model, task, settings)
        if task.family == "knowledge":
            rows += asked.boundary(model, task, settings)
    texts = list(dict.fromkeys(row.text for row in rows))
    return Claims(tuple(sorted(rows, key=lambda row: texts.index(row.text))), settings)


GLOBAL = "a global vector works in zero-shot prompts"


class _Asked:
    """The claims on one task, from its comparison of vectors."""

    def __init__(self, report: VectorReport) -> None:
        self.report = report
        self.select = report.settings["select"]
        self.test = report.scores[f"test/{self.select}"]
        self.local_works: Verdict = "undecided"
        self.global_works: Verdict = "undecided"  # of one trial, as in the 2 x 2

    def claim(
        self,
        text: str,
        source: Source,
        least: float,
        control: str,
        found: Found,
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
            out.append(self._works(f"{GLOBAL}, one trial", "knowledge", single, "zero-shot"))
            self.global_works = out[-1].verdict
            out.append(self._works(f"{GLOBAL}, Trial Avg", "knowledge", averaged, "zero-shot"))
            out.append(
                self._against("Trial Avg helps the global vector", "knowledge", averaged, single)
            )
        found = self._against(
            "Pos Avg fails where all local vectors work", "all", "dummy: local",
            "dummy: local, Pos Avg",
        )  # fmt: skip
        out.append(self._needs_local(found))
        if {single, averaged} <= have:
            out.append(self._order(single, averaged, out))
        return out

    def _order(self, single: str, averaged: str, asked: Sequence[Claim]) -> Claim:
        """Compare the mean layers of both vectors, each weighted by its effect there."""
        dev = self.report.scores[f"dev/{self.select}"].mean().max("layer")
        best = max((single, averaged), key=lambda site: float(dev.sel(site=site)))
        data = self.test.data.astype(float)
        local, whole = (
            data.sel(site=site, drop=True) - data.sel(site=f"{into}: {RANDOM}", drop=True)
            for site, into in (("dummy: local", "dummy"), (best, "zero-shot"))
        )
        layers = data["layer"].values

        def apart(rows: np.ndarray) -> float:
            means = (curve.values[rows].mean(0).clip(min=0) for curve in (whole, local))
            late, early = ((layers @ m) / m.sum() if m.sum() else np.nan for m in means)
            return float(late - early)

        clusters = cluster_ids(self.test.clusters)
        n_blocks = min(N_BLOCKS, int(clusters.max()) + 1)
        every = np.ones(len(clusters), dtype=bool)
        blocks = [apart(clusters % n_blocks != block) for block in range(n_blocks)]
        value, lo, hi = jackknife(apart(every), blocks)
        if not np.isfinite(lo):  # no effect at any layer without some prompts
            value = np.nan
        found: Found = (value, lo, hi, verdict_of(lo, hi, 0), "")
        claim = self.claim(
            "local vectors act at lower layers than the global one (in layers)", "knowledge", 0,
            f"{RANDOM} at each layer", found,
        )  # fmt: skip
        if not any(c.verdict == "appears" for c in asked if c.text.startswith(GLOBAL)):
            return replace(claim, verdict="undecided", reason="no global vector")
        return self._needs_local(claim)

    def _at(self, site: str, layer: int) -> xr.DataArray:
        return self.test.data.sel(site=site, layer=layer, drop=True)

    def _gap(self, recipient: str) -> xr.DataArray:
        runs = self.report.runs[f"test/{self.select}"].data
        return runs.sel(site="few-shot", drop=True) - runs.sel(site=recipient, drop=True)

    def _works(self, text: str, source: Source, site: str, recipient: str) -> Claim:
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

    def _against(self, text: str, source: Source, site: str, other: str) -> Claim:
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
        """Ask whether one local vector does the work of all, late but while they still work."""
        found = measure_convergence(model, task, **settings)
        at = found.effect_ratio().sel(layer=found.last_working_layer)
        value, lo, hi = (float(at[name]) for name in ("value", "lo", "hi"))
        verdict = verdict_of(lo, hi, SAME)
        reason = "" if np.isfinite(value) else "no effect"
        claim = self.claim(
            "local vectors converge in later layers: one does the work of all", "knowledge", SAME,
            "dummies as they are, and all local vectors, at the last layer where these keep half "
            "of their effect", (value, lo, hi, verdict, reason),
        )  # fmt: skip
        return self._needs_local(claim)

    def ablations(self, model: Any, task: Task, settings: dict[str, Any]) -> list[Claim]:
        """Take away k of n answers, and as many connectives; none where nothing can be cut."""
        prompts = make_prompts(model, task, **settings)
        n = prompts.n_demos

        def lost(metric: str, at: str, k: int) -> Scores:
            """Measure what taking k positions away costs, ``[prompt]``."""
            data = scores[metric, at].data.isel(part=0, drop=True)
            cost = data.sel(demo=0, drop=True) - data.sel(demo=k, drop=True)
            return replace(scores[metric, at], data=cost)

        def apart(metric: str) -> Scores:
            """Subtract what taking all connectives costs from what taking all answers costs."""
            ours, theirs = (lost(metric, at, n) for at in ("answer", "is"))
            return replace(ours, data=ours.data - theirs.data)

        try:
            scores = {
                (metric, at): ablate_demos(
                    model, prompts, at=at, how=["knockout"], metric=metric, counts=counts
                )
                for metric, counts in (
                    (self.select, sorted({0, n // 2, n - 1, n})), ("label_rate", [0, n])
                )
                for at in ("answer", "is")
            }  # fmt: skip
        except ModelError:  # this model takes no edits of attention scores
            return []
        whole = lost(self.select, "answer", n).data
        specific = float(apart(self.select).ci("mean")["lo"]) > 0
        control = "as many connectives taken away"
        out = []
        asked: tuple[tuple[str, Source, int, float, Side], ...] = (
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

    def geometry(self, found: Geometry) -> list[Claim]:
        """Ask what the answers' states keep, and take the concrete feature out early and late."""
        abstract, concrete = found.settings["abstract"], found.settings["concrete"]
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
            out[1] = replace(out[1], verdict="undecided", reason="nothing to lose")

        peak = int(found.distance.sel(factor=concrete).values.argmax())

        def apart(table: xr.DataArray, factor: str = abstract, layer: int = last) -> float:
            at = table.sel(layer=layer)
            return float(at.sel(factor=factor) - at.sel(factor=f"{factor}, shuffled"))

        def kept(table: xr.DataArray) -> float:
            return apart(table, concrete) / apart(table, concrete, peak)

        text = "the concrete feature fades: separation in the last layer over its peak"
        out.append(self._by_blocks(text, SAME, f"{concrete}s shuffled", found, kept, "below"))
        text = "the label or relation stays separated up to the last layer"
        out.append(self._by_blocks(text, SEPARATE, f"{abstract}s shuffled", found, apart))
        if abstract == "label":

            def more(table: xr.DataArray) -> float:
                at = table.sel(layer=last)
                return float(at.sel(factor="label") - at.sel(factor="label, random answers"))

            text = "labels stay separated by more than their words"
            control = "labels of prompts with random answers"
            out.append(self._by_blocks(text, HURTS, control, found, more, source="ours"))
        return out

    def _by_blocks(
        self,
        text: str,
        least: float,
        control: str,
        found: Geometry,
        statistic: Callable[[xr.DataArray], float],
        side: Side = "above",
        source: Source = "categorization",
    ) -> Claim:
        value, lo, hi = found.interval(statistic)
        verdict = verdict_of(lo, hi, least, side)
        return self.claim(text, source, least, control, (value, lo, hi, verdict, ""), side)

    def two_by_two(self, model: Any, task: Task, settings: dict[str, Any]) -> list[Claim]:
        """Ask whether local vectors still add something where the global one stands already."""
        try:
            prompts = make_prompts(model, task, **settings)
            rows, random = random_answer_donors(prompts, settings["seed"])
            contrast = prompts.select(rows).dummies(seed=settings["seed"] + 1)
            if len(contrast) < len(rows):
                raise PromptError("not every prompt has a dummy")
            donors = contrast.clean.other_query(), random.other_query()
        except PromptError:  # no other query, or no dummies of equal length
            return []
        ours, theirs = (
            cross_vectors(
                model, contrast, metric=self.select, donors=each,
                local_layer=self.report.row("dummy: local").layer,
                global_layer=self.report.row("dummy: global, other query").layer,
            )
            for each in donors
        )  # fmt: skip
        # interaction minus that of the control: what neither changes cancels
        effect = ours.data.sel(site="interaction") - theirs.data.sel(site="interaction")
        found = judge(replace(ours, data=effect.drop_vars("site")), -HURTS, side="below")
        text = "the global vector stands in for local ones: both give less than their sum"
        control = "the global vector of donors with random answers"
        claim = self._needs_local(self.claim(text, "ours", -HURTS, control, found, "below"))
        if self.global_works != "appears":
            claim = replace(claim, verdict="undecided", reason="no global vector")
        return [claim]

    def boundary(self, model: Any, task: Task, settings: dict[str, Any]) -> list[Claim]:
        """Let demonstrations of a familiar relation contradict it."""
        n = settings["n_demos"]
        scores = convergence_boundary(
            model, make_prompts(model, task, **settings), counts=[0, n // 2, n],
            layer=self.report.row("dummy: local").layer, metric=self.select,
        )  # fmt: skip
        none = scores.data.sel(demo=0, site="none", drop=True)

        def share(site: str, k: int, least: float) -> Found:
            rise = scores.data.sel(site=site, drop=True) - none
            effect = replace(scores, data=rise.sel(demo=k, drop=True))
            return judge(effect, least, over=rise.sel(demo=0, drop=True))

        control = "dummies as they are"
        text = "a familiar relation survives where half of the demonstrations contradict it"
        out = [self.claim(text, "ours", REDUNDANT, control, share("few-shot", n // 2, REDUNDANT))]
        text = "contradicting demonstrations converge on the familiar relation (Pos Avg)"
        found = self.claim(text, "ours", SAME, control, share("Pos Avg", n, SAME))
        return [*out, self._needs_local(found)]
