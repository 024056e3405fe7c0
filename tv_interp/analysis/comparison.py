"""Local against global vectors, layer by layer, with what else could explain that they work.

Every vector goes into two kinds of recipients: **dummy** prompts (the same inputs, answers at
random) and **zero-shot** prompts (the query alone). Local vectors go to the dummies' answers, and
as Pos Avg to ``query_is`` where there are no answers; global vectors go to ``query_is``. Donors
have the recipient's own query, or another one: what works only with the own query carries that
query's answer. Trial Avg is averaged over the *other* half of the prompts, which shares no query
item with this one, so no recipient sees itself.

The best layer is chosen on one half (dev), and every number is reported on the other (test).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from ..display import Shown, wrapped
from ..errors import PromptError, TvInterpError
from ..files import make_directory, write_text
from ..interventions.recording import batches, check_memory, last_logits, record_run
from ..models.adapter import Adapter
from ..prompts import Contrast, Prompts, Sample, Task, get_task
from ..scores import Scores, get_metric
from ..scores.metrics import Targets
from ..scores.scores import save_groups
from .common import label_scores, provenance
from .find import split_prompts
from .vectors import Vectors, extract_vectors, inject_vectors

METRICS = ("accuracy", "choice", "label_rate")
RECIPIENTS = ("dummy", "zero-shot")
GROUPS = ("vector", "control", "probe")
"""A vector works only where it beats every control. A probe tells what is in a vector, and what it
means depends on the task: deranged answers still tell a relation whose answers tell it."""
RANDOM = "random-answer donors"
LEAST = 0.8
"""A control that fits a smaller share of the prompts is left out and noted."""


class Curve(NamedTuple):
    """What is put where.

    Attributes:
        recipient: ``"dummy"`` or ``"zero-shot"``.
        name: Which vectors.
        group: See `GROUPS`.
        vectors: The vectors, row by row with the recipients.
        at: Role in the recipients.
    """

    recipient: str
    name: str
    group: str
    vectors: Vectors
    at: str

    @property
    def site(self) -> str:
        """The name in scores."""
        return f"{self.recipient}: {self.name}"


@dataclass(frozen=True)
class CurveRow:
    """One curve at the layer that was best on dev, measured on test.

    Attributes:
        recipient: ``"dummy"`` or ``"zero-shot"``.
        name: Which vectors.
        group: See `GROUPS`.
        layer: Chosen on dev.
        value: Value of the choosing metric, with its 95 % interval ``lo`` to ``hi``.
        lo: Lower end.
        hi: Upper end.
        effect: Value minus that of the recipients as they are, ``effect_lo`` to ``effect_hi``.
        effect_lo: Lower end.
        effect_hi: Upper end.
        metrics: All metrics at that layer.
    """

    recipient: str
    name: str
    group: str
    layer: int
    value: float
    lo: float
    hi: float
    effect: float
    effect_lo: float
    effect_hi: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, eq=False, repr=False)
class VectorReport(Shown):
    """What `compare_vectors` measured.

    Attributes:
        scores: Values over ``(prompt, layer, site)`` by ``half/metric``; site is
            ``recipient: name``.
        runs: Values over ``(prompt, site)`` without injection by ``half/metric``: ``few-shot``,
            ``dummy`` and ``zero-shot``.
        rows: Each curve at its best layer.
        settings: Provenance: model, task, seeds, ``select`` (the choosing metric), chance levels.
        notes: What was left out, and why.
    """

    scores: Mapping[str, Scores]
    runs: Mapping[str, Scores]
    rows: tuple[CurveRow, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    def row(self, site: str) -> CurveRow:
        """Get a curve by ``recipient: name``.

        Raises:
            TvInterpError: if there is no such curve.
        """
        for row in self.rows:
            if f"{row.recipient}: {row.name}" == site:
                return row
        have = ", ".join(f"{row.recipient}: {row.name}" for row in self.rows)
        raise TvInterpError(f"no curve {site!r}: there are {have}")

    def at_best(self, site: str) -> np.ndarray:
        """Get the choosing metric of a curve at its best layer, ``[test prompt]``."""
        scores = self.scores[f"test/{self.settings['select']}"]
        return scores.data.sel(site=site, layer=self.row(site).layer).values.astype(float)

    def run(self, name: str, half: str = "test") -> np.ndarray:
        """Get the choosing metric of ``few-shot``, ``dummy`` or ``zero-shot``, ``[prompt]``."""
        scores = self.runs[f"{half}/{self.settings['select']}"]
        return scores.data.sel(site=name).values.astype(float)

    def controls(self, recipient: str) -> list[str]:
        """Name the controls of a kind of recipients as ``recipient: name``."""
        return [
            f"{row.recipient}: {row.name}"
            for row in self.rows
            if row.group == "control" and row.recipient == recipient
        ]

    def to_dict(self) -> dict[str, Any]:
        """Write as plain values; what ``vectors.json`` holds."""
        lines = {
            key: {
                str(s): float(v) for s, v in zip(r.data.site.values, r.mean().values, strict=True)
            }
            for key, r in self.runs.items()
        }
        return {
            "curves": [{**vars(row), "metrics": dict(row.metrics)} for row in self.rows],
            "lines": lines,
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``vectors.json`` and ``scores.nc``; the same seed gives the same bytes.

        Raises:
            FileError: if the directory cannot be written.
        """
        directory = make_directory(directory)
        write_text(directory / "vectors.json", json.dumps(self.to_dict(), indent=2) + "\n")
        groups = {name: scores._to_dataset() for name, scores in self.scores.items()}
        groups |= {f"{name}/runs": scores._to_dataset() for name, scores in self.runs.items()}
        save_groups(groups, directory / "scores.nc")

    def __str__(self) -> str:
        """A table at 80 columns."""
        return "\n".join(_table(self))


def compare_vectors(
    model: Any,
    task: str | Task,
    *,
    n_demos: int = 8,
    n_prompts: int = 200,
    seed: int = 0,
    template: str | None = None,
    progress: bool = False,
) -> VectorReport:
    """Sweep local and global vectors over layers, recipients and donors, with their controls.

    Controls, all at the same layers: vectors of the other roles of demonstrations; donors with
    random answers, with their answers deranged, with the same rule and other inputs, with the same
    inputs and another rule, with demonstrations of one class alone; the recipient's own state with
    noise as large as the exchange; and random vectors as long as the donor's.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or the name of a shipped one.
        n_demos: Demonstrations of donors and dummies.
        n_prompts: Prompts in each half, dev and test.
        seed: Decides prompts, halves, donors and noise.
        template: As in `make_prompts`.
        progress: Whether to show progress.

    Returns:
        Accuracy, choice and label rate by layer, with the best layer of each curve from dev. The
        choosing metric is ``choice`` for categorization, where random labels make an exact answer
        from a zero-shot prompt impossible, and ``accuracy`` for the rest.

    Raises:
        UnknownName: for an unknown task.
        PromptError: if the prompts cannot be built.
        ModelError: if the model cannot be measured exactly.
    """
    task = get_task(task)
    adapter = Adapter.of(model)
    select = "choice" if task.family == "categorization" else "accuracy"
    halves = split_prompts(
        model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template
    )
    notes: list[str] = []
    sides = [_Side(model, half, seed + 10 * i, notes) for i, half in enumerate(halves)]
    scores: dict[str, Scores] = {}
    runs: dict[str, Scores] = {}
    groups: dict[str, Curve] = {}
    for name, side, other in zip(("dev", "test"), sides, reversed(sides), strict=True):
        curves = [*side.vectors(other), *side.controls()]
        groups = {curve.site: curve for curve in curves}
        attrs = provenance(adapter) | side.contrast.provenance | {"half": name}
        recorded = {kind: record_run(adapter, p) for kind, p in side.recipients.items()}
        # what the prompts answer with nothing injected: each is run once for all metrics
        plain = [("few-shot", side.clean, last_logits(adapter, side.clean))]
        plain += [(kind, p, recorded[kind].logits) for kind, p in side.recipients.items()]
        metrics = METRICS if name == "test" else (select,)
        found = [
            inject_vectors(
                model, side.recipients[c.recipient], c.vectors, at=c.at, metric=metrics,
                run=recorded[c.recipient], progress=progress,
            )
            for c in curves
        ]  # fmt: skip
        for metric in metrics:
            key = f"{name}/{metric}"
            unit = get_metric(metric).unit
            about = attrs | {"metric": metric}
            scores[key] = label_scores(
                np.stack([each[metric].data.values for each in found], -1), ("layer", "site"),
                {"layer": np.arange(adapter.n_layers), "site": list(groups)},
                unit=unit, total=None, prompts=side.clean, attrs=about,
            )  # fmt: skip
            runs[key] = label_scores(
                np.stack([_values(p, logits, metric) for _, p, logits in plain], -1), ("site",),
                {"site": [kind for kind, *_ in plain]}, unit=unit, total=None, prompts=side.clean,
                attrs=about,
            )  # fmt: skip
    settings = provenance(adapter) | sides[1].contrast.provenance
    settings |= {
        "n_prompts": {"dev": len(sides[0].clean), "test": len(sides[1].clean)},
        "seed": seed,
        "select": select,
        "chance": {m: get_metric(m).chance(adapter.model.cfg.d_vocab) for m in METRICS},
    }
    rows = [_row(curve, scores, runs, select, seed) for curve in groups.values()]
    rows.sort(key=lambda r: (r.recipient, GROUPS.index(r.group)))
    return VectorReport(scores, runs, tuple(rows), settings, tuple(dict.fromkeys(notes)))


def _values(prompts: Prompts, logits: torch.Tensor, metric: str) -> np.ndarray:
    readout = get_metric(metric).readout(Targets.of(prompts))
    return readout(logits, torch.arange(len(prompts))).float().numpy()


def _row(
    curve: Curve, scores: Mapping[str, Scores], runs: Mapping[str, Scores], select: str, seed: int
) -> CurveRow:
    """Choose a curve's layer on dev and measure it on test."""
    dev = scores[f"dev/{select}"].mean().sel(site=curve.site).values
    layer = int(dev.argmax())
    test = scores[f"test/{select}"]
    cell = test.data.sel(site=curve.site, layer=layer, drop=True)
    base = runs[f"test/{select}"].data.sel(site=curve.recipient, drop=True)
    value, effect = (
        replace(test, data=data).ci("mean", seed=seed).clip(low, 1)
        for data, low in ((cell, 0), (cell - base, -1))
    )
    return CurveRow(
        curve.recipient,
        curve.name,
        curve.group,
        layer,
        value=float(value["value"]),
        lo=float(value["lo"]),
        hi=float(value["hi"]),
        effect=float(effect["value"]),
        effect_lo=float(effect["lo"]),
        effect_hi=float(effect["hi"]),
        metrics={
            m: float(scores[f"test/{m}"].mean().sel(site=curve.site, layer=layer)) for m in METRICS
        },
    )


# -------------------------------------------------------------------------------- what is put in


class _Side:
    """One half of the prompts: recipients, donors, and the vectors of both."""

    def __init__(self, model: Any, prompts: Prompts, seed: int, notes: list[str]) -> None:
        self.model, self.seed, self.notes = model, seed, notes
        contrast = prompts.dummies(seed=seed + 1)
        made, kept = {}, set(range(len(contrast)))
        for name, make in _DONORS.items():
            try:
                rows, donors = make(contrast.clean, seed)
            except PromptError as reason:
                notes.append(f"no control {name!r}: {reason}")
                continue
            if len(rows) < LEAST * len(contrast):
                notes.append(f"no control {name!r}: it fits {len(rows)} of {len(contrast)} prompts")
                continue
            made[name] = dict(zip(rows, range(len(rows)), strict=True)), donors
            kept &= set(rows)
        rows = sorted(kept)
        self.contrast: Contrast = contrast.select(rows)
        self.clean, self.dummy = self.contrast.clean, self.contrast.corrupted
        self.recipients = {"dummy": self.dummy, "zero-shot": self.clean.zero_shot()}
        self.donors = {
            name: donors.select([place[row] for row in rows])
            for name, (place, donors) in made.items()
        }
        try:
            self.other_query: Prompts | None = self.clean.other_query(seed=seed + 2)
        except PromptError as reason:
            self.other_query = None
            notes.append(f"no donors with another query: {reason}")
        self.local = extract_vectors(model, self.clean)
        self.own = extract_vectors(model, self.clean, at="query_is")
        self.other = (
            extract_vectors(model, self.other_query, at="query_is") if self.other_query else None
        )

    def vectors(self, elsewhere: _Side) -> list[Curve]:
        """List the vectors; Trial Avg comes from the other half."""

        def curve(recipient: str, name: str, vectors: Vectors, at: str) -> Curve:
            return Curve(recipient, name, "vector", vectors, at)

        mean = self.local.pos_avg()
        out = [curve("dummy", "local", self.local, "answer")]
        if self.other_query:
            theirs = extract_vectors(self.model, self.other_query)
            out.append(curve("dummy", "local, other query", theirs, "answer"))
        out.append(curve("dummy", "local, Pos Avg", mean, "answer"))
        if self.clean.task.family == "categorization":
            by_class = self.local.pos_avg("class")
            out.append(curve("dummy", "local, Pos Avg by class", by_class, "answer"))
        trials = elsewhere.local.trial_avg()
        out.append(curve("dummy", "local, Trial Avg", trials, "answer"))
        out.append(curve("zero-shot", "local, Pos Avg", mean, "query_is"))
        if self.other_query:
            out.append(
                curve("zero-shot", "local, Pos Avg, other query", theirs.pos_avg(), "query_is")
            )
        out.append(curve("zero-shot", "local, Trial Avg", trials.pos_avg(), "query_is"))
        for recipient in RECIPIENTS:
            out.append(curve(recipient, "global", self.own, "query_is"))
            if self.other is not None and elsewhere.other is not None:
                out.append(curve(recipient, "global, other query", self.other, "query_is"))
                trials = elsewhere.other.trial_avg()
                out.append(curve(recipient, "global, Trial Avg", trials, "query_is"))
        return out

    def controls(self) -> list[Curve]:
        """List the controls and probes."""

        def curve(recipient: str, name: str, vectors: Vectors, at: str) -> Curve:
            group = "control" if name in _CONTROLS else "probe"
            return Curve(recipient, name, group, vectors, at)

        out = []
        for role in ("x", "is", "end"):
            try:
                vectors = extract_vectors(self.model, self.clean, at=role)
            except PromptError:  # no separator in this template
                continue
            out.append(curve("dummy", f"at {role}", vectors, role))
        for name, donors in self.donors.items():
            out.append(curve("dummy", name, extract_vectors(self.model, donors), "answer"))
            if name == RANDOM:
                asked = donors.other_query(seed=self.seed + 2) if self.other_query else donors
                theirs = extract_vectors(self.model, asked, at="query_is")
                out.append(curve("zero-shot", name, theirs, "query_is"))
        for recipient, at in (("dummy", "answer"), ("zero-shot", "query_is")):
            donor = self.local if at == "answer" else self.other or self.own
            base = extract_vectors(self.model, self.recipients[recipient], at=at)
            noise, random = self._noise(donor.data, base.data)
            out.append(curve(recipient, "noise", replace(donor, data=noise), at))
            out.append(curve(recipient, "random vectors", replace(donor, data=random), at))
        return out

    def _noise(self, donor: xr.DataArray, base: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
        """Make noise as long as the exchange, and random vectors as long as the donor's."""
        rng = np.random.default_rng([self.seed, 3])
        out = []
        for start, change in ((base.values, donor.values - base.values), (0, donor.values)):
            way = rng.standard_normal(donor.shape)
            way /= np.linalg.norm(way, axis=-1, keepdims=True)
            size = np.linalg.norm(change, axis=-1, keepdims=True)
            out.append(donor.copy(data=(start + way * size).astype(donor.dtype)))
        return out[0], out[1]


def _twins(kind: str) -> Callable[[Prompts, int], tuple[list[int], Prompts]]:
    """Make donors by a corruption, and say which rows they are."""

    def make(clean: Prompts, seed: int) -> tuple[list[int], Prompts]:
        if kind == "dummies":
            contrast = clean.dummies(seed=seed + 4)
        elif kind == "rule":
            categorization = clean.task.family == "categorization"
            contrast = clean.corrupt("labels" if categorization else "task", seed=seed + 4)
        else:
            contrast = clean.corrupt(kind, seed=seed + 4)
        rows, left = [], iter(contrast.clean.texts)
        wanted = next(left, None)
        for row, text in enumerate(clean.texts):  # a corruption drops rows and keeps their order
            if text == wanted:
                rows.append(row)
                wanted = next(left, None)
        # the donors' own rule goes with the words, so that they can be asked something else
        samples = [
            _with_rule_of(sample, clean.samples[row])
            for row, sample in zip(rows, contrast.corrupted.samples, strict=True)
        ]
        return rows, contrast.corrupted.with_samples(samples)

    return make


def _with_rule_of(words: Any, sample: Any) -> Any:
    """Give words a sample's rule, where it has one."""
    if not hasattr(sample, "rule"):
        return words
    fields = dict(zip(sample._fields, words, strict=True))
    return type(sample)(**fields, rule=sample.rule, rule_name=sample.rule_name)


def other_inputs(clean: Prompts, seed: int) -> tuple[list[int], Prompts]:
    """Make donors with the same rule and other inputs; categorization keeps the labels' places."""
    return _redrawn(clean, seed, lambda sample, rng: [y for _, y in sample.demos])


def _one_class(clean: Prompts, seed: int) -> tuple[list[int], Prompts]:
    """Make donors whose demonstrations all have the same label: its identity without the rule."""
    if clean.task.family != "categorization":
        raise PromptError("only categorization has classes")

    def labels(sample: Any, rng: np.random.Generator) -> list[str]:
        chosen = (sample.answer, sample.foil)[int(rng.integers(2))]
        return [chosen] * len(sample.demos)

    return _redrawn(clean, seed, labels)


def _redrawn(
    clean: Prompts, seed: int, labels: Callable[[Any, np.random.Generator], Sequence[str]]
) -> tuple[list[int], Prompts]:
    """Draw new inputs for the demonstrations by each prompt's own rule."""
    samples: list[Sample] = []
    rows = []
    fixed = clean.task.family == "categorization"
    for row, sample in enumerate(clean.samples):
        rng = np.random.default_rng([seed, row, 5])
        rule = getattr(sample, "rule", None)
        if rule is None:
            raise PromptError(f"the samples of task {clean.task.name!r} carry no rule")
        waiting: list[tuple[int, str]] = list(enumerate(labels(sample, rng)))
        demos: dict[int, tuple[str, str]] = {}
        for x in clean.task.other_queries(rng, sample):
            fits = next((w for w in waiting if not fixed or rule(x) == w[1]), None)
            if fits is not None:
                waiting.remove(fits)
                demos[fits[0]] = (x, rule(x))
            if not waiting:
                break
        if not waiting:
            new = sample._replace(demos=[demos[i] for i in range(len(demos))])
            samples.append(_with_rule_of(new, sample))
            rows.append(row)
    if not rows:
        raise PromptError("too few other inputs")
    return rows, clean.with_samples(samples)


random_answer_donors = _twins("dummies")
"""Rows of clean prompts, and their twins with random answers, which can be asked something else."""
_CONTROLS = (RANDOM, "noise", "random vectors")
_DONORS = {
    RANDOM: random_answer_donors,
    "shuffled donors": _twins("answers"),
    "same x, other rule": _twins("rule"),
    "same rule, other x": other_inputs,
    "one-class donors": _one_class,
}


# ------------------------------------------------------------------------------------ by distance


def attention_by_distance(model: Any, prompts: Prompts) -> Scores:
    """Ask whether ``query_is`` attends to those answers whose input is near the query.

    A reader that compares exemplars attends by distance in input, one that applies a rule need not.
    Distance is that of the numbers in the input (city block), or of the inputs' lengths in words.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: Clean prompts with at least three demonstrations.

    Returns:
        Spearman's rank correlation, within each prompt, of minus the distance and the attention
        from ``query_is`` to the answer, over ``(prompt, layer, head)``: positive, near inputs get
        more; 0 where a prompt's distances are all equal.

    Raises:
        PromptError: if there are fewer than three demonstrations.
        ModelError: if the model cannot be measured exactly.
    """
    from scipy.stats import rankdata

    if prompts.n_demos < 3:
        raise PromptError(f"expected three demonstrations or more, got {prompts.n_demos}")
    adapter = Adapter.of(model)
    near = np.array(
        [[-_distance(s.query, x) for x, _ in s.demos] for s in prompts.samples], dtype=float
    )
    positions = prompts.positions("answer")
    shape = (len(prompts), adapter.n_layers, adapter.n_heads, prompts.n_demos)
    attention = np.zeros(shape)
    for rows, tokens in batches(adapter, prompts, check_memory(None)):
        _, seen = adapter.read(tokens, [("pattern", la) for la in range(adapter.n_layers)])
        for layer in range(adapter.n_layers):
            last = seen["pattern", layer][:, :, -1].float().cpu()
            where = positions[rows][:, None].expand(-1, adapter.n_heads, -1)
            attention[rows, layer] = last.gather(-1, where).numpy()
    ours, theirs = rankdata(near, axis=-1)[:, None, None], rankdata(attention, axis=-1)
    ours, theirs = (r - r.mean(-1, keepdims=True) for r in (ours, theirs))
    size = np.sqrt((ours**2).sum(-1) * (theirs**2).sum(-1))
    value = np.divide((ours * theirs).sum(-1), size, out=np.zeros(shape[:3]), where=size > 0)
    attrs = provenance(adapter) | prompts.provenance | {"at": "query_is"}
    coords = {"layer": np.arange(adapter.n_layers), "head": np.arange(adapter.n_heads)}
    return label_scores(
        value, ("layer", "head"), coords, unit="rank correlation", total=None, prompts=prompts,
        attrs=attrs,
    )  # fmt: skip


def _distance(a: str, b: str) -> float:
    ours, theirs = a.split(), b.split()
    if len(ours) == len(theirs) and all(w.lstrip("-").isdigit() for w in ours + theirs):
        return float(sum(abs(int(p) - int(q)) for p, q in zip(ours, theirs, strict=True)))
    return float(abs(len(ours) - len(theirs)))


# --------------------------------------------------------------------------------------- as text


def _table(report: VectorReport) -> list[str]:
    """Lay the report out at 80 columns."""
    s = report.settings
    n = s["n_prompts"]
    test = {m: report.runs[f"test/{m}"].mean() for m in METRICS}
    lines = [
        f"{s['task']} on {s['model']}: {s['n_demos']} demonstrations, {n['dev']} prompts dev, "
        f"{n['test']} test",
        f"Layer chosen on dev; all else on test, {s['select']} with its 95 % interval.",
        "",
        f"{'NOTHING injected':<38}{'accur.':>8}{'choice':>8}{'label':>8}",
    ]
    for name in ("few-shot", *RECIPIENTS):
        values = [float(test[m].sel(site=name)) for m in METRICS]
        lines.append(f"  {name:<36}" + "".join(f"{v:>8.2f}" for v in values))
    for (recipient, group), rows in itertools.groupby(
        report.rows, key=lambda r: (r.recipient, r.group)
    ):
        title = f"{group.upper()}S into {recipient}"
        lines += [
            "",
            f"{title:<38}{'accur.':>8}{'choice':>8}{'label':>8}{'layer':>6}  95 %",
        ]
        for r in rows:
            values = "".join(f"{r.metrics[m]:>8.2f}" for m in METRICS)
            lines.append(f"  {r.name:<36}{values}{r.layer:>5}  [{r.lo:.2f},{r.hi:.2f}]")
    if report.notes:
        lines += ["", *(f"Note: {note}" for note in report.notes)]
    return wrapped(lines)
