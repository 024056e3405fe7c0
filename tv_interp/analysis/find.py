"""The whole question in one call: which heads write, which read, and is it enough.

1. Draw prompts and split them by query item (and by rule, where rules differ) into selection and
   test. Heads are chosen on selection; every number that is reported comes from test.
2. For at least two corruptions and both directions, exchange every head at the answers and at
   ``query_is``. One FDR family: heads x roles x corruptions x directions. A head is a candidate
   where its effect is significant and at least ``min_recovered`` of the total.
3. Split the candidates' effects by source. At answers: a **writer** carries something from outside
   of the answer word it sits on, a **copier** does not. At ``query_is``: a **reader** has an effect
   from the keys and values at answers, a **relay** has not. The sign must be the same on test.
4. Paths: a **local-vector writer** has a significant path into the found readers, through the
   residual stream and the MLPs at the answers.
5. Joint effects of all writers and of all readers, against as many layer-matched control heads.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ..display import Shown, Table, wrapped
from ..errors import PromptError, TvInterpError, unknown
from ..files import make_directory, write_text
from ..interventions.recording import Recorded, record
from ..interventions.sites import Head, Site
from ..models.adapter import Adapter
from ..prompts import Contrast, Prompts, Task, get_task, make_prompts
from ..prompts.corruptions import CORRUPTIONS, default_corruptions
from ..scores import Scores
from ..scores.metrics import METRICS, Targets, get_metric
from ..scores.scores import save_groups
from ..scores.statistics import adjust
from .common import DIRECTIONS, Direction, all_heads, provenance
from .heads import patch_heads, patch_sources, patch_together
from .paths import patch_paths

Label = Literal["writer", "copier", "reader", "relay"]
ROLES = {"writer": "answer", "copier": "answer", "reader": "query_is", "relay": "query_is"}
N_CONTROLS = 20


@dataclass(frozen=True)
class Effect:
    """One head's, or one set's, effect on the test split.

    Attributes:
        corruption: What was corrupted.
        direction: ``"denoise"`` or ``"noise"``.
        recovered: Mean effect over mean total.
        lo: Lower end of the 95 % interval.
        hi: Upper end.
        significant: Whether it was found on the selection split; None for sets.
    """

    corruption: str
    direction: Direction
    recovered: float
    lo: float
    hi: float
    significant: bool | None = None


@dataclass(frozen=True)
class FoundHead:
    """A head with a label, and the numbers behind it.

    Attributes:
        site: Head and role.
        label: ``writer``, ``copier``, ``reader`` or ``relay``.
        effects: By corruption and direction, on the test split.
        sources: Share of the total by role of what it attends to (part ``both``, on the test
            split), for the corruption and direction of the largest effect that was found.
        local_vector: For writers: whether a path into a found reader is significant; None where
            it was not asked.
    """

    site: Site
    label: Label
    effects: tuple[Effect, ...]
    sources: Mapping[str, float] = field(default_factory=dict)
    local_vector: bool | None = None

    @property
    def best(self) -> Effect:
        """The largest absolute effect among those found on the selection split."""
        return max((e for e in self.effects if e.significant), key=lambda e: abs(e.recovered))

    @property
    def verdict(self) -> str:
        """Whether the head is sufficient (denoising), necessary (noising) or both."""
        found = {e.direction for e in self.effects if e.significant}
        return {
            frozenset({"denoise"}): "sufficient",
            frozenset({"noise"}): "necessary",
        }.get(frozenset(found), "both")

    def to_dict(self) -> dict[str, Any]:
        """Write as plain values."""
        return {
            "layer": self.site.layer,
            "head": self.site.head,
            "site": str(self.site),
            "label": self.label,
            "verdict": self.verdict,
            "local_vector": self.local_vector,
            "effects": [vars(e) for e in self.effects],
            "sources": dict(self.sources),
        }


@dataclass(frozen=True)
class JointEffect:
    """All heads of a label exchanged together, and as many control heads.

    Attributes:
        label: ``writer``, ``reader``, or ``all heads at answer``, ``all heads at query_is``.
        n_heads: How many.
        effect: Their joint effect on the test split.
        control: Effects of layer-matched random sets of other heads, as shares of the total.
        pvalue: Share of sets, the found one included, with an effect at least as large.
    """

    label: str
    n_heads: int
    effect: Effect
    control: tuple[float, ...] = ()
    pvalue: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class HeadReport(Shown):
    """What `find_heads` found.

    Attributes:
        writers: Heads that write at answers what they read elsewhere.
        copiers: Heads that matter at answers but pass on only the answer's own word.
        readers: Heads that read from answers at ``query_is``.
        relays: Other heads that matter at ``query_is``.
        joint: Joint effects and controls.
        paths: Path effects of writers into readers on the test split; None without both.
        scores: Effects of every head on the test split, by ``corruption/direction/role``.
        accuracy: Metrics of each corruption's clean and corrupted run on the test split.
        prompts: The test prompts.
        settings: Provenance: model, task, seeds, thresholds, as plain values.
        notes: What a reader must know: corruptions without effect, too few items, caps.
    """

    writers: tuple[FoundHead, ...]
    copiers: tuple[FoundHead, ...]
    readers: tuple[FoundHead, ...]
    relays: tuple[FoundHead, ...]
    joint: tuple[JointEffect, ...]
    paths: Scores | None
    scores: Mapping[str, Scores]
    accuracy: Mapping[str, Mapping[str, float]]
    prompts: Prompts
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    model: Any = field(repr=False, default=None)

    @property
    def found(self) -> tuple[FoundHead, ...]:
        """All labelled heads."""
        return self.writers + self.copiers + self.readers + self.relays

    @property
    def clean_accuracy(self) -> float:
        """Exact top-1 accuracy of the clean run on the test split."""
        return next(iter(self.accuracy.values()))["accuracy"]

    def to_dict(self) -> dict[str, Any]:
        """Write as plain values; what ``heads.json`` holds."""
        groups = {name: getattr(self, name) for name in ("writers", "copiers", "readers", "relays")}
        return {
            **{name: [head.to_dict() for head in heads] for name, heads in groups.items()},
            "joint": [
                {**vars(j), "effect": vars(j.effect), "control": list(j.control)}
                for j in self.joint
            ],
            "accuracy": {k: dict(v) for k, v in self.accuracy.items()},
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }

    def to_pandas(self) -> Any:
        """Write one row for each head, corruption and direction."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"label": h.label, "layer": h.site.layer, "head": h.site.head, **vars(e)}
                for h in self.found
                for e in h.effects
            ]
        )

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``heads.json`` and ``scores.nc``; the same seed gives the same bytes.

        Raises:
            FileError: if the directory cannot be written.
        """
        directory = make_directory(directory)
        write_text(directory / "heads.json", json.dumps(self.to_dict(), indent=2) + "\n")
        groups = {name: scores._to_dataset() for name, scores in self.scores.items()}
        if self.paths is not None:
            groups["paths"] = self.paths._to_dataset()
        save_groups(groups, directory / "scores.nc")

    def _blocks(self) -> Iterator[str | Table]:
        yield "\n".join(_heading(self))
        rows = []
        for head in self.found:
            name = f"L{head.site.layer}H{head.site.head}"
            by = {(e.corruption, e.direction): e for e in head.effects}
            for kind in dict.fromkeys(e.corruption for e in head.effects):
                shares = [_share(by[kind, d]) for d in DIRECTIONS]
                rows.append((name, head.label, kind, *shares, head.verdict, _reads(head)))
        names = ("head", "label", "corruption", *DIRECTIONS, "verdict", "by source")
        yield Table(names, rows) if rows else "No head was found."
        yield from (f"Note: {note}" for note in self.notes)

    def __str__(self) -> str:
        """A table at 80 columns."""
        return "\n".join(_table(self))


def find_heads(
    model: Any,
    task: str | Task,
    *,
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    corruptions: Sequence[str] | None = None,
    template: str | None = None,
    metric: str = "logit_diff",
    fdr: float = 0.05,
    min_recovered: float = 0.02,
    max_paths: int = 6,
    progress: bool = False,
) -> HeadReport:
    """Find the heads that write at demonstration answers and those that read them at ``query_is``.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or the name of a shipped one.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts in each of the two splits.
        seed: Decides prompts, split, corruptions and resamples.
        corruptions: At least two; None for the task family's defaults, without those that fit no
            prompt (which a note says).
        template: As in `make_prompts`.
        metric: Name of a metric; one that has a total.
        fdr: False discovery rate over heads x roles x corruptions x directions.
        min_recovered: Least absolute share of the total that counts.
        max_paths: Paths are measured between at most so many writers and readers, the strongest.
        progress: Whether to show progress.

    Returns:
        The labelled heads with intervals from prompts that did not choose them.

    Raises:
        UnknownName: for an unknown task, corruption or metric.
        PromptError: if prompts cannot be built, or a corruption does not fit the task.
        TvInterpError: if fewer than two corruptions are given.
    """
    task = get_task(task)
    metric = get_metric(metric).name
    kinds = tuple(default_corruptions(task) if corruptions is None else corruptions)
    for kind in kinds:
        if kind not in CORRUPTIONS:
            raise unknown("corruption", kind, CORRUPTIONS)
    if len(set(kinds)) < 2:
        raise TvInterpError(
            f"expected at least two corruptions, got {list(kinds)}: one alone hides heads; add "
            "another of " + ", ".join(CORRUPTIONS)
        )
    adapter = Adapter.of(model)
    halves = split_prompts(
        model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template
    )
    contrasts, notes = _corrupted(halves, kinds, seed, all_fit=corruptions is not None)
    kinds = tuple(dict.fromkeys(kind for kind, _ in contrasts))
    search = _Search(model, contrasts, seed, metric, fdr, min_recovered, progress, notes)
    labels = search.label()
    found = {
        at: [h for h, label in labels.items() if ROLES[label[0]] == at] for at in ROLES.values()
    }
    writers = search.strongest([h for h, la in labels.items() if la[0] == "writer"], max_paths)
    readers = search.strongest([h for h, la in labels.items() if la[0] == "reader"], max_paths)
    paths, local = search.paths(writers, readers)
    sources = search.sources(labels)
    groups: dict[str, list[FoundHead]] = {name: [] for name in ROLES}
    for (at, head), (label, effects) in labels.items():
        site = Site(*head, "z", at)
        groups[label].append(
            FoundHead(site, label, effects, sources.get((at, head), {}), local.get(head))
        )
    for heads in groups.values():
        heads.sort(key=lambda h: (-abs(h.best.recovered), h.site))
    joint = search.joint(groups, found)
    settings = provenance(adapter) | {
        **halves[1].provenance,
        "corruptions": list(kinds),
        "metric": metric,
        "n_prompts": n_prompts,
        "n_items": {"selection": len(set(halves[0].query)), "test": len(set(halves[1].query))},
        "fdr": fdr,
        "fdr_family": f"{len(all_heads(adapter))} heads x 2 roles x {len(search.visible)} "
        "corruptions x 2 directions",
        "min_recovered": min_recovered,
        "max_paths": max_paths,
        "paths_through": "mlp",
    }
    prewired = model.tokenizer.init_kwargs.get("tv_prewired") or {}
    if prewired:
        settings["prewired"] = prewired
        heads = ", ".join(f"{name} ({offset} back)" for name, offset in prewired.items())
        search.notes.append(
            f"training started these heads as previous-token heads: {heads}; what is found there "
            "may be what was put there"
        )
    return HeadReport(
        *(tuple(groups[name]) for name in ("writer", "copier", "reader", "relay")),
        joint=tuple(joint),
        paths=paths,
        scores=search.test_scores(),
        accuracy=search.accuracy(),
        prompts=halves[1],
        settings=settings,
        notes=tuple(search.notes),
        model=model,
    )


def split_prompts(
    model: Any,
    task: Task,
    *,
    n_demos: int,
    n_prompts: int,
    seed: int,
    template: str | None = None,
) -> tuple[Prompts, Prompts]:
    """Draw prompts in two halves that share no query item, and no rule where rules differ.

    Raises:
        PromptError: if a half has fewer than 4 prompts.
    """
    probe = [task.sample(np.random.default_rng([seed, i]), n_demos) for i in range(16)]
    ruled = len({getattr(s, "rule_name", "") for s in probe}) > 1
    drawn = make_prompts(
        model,
        task,
        n_demos=n_demos,
        n_prompts=int(n_prompts * (5 if ruled else 2.5)),
        seed=seed,
        template=template,
    )
    rng = np.random.default_rng([seed, 1])
    sides = [_halve(drawn.query, rng)]
    if ruled:
        sides.append(_halve([s.rule_name for s in drawn.samples], rng))  # type: ignore[attr-defined]
    halves = []
    for half in (0, 1):
        rows = [i for i in range(len(drawn)) if all(side[i] == half for side in sides)]
        if len(rows) < 4:
            raise PromptError(
                f"task {task.name!r} has too few query items to split into selection and test "
                f"({len(set(drawn.query))}): ask for more prompts or add pairs"
            )
        halves.append(drawn.select(rows[:n_prompts]))
    return halves[0], halves[1]


def _halve(labels: Sequence[str], rng: np.random.Generator) -> list[int]:
    """Give each label a side so that both sides have about as many prompts."""
    counts: dict[str, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    names = list(counts)
    load, side = [0, 0], {}
    for i in rng.permutation(len(names)):
        lighter = int(load[1] < load[0])
        side[names[i]] = lighter
        load[lighter] += counts[names[i]]
    return [side[label] for label in labels]


def _corrupted(
    halves: Sequence[Prompts], kinds: Sequence[str], seed: int, *, all_fit: bool
) -> tuple[dict[tuple[str, int], Contrast], list[str]]:
    """Corrupt both halves in every way, by kind and half.

    Where not all must fit, those that fit none of the prompts are left out, with a note on each;
    two must remain.
    """
    contrasts: dict[tuple[str, int], Contrast] = {}
    notes: list[str] = []
    least = len(kinds) if all_fit else 2
    for kind in kinds:
        try:
            made = {(kind, i): h.corrupt(kind, seed=seed + 1 + i) for i, h in enumerate(halves)}
        except PromptError as error:
            if len(kinds) - len(notes) <= least:
                raise
            notes.append(f"left out: {error}")
        else:
            contrasts |= made
    return contrasts, notes


class _Search:
    """The state of one search: two halves, their recorded runs, and what was measured on them."""

    def __init__(
        self,
        model: Any,
        contrasts: Mapping[tuple[str, int], Contrast],
        seed: int,
        metric: str,
        fdr: float,
        min_recovered: float,
        progress: bool,
        notes: Iterable[str],
    ) -> None:
        self.model, self.seed, self.metric = model, seed, metric
        self.fdr, self.min_recovered, self.progress = fdr, min_recovered, progress
        self.notes = list(notes)
        self._intervals: dict[tuple[str, Direction, str], Any] = {}
        self.contrasts = contrasts
        self.recorded: dict[tuple[str, int], Recorded] = {}
        self.effects: dict[tuple[str, int, Direction, str], Scores] = {}
        for (kind, half), contrast in contrasts.items():
            self.recorded[kind, half] = record(model, contrast)
            for direction, at in itertools.product(DIRECTIONS, ("answer", "query_is")):
                self.effects[kind, half, direction, at] = patch_heads(
                    model, contrast, at=at, direction=direction, **self._shared(kind, half)
                )
        kinds = dict.fromkeys(kind for kind, _ in contrasts)
        self.visible = [kind for kind in kinds if self._clear(kind)]

    def _shared(self, kind: str, half: int) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "recorded": self.recorded[kind, half],
            "progress": self.progress,
        }

    def _clear(self, kind: str) -> bool:
        scores = [self.effects[kind, half, "denoise", "answer"] for half in (0, 1)]
        if all(s.total_is_clear(seed=self.seed) for s in scores):
            return True
        mean = float(scores[1].total.mean())  # type: ignore[union-attr]
        self.notes.append(
            f"corruption {kind!r} makes no measurable difference (mean total {mean:.3g} "
            f"{scores[1].unit}, its interval contains 0): nothing is concluded from it"
        )
        return False

    def label(self) -> dict[tuple[str, Head], tuple[Label, tuple[Effect, ...]]]:
        """Label the heads at each role."""
        if not self.visible:
            return {}
        cells = {
            (kind, direction, at): self.effects[kind, 0, direction, at]
            for kind in self.visible
            for direction in DIRECTIONS
            for at in ("answer", "query_is")
        }
        candidate = self._significant(cells)
        labels: dict[tuple[str, Head], tuple[Label, tuple[Effect, ...]]] = {}
        pairs: tuple[tuple[str, Label, Label], ...] = (
            ("answer", "writer", "copier"),
            ("query_is", "reader", "relay"),
        )
        for at, inside, outside in pairs:
            chosen = {key: np.argwhere(found) for key, found in candidate.items() if key[2] == at}
            confirmed = self._confirm(at, chosen)
            for head in sorted({(int(a), int(b)) for hits in chosen.values() for a, b in hits}):
                effects = tuple(
                    self._test_effect(
                        kind, direction, at, head, candidate[kind, direction, at][head]
                    )
                    for kind in self.visible
                    for direction in DIRECTIONS
                )
                if self._same_sign(effects, at, head):
                    labels[at, head] = (inside if head in confirmed else outside, effects)
        return labels

    def _significant(self, cells: Mapping[Any, Scores]) -> dict[Any, np.ndarray]:
        """Mark cells of several scores as one FDR family, with the least effect."""
        size = sum(s._cells().shape[1] for s in cells.values())
        if not size:
            return {}
        smallest = self.fdr / size
        pvalues = {
            key: s.pvalues(seed=self.seed, smallest=smallest).values for key, s in cells.items()
        }
        adjusted = adjust(np.concatenate([p.ravel() for p in pvalues.values()]))
        out, start, large = {}, 0, 0
        for key, p in pvalues.items():
            share = abs(cells[key].recovered().values) >= self.min_recovered
            large += int(share.sum())
            out[key] = share & (adjusted[start : start + p.size].reshape(p.shape) <= self.fdr)
            start += p.size
        items = min(len(set(s.clusters)) for s in cells.values())
        reachable, needed = 2.0 ** (1 - items), self.fdr * max(1, large) / size
        if reachable > needed / 4:
            note = (
                f"only {items} query items in the selection split: no p-value below "
                f"{reachable:.2g} is possible and about {needed:.2g} is needed, so real heads are "
                "missed; use a task with more inputs"
            )
            if note not in self.notes:
                self.notes.append(note)
        return out

    def _confirm(self, at: str, chosen: Mapping[Any, np.ndarray]) -> set[Head]:
        """Find the candidates that carry what they read elsewhere, or that read from answers."""
        role, part = ("carried", "both") if at == "answer" else ("answer", "kv")
        cells: dict[Any, Scores] = {}
        for (kind, direction, _), hits in chosen.items():
            if len(hits):
                cells[kind, direction] = patch_sources(
                    self.model,
                    self.contrasts[kind, 0],
                    at=at,
                    heads=[(int(a), int(b)) for a, b in hits],
                    roles=[role],
                    parts=[part],  # type: ignore[list-item]
                    direction=direction,
                    **self._shared(kind, 0),
                )
        found = self._significant(cells)
        out: set[Head] = set()
        for key, scores in cells.items():
            whole = self.effects[key[0], 0, key[1], at].mean()
            for i, name in enumerate(scores.data.site.values):
                head = Site.parse(str(name)).at
                part_mean = float(scores.mean().values[0, 0, i])
                if found[key][0, 0, i] and part_mean * float(whole[head]) > 0:
                    out.add(head)
        return out

    def _test_effect(
        self, kind: str, direction: Direction, at: str, head: Head, found: bool
    ) -> Effect:
        ci = self._interval(kind, direction, at)
        value, lo, hi = (float(ci[k].values[head]) for k in ("value", "lo", "hi"))
        return Effect(kind, direction, value, lo, hi, bool(found))

    def _interval(self, kind: str, direction: Direction, at: str) -> Any:
        key = (kind, direction, at)
        if key not in self._intervals:
            scores = self.effects[kind, 1, direction, at]
            self._intervals[key] = scores.ci("recovered", seed=self.seed)
        return self._intervals[key]

    def _same_sign(self, effects: Iterable[Effect], at: str, head: Head) -> bool:
        """Whether the strongest found effect has the same sign on selection and on test."""
        found = [e for e in effects if e.significant]
        best = max(found, key=lambda e: abs(e.recovered))
        chosen = float(self.effects[best.corruption, 0, best.direction, at].mean()[head])
        total = float(self.effects[best.corruption, 0, best.direction, at].total.mean())  # type: ignore[union-attr]
        return best.recovered * chosen * total > 0

    def strongest(self, keys: Sequence[tuple[str, Head]], most: int) -> list[Head]:
        """Get the heads with the largest effects on the selection split."""
        at = keys[0][0] if keys else "answer"

        def size(head: Head) -> float:
            return max(
                abs(float(self.effects[kind, 0, d, at].recovered()[head]))
                for kind in self.visible
                for d in DIRECTIONS
            )

        heads = sorted((head for _, head in keys), key=lambda h: (-size(h), h))
        if len(heads) > most:
            self.notes.append(
                f"paths were measured for the {most} strongest of {len(heads)} heads at {at}"
            )
        return heads[:most]

    def paths(
        self, writers: Sequence[Head], readers: Sequence[Head]
    ) -> tuple[Scores | None, dict[Head, bool]]:
        """Find writers with a path into readers; return test scores where it is strongest."""
        if not (writers and readers and min(writers)[0] < max(readers)[0]):
            return None, dict.fromkeys(writers, False) if readers else {}
        cells: dict[Any, Scores] = {}
        for kind, direction in itertools.product(self.visible, DIRECTIONS):
            cells[kind, direction] = patch_paths(
                self.model,
                self.contrasts[kind, 0],
                senders=writers,
                receivers=readers,
                through="mlp",
                direction=direction,
                **self._shared(kind, 0),
            )
        found = self._significant(cells)
        hit = np.any([f.any(axis=(1, 2)) for f in found.values()], axis=0)
        kind, direction = max(cells, key=lambda k: float(abs(cells[k].recovered()).max()))
        scores = patch_paths(
            self.model,
            self.contrasts[kind, 1],
            senders=writers,
            receivers=readers,
            through="mlp",
            direction=direction,
            **self._shared(kind, 1),
        )
        return scores, {head: bool(h) for head, h in zip(writers, hit, strict=True)}

    def sources(self, labels: Mapping[tuple[str, Head], Any]) -> dict[tuple[str, Head], dict]:
        """Split each labelled head's effect by source role, on the test split."""
        groups: dict[tuple[str, Direction, str], list[Head]] = {}
        for (at, head), (_, effects) in labels.items():
            best = max((e for e in effects if e.significant), key=lambda e: abs(e.recovered))
            groups.setdefault((best.corruption, best.direction, at), []).append(head)
        out: dict[tuple[str, Head], dict] = {}
        for (kind, direction, at), heads in groups.items():
            scores = patch_sources(
                self.model,
                self.contrasts[kind, 1],
                at=at,
                heads=heads,
                parts=["both"],
                direction=direction,
                **self._shared(kind, 1),
            )
            share = scores.recovered().isel(part=0)
            for i, head in enumerate(heads):
                out[at, head] = {
                    str(role): float(share.values[j, i]) for j, role in enumerate(share.role.values)
                }
        return out

    def joint(
        self,
        groups: Mapping[str, Sequence[FoundHead]],
        found: Mapping[str, Sequence[tuple[str, Head]]],
    ) -> list[JointEffect]:
        """Exchange all writers, and all readers, together; and as many control heads."""
        everything = all_heads(Adapter.of(self.model))
        out = []
        for label in ("writer", "reader"):
            at = ROLES[label]
            heads = [h.site.at for h in groups[label]]
            taken = {head for _, head in found[at]}
            controls = control_sets(heads, everything, taken, self.seed)
            if heads and not controls:
                self.notes.append(
                    f"no control heads are left at {at}: joint effects have no control"
                )
            sets: dict[str, Sequence[Head]] = {label: heads, "all": everything}
            sets |= {f"control {i}": control for i, control in enumerate(controls)}
            if not heads:
                continue
            for kind, direction in itertools.product(self.visible, DIRECTIONS):
                scores = patch_together(
                    self.model,
                    self.contrasts[kind, 1],
                    sets,
                    at=at,
                    direction=direction,
                    **self._shared(kind, 1),
                )
                ci = scores.ci("recovered", seed=self.seed)
                value, lo, hi = (ci[k].values.astype(float) for k in ("value", "lo", "hi"))
                effects = [Effect(kind, direction, value[i], lo[i], hi[i]) for i in range(2)]
                control = tuple(float(v) for v in ci["value"].values[2:])
                beaten = sum(abs(c) >= abs(effects[0].recovered) for c in control)
                pvalue = (1 + beaten) / (1 + len(control)) if control else None
                out.append(JointEffect(label, len(heads), effects[0], control, pvalue))
                out.append(JointEffect(f"all heads at {at}", len(everything), effects[1]))
        return out

    def test_scores(self) -> dict[str, Scores]:
        """Name the effects of every head on the test split."""
        return {
            f"{kind}/{direction}/{at}": scores
            for (kind, half, direction, at), scores in self.effects.items()
            if half == 1
        }

    def accuracy(self) -> dict[str, dict[str, float]]:
        """Measure the clean and the corrupted run of each corruption on the test split.

        The clean run has a row for each corruption, since each has a foil of its own.
        """
        out: dict[str, dict[str, float]] = {}
        for (kind, half), recorded in self.recorded.items():
            if half == 1:
                targets = Targets.of(recorded.contrast.clean)
                rows = torch.arange(len(recorded.contrast))
                runs = {f"clean, foil of {kind}": recorded.clean, kind: recorded.corrupted}
                for name, run in runs.items():
                    out[name] = {
                        m: float(METRICS[m].readout(targets)(run.logits, rows).mean())
                        for m in ("accuracy", "choice", "label_rate", "logit_diff")
                    }
        return out


def control_sets(
    heads: Sequence[Head], everything: Sequence[Head], taken: set[Head], seed: int
) -> list[tuple[Head, ...]]:
    """Draw sets of other heads with as many from each layer; where few exist, all of them.

    Where a layer has too few other heads, the rest come from the other layers; where the model has
    too few, the sets are empty.
    """
    free = [head for head in everything if head not in taken]
    if len(free) < len(heads) or not heads:
        return []
    wanted = {layer: sum(h[0] == layer for h in heads) for layer in {h[0] for h in heads}}
    pools = {layer: [h for h in free if h[0] == layer] for layer in wanted}
    exact = all(len(pools[layer]) >= n for layer, n in wanted.items())
    if exact and math.prod(math.comb(len(pools[la]), n) for la, n in wanted.items()) <= N_CONTROLS:
        choices = [list(itertools.combinations(pools[layer], n)) for layer, n in wanted.items()]
        return [tuple(sorted(sum(parts, ()))) for parts in itertools.product(*choices)]
    rng = np.random.default_rng([seed, 2])
    out: set[tuple[Head, ...]] = set()
    for _ in range(20 * N_CONTROLS):
        chosen: list[Head] = []
        for layer, n in wanted.items():
            picks = rng.permutation(len(pools[layer]))[:n]
            chosen += [pools[layer][i] for i in picks]
        rest = [h for h in free if h not in chosen]
        missing = len(heads) - len(chosen)
        chosen += [rest[i] for i in rng.permutation(len(rest))[:missing]]
        out.add(tuple(sorted(chosen)))
        if len(out) == N_CONTROLS:
            break
    return sorted(out)


def _share(effect: Effect) -> str:
    mark = "" if effect.significant in (True, None) else " ns"
    return f"{effect.recovered:+.2f} [{effect.lo:+.2f},{effect.hi:+.2f}]{mark}"


def _heading(report: HeadReport) -> list[str]:
    s = report.settings
    return [
        f"{s['task']} on {s['model']}: {s['n_demos']} demonstrations, "
        f"accuracy {report.clean_accuracy:.2f} (test split)",
        "Share of the total recovered [95 % interval], test split; + carries the task.",
        "ns: not found on the selection split. sufficient: found by denoise, clean put",
        "into the corrupted run; necessary: by noise, the reverse; both: by either.",
        "Heads are in the order of their largest share that is not ns. by source: that",
        "share by the role of what the head attends to (earlier: demonstrations before).",
        "local-vector writer: a found reader reads what it writes.",
    ]


def _reads(head: FoundHead) -> str:
    """List the largest parts of a head's effect by the role of what it reads."""
    split = sorted(
        ((role, v) for role, v in head.sources.items() if role != "all"), key=lambda p: -abs(p[1])
    )
    return ", ".join(f"{role} {v:+.2f}" for role, v in split[:4] if abs(v) >= 0.005) or "none"


def _table(report: HeadReport) -> list[str]:
    """Lay the report out at 80 columns."""
    lines = _heading(report)
    titles = {
        "writers": "WRITERS at the answers: carry there what they read elsewhere",
        "copiers": "COPIERS at the answers: pass on only the answer's own word",
        "readers": "READERS at query_is: read keys or values at the answers",
        "relays": "RELAYS at query_is: matter there without reading answers",
    }
    for name, title in titles.items():
        heads: tuple[FoundHead, ...] = getattr(report, name)
        lines += ["", f"{title} ({len(heads)})"]
        if heads:
            lines.append(f"  {'head':<7}{'corruption':<16}{'denoise':<25}{'noise'}")
        for head in heads:
            by = {(e.corruption, e.direction): e for e in head.effects}
            for i, kind in enumerate(dict.fromkeys(e.corruption for e in head.effects)):
                tag = f"L{head.site.layer}H{head.site.head}" if i == 0 else ""
                both = "".join(f"{_share(by[kind, d]):<25}" for d in DIRECTIONS)
                lines.append(f"  {tag:<7}{kind:<16}{both}".rstrip())
            extra = "; local-vector writer" if head.local_vector else ""
            lines.append(f"         {head.verdict}{extra}; by source: {_reads(head)}")
    if report.joint:
        lines += ["", "JOINT effects (control: layer-matched random heads, mean and range)"]
        if any(j.effect.recovered > 1.005 for j in report.joint):
            lines.append("  Above +1.00: heads outside of the set work against the task.")
    for j in report.joint:
        control = ""
        if j.control:
            control = (
                f"  control {np.mean(j.control):+.2f} "
                f"({min(j.control):+.2f} to {max(j.control):+.2f}, {len(j.control)} sets)"
            )
        name = f"{j.n_heads} {j.label}{'s' * (j.n_heads != 1)}" if j.label in ROLES else j.label
        lines.append(f"  {name}, {j.effect.corruption}, {j.effect.direction}: {_share(j.effect)}")
        if control:
            lines.append("  " + control)
    if report.notes:
        lines += ["", *(f"Note: {note}" for note in report.notes)]
    return wrapped(lines)
