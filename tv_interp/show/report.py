"""One HTML file that tells what was found, to whom it may concern, with the network off.

1. Numbers come from the report alone. Two things are computed here, where the report still has its
   model: effects by demonstration, and the attention on one prompt.
2. The page holds plotly.js and circuitsvis once each; its own policy forbids it to ask the network.
3. The same inputs give the same bytes. Everything from data is escaped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis.common import Experiment
from ..analysis.comparison import VectorReport
from ..analysis.faithfulness import CircuitReport
from ..analysis.find import Effect, FoundHead, HeadReport
from ..analysis.graph import split_edge
from ..display import readable, tokens_html
from ..errors import PromptError, TvInterpError
from ..files import write_text
from ..interventions.sites import Patch, Site, Variant
from ..models.adapter import Adapter, HookName
from ..prompts import Prompts
from ..scores import Scores
from . import plots, views
from .page import Figures, plain_settings, render_page
from .plots import LETTERS

GROUPS = {
    "writers": "exchanged at the answers, they carry there what they read elsewhere",
    "copiers": "exchanged at the answers, they pass on only the answer's own word",
    "readers": "exchanged at query_is, they act by what they read from the answers",
    "relays": "exchanged at query_is, they act without reading the answers",
}
CORRUPTIONS = {
    "task": "the demonstrations of another relation over the same inputs; foil: the other "
    "relation's answer to the same query",
    "random_answers": "answers drawn at random from the task's answers (two labels: from the two); "
    "foil: another demonstration's answer, or the other label",
    "labels": "the two labels exchanged everywhere, so that the right answer flips; foil: the "
    "other label",
    "answers": "the answers change places among the demonstrations (two labels: half of each class "
    "gets the other label); foil: what the corrupted demonstrations suggest for the query, else "
    "another demonstration's answer",
    "inputs": "the inputs change places among the demonstrations (two labels: between the "
    "classes); foil: as for answers",
    "query": "another query in the same prompt; foil: its answer",
}
_PLAIN = {
    "model", "model_class", "tv_interp", "torch", "transformer_lens", "task", "family", "template",
    "n_prompts", "n_demos", "seed", "dropped", "corruptions", "metric", "n_items", "fdr",
    "fdr_family", "min_recovered", "max_paths", "paths_through", "prewired",
}  # fmt: skip
N_PROMPTS, N_HEADS, N_EXAMPLES = 16, 4, 3


def write_report(
    path: str | os.PathLike,
    found: HeadReport | CircuitReport,
    *more: Any,
    command: str | None = None,
) -> None:
    """Write what was found as one HTML file that needs no network.

    Args:
        path: File to write, under its final name only once it is whole.
        found: From `find_heads`, or from `find_circuit` or `evaluate_circuit`. Where the heads
            still have their model, effects by demonstration and attention are computed for the
            page.
        more: After heads: scores, each of which gets a figure, and reports on circuits, each of
            which gets a section. None is passed over.
        command: The command that made the report; None for the call in Python.

    Raises:
        TvInterpError: for anything else than these.
        FileError: if the file cannot be written.
    """
    if not isinstance(found, (HeadReport, CircuitReport)):
        raise TvInterpError(
            "expected a HeadReport as made by find_heads, or a CircuitReport as made by "
            f"find_circuit, got {type(found).__name__}: call write_report(path, find_heads(...))"
        )
    rest = [each for each in more if each is not None]
    takes = (Scores, CircuitReport) if isinstance(found, HeadReport) else ()
    for each in rest:
        if not isinstance(each, takes):
            raise TvInterpError(
                f"write_report cannot show a {type(each).__name__} after a "
                f"{type(found).__name__}: pass a HeadReport, and after it Scores or CircuitReports"
            )
    if isinstance(found, CircuitReport):
        text = _circuit_page(found, command)
    else:
        circuits = [each for each in rest if isinstance(each, CircuitReport)]
        text = _page(found, [each for each in rest if isinstance(each, Scores)], circuits, command)
    write_text(Path(path), text)


def write_vector_page(
    path: str | os.PathLike, report: VectorReport, *, command: str | None = None
) -> None:
    """Write a comparison of vectors as one HTML file that needs no network.

    Args:
        path: File to write, under its final name only once it is whole.
        report: From `compare_vectors`.
        command: The command that made the report; None for none.

    Raises:
        FileError: if the file cannot be written.
    """
    figures = Figures()
    text = render_page(
        "vectors.html.j2",
        title=f"Local and global vectors: {report.settings['task']} on {report.settings['model']}",
        command=command,
        table=str(report),
        figures=[
            figures.add(plots.plot_vectors(report, metric=metric, title=metric))
            for metric in ("accuracy", "choice", "label_rate")
        ],
        settings=plain_settings(report.settings),
    )
    write_text(Path(path), text)


def effects_by_demo(
    report: HeadReport, *, n_prompts: int = N_PROMPTS, top: int = N_HEADS
) -> Scores | None:
    """Exchange the strongest writers (else copiers) at one demonstration's answer at a time.

    Args:
        report: From `find_heads`.
        n_prompts: The first so many test prompts.
        top: So many heads.

    Returns:
        Scores over ``(prompt, demo, site)`` for the corruption and direction in which the
        strongest head was found; None where the report has no model or found no such head.

    Raises:
        PromptError: if none of these prompts can be corrupted again.
    """
    heads = (report.writers or report.copiers)[:top]
    if report.model is None or not heads:
        return None
    best = heads[0].best
    prompts = report.prompts.select(range(min(n_prompts, len(report.prompts))))
    contrast = prompts.corrupt(best.corruption, seed=report.settings["seed"] + 2)
    metric = report.settings["metric"]
    run = Experiment(report.model, contrast, None, best.direction, metric, "answer")
    z = run.donor.z_at("answer")
    demos = range(prompts.n_demos)
    sites = [h.site for h in heads]
    variants: list[Variant] = [
        (Patch(Site(*site.at, "z", "answer", demo), z[:, site.layer, demo, site.head]),)
        for demo in demos
        for site in sites
    ]
    effects = run.effects(variants).reshape(len(contrast), len(demos), len(sites))
    labels = {"demo": list(demos), "site": [str(site) for site in sites]}
    return run.scores(effects, ("demo", "site"), labels, demos="each")


def _page(
    report: HeadReport,
    more: Sequence[Scores],
    circuits: Sequence[CircuitReport],
    command: str | None,
) -> str:
    from markupsafe import Markup

    figures = Figures()
    attention = _attention(report)
    return render_page(
        "report.html.j2",
        report.to_dict(),
        report=report,
        settings=plain_settings(report.settings),
        task=report.settings.get("task", "unnamed task"),
        model=report.settings.get("model", "unnamed model"),
        summary=_summary(report),
        command=command or _call(report),
        groups=[
            {"name": name, "text": text, "rows": [_row(h) for h in getattr(report, name)]}
            for name, text in GROUPS.items()
        ],
        kinds=list(dict.fromkeys(e.corruption for h in report.found for e in h.effects)),
        letters=LETTERS,
        corruptions={k: CORRUPTIONS.get(k, "") for k in report.settings.get("corruptions", [])},
        maps=_maps(report, figures),
        sources=_sources(report, figures),
        joint=figures.add(plots.plot_joint(report, title="")) if report.joint else "",
        paths=_paths(report, figures),
        demos=_demos(report, figures),
        attention=attention,
        examples=_examples(report.prompts),
        corrupted=_corrupted(report),
        extra={k: v for k, v in plain_settings(report.settings).items() if k not in _PLAIN},
        circuits=[_circuit(each, figures, f"circuit-{i}") for i, each in enumerate(circuits, 1)],
        more=[
            {
                "title": plots.describe(each) or "Scores",
                "figure": figures.add(plots.plot_scores(each, title="")),
            }
            for each in more
        ],
        circuitsvis=Markup(views.bundle_script()) if attention else "",
    )


def _circuit_page(report: CircuitReport, command: str | None) -> str:
    from markupsafe import Markup

    s = report.settings
    kind = str(s.get("corruption"))
    examples = []
    if report.contrast is not None:
        pair = report.contrast
        for row, sample in enumerate(pair.clean.samples[:N_EXAMPLES]):
            right = f"clean; right answer: {readable(sample.answer)}"
            foil = f"corrupted; foil: {readable(sample.foil)}"
            examples += [pair.clean.labelled(row, right), pair.corrupted.labelled(row, foil)]
    faithful, outside = (_interval(each) for each in (report.faithfulness, report.completeness))
    summary = (
        f"{len(report.circuit)} of {len(report.circuit.graph.edges)} edges "
        f"({report.size:.1%}) alone do {faithful} of what {s.get('model')} does on "
        f"{s.get('task')}, against corruption {kind}; all other edges do {outside}."
        + _beyond(report.faithfulness.value, "edges outside of it")
    )
    if report.random:
        summary += (
            f" {len(report.random)} random circuits of equal size do "
            f"{_percent(min(report.random))} to {_percent(max(report.random))}."
        )
    return render_page(
        "circuit.html.j2",
        report.to_dict(),
        task=s.get("task", "unnamed task"),
        model=s.get("model", "unnamed model"),
        summary=summary,
        command=command or _circuit_call(report),
        settings=plain_settings({**report.circuit.attrs, **s}),
        corruption=kind,
        corruption_text=CORRUPTIONS.get(kind, ""),
        examples=[Markup(tokens_html(each)) for each in examples],
        circuit=_circuit(report, Figures(), "circuit"),
    )


def _circuit(report: CircuitReport, figures: Figures, name: str) -> dict[str, Any]:
    """Lay a circuit out for its section: figure, numbers, and edges by size."""
    circuit, s = report.circuit, report.settings
    a = circuit.attrs
    order = sorted(circuit.edges, key=lambda edge: -abs(circuit.edges[edge]))
    rows = []
    for edge in order:
        sender, into = split_edge(edge)
        ends = circuit.intervals.get(edge)
        rows.append({"sender": sender, "into": into, "weight": circuit.edges[edge], "ends": ends})
    rule = f"{a['n_edges']} largest" if "n_edges" in a else f"at least {a.get('threshold')}"
    return {
        "id": name,
        "title": f"Circuit: {s.get('corruption')}, {a.get('method')}",
        "report": report,
        "about": f"Found by {a.get('method')} ({a.get('direction')}), measured on the prompts that "
        "it was evaluated on (find_circuit and tv-interp circuit keep them apart from those that "
        f"chose it); corruption {s.get('corruption')}, ablation {s.get('ablation')}, metric "
        f"{s.get('metric')}.",
        "figure": figures.add(report.plot(title="")),
        "random": float(np.mean(report.random)) if report.random else None,
        "chosen": f"Chosen by absolute score ({rule}), connected from the embedding to the logits. "
        "Weights and their 95 % intervals are from the prompts that chose them.",
        "unit": a.get("unit", "logits"),
        "rows": rows,
    }


def _interval(interval: Any) -> str:
    return f"{_percent(interval.value)} [{_percent(interval.lo)} to {_percent(interval.hi)}]"


def _circuit_call(report: CircuitReport) -> str:
    """Write the call that makes this report again, as far as it is known."""
    a, s = report.circuit.attrs, report.settings
    known = {**a, **s}
    names = ("n_demos", "n_prompts", "seed", "corruption", "template", "method", "n_edges")
    names = (*names, "direction", "metric", "ablation")
    written = ", ".join(f"{k}={known[k]!r}" for k in names if k in known)
    return (
        f"tv.find_circuit(tv.load_model({known.get('model')!r}), {known.get('task')!r}, {written})"
    )


# ---------------------------------------------------------------------------------- what is said


def _summary(report: HeadReport) -> list[str]:
    """Say in plain words what was found, from the numbers alone."""
    s = report.settings
    out = [
        f"{s.get('model')} was given prompts of {s.get('task')} with {report.prompts.n_demos} "
        "demonstrations each."
    ]
    if report.accuracy:
        out[0] = (
            out[0][:-1] + f", and answered {report.clean_accuracy:.0%} of the test prompts rightly."
        )
    if not report.found:
        return [
            *out,
            "No head was found that writes at the demonstrations' answers, or that reads them: "
            "none had an effect that was significant, large enough and of one sign on both halves "
            "of the prompts. See the notes for what may have hidden one.",
        ]
    does = {
        "writers": "writes at the demonstrations' answers what it read elsewhere",
        "copiers": "passes on only the answer's own word there",
        "readers": "reads the answers at query_is, where the answer is predicted",
        "relays": "matters at query_is without reading the answers",
    }
    parts = []
    for name, verb in does.items():
        heads = getattr(report, name)
        if heads:
            verb = verb if len(heads) == 1 else _plural(verb)
            parts.append(f"{len(heads)} head{'s' * (len(heads) != 1)} {verb} ({_list(heads)})")
    out.append(_join(parts) + ".")
    for label, heads in (("writer", report.writers), ("reader", report.readers)):
        joint = [j for j in report.joint if j.label == label]
        if joint:
            best = max(joint, key=lambda j: abs(j.effect.recovered))
            e = best.effect
            subject = f"The {label}" if len(heads) == 1 else f"All {len(heads)} {label}s together"
            text = (
                f"{subject} accounted for {_percent(e.recovered)} [{_percent(e.lo)} to "
                f"{_percent(e.hi)}] of what corrupting {e.corruption} changes ({e.direction}), the "
                "largest of the joint effects"
            )
            if best.control:
                text += (
                    f"; {len(best.control)} sets of other heads: {_percent(min(best.control))} to "
                    f"{_percent(max(best.control))}"
                )
            out.append(f"{text}.{_beyond(e.recovered, 'heads outside of the set')}")
    asked = [h for h in report.writers if h.local_vector is not None]
    if asked:
        n = sum(bool(h.local_vector) for h in asked)
        whose = f"{n} of {len(asked)} writers"
        if len(asked) == 1:
            whose = "The writer" if n else "No writer"
        out.append(f"{whose} reached a found reader: a local task vector that is read.")
    return out


def _plural(verb: str) -> str:
    first, rest = verb.split(" ", 1)
    first = {"passes": "pass"}.get(first, first.removesuffix("s"))
    return f"{first} {rest}".replace(" it read", " they read")


def _list(heads: Sequence[FoundHead], most: int = 6) -> str:
    names = [f"L{h.site.layer}H{h.site.head}" for h in heads]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _percent(share: float) -> str:
    return re.sub(r"^-0%", "0%", f"{share:.0%}")


def _beyond(share: float, others: str) -> str:
    """Explain a share that is printed as more than the whole."""
    if share <= 1.005:
        return ""
    return f" A share may exceed 100%: {others}, left as they were, work against the task."


def _call(report: HeadReport) -> str:
    """Write the call that makes this report again."""
    s = report.settings
    arguments = {k: s[k] for k in ("n_demos", "n_prompts", "seed", "corruptions", "template")}
    arguments |= {k: s[k] for k in ("metric", "fdr", "min_recovered", "max_paths")}
    written = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    return f"tv.find_heads(tv.load_model({s['model']!r}), {s['task']!r}, {written})"


def _row(head: FoundHead) -> dict[str, Any]:
    """Lay one head out: an effect for each corruption and direction, found on selection or not."""
    by: dict[str, dict[str, Effect]] = {}
    for effect in head.effects:
        by.setdefault(effect.corruption, {})[effect.direction] = effect
    split = sorted(
        ((role, v) for role, v in head.sources.items() if role != "all"), key=lambda p: -abs(p[1])
    )
    return {
        "head": head,
        "name": f"L{head.site.layer}H{head.site.head}",
        "order": head.site.layer * 10_000 + head.site.at[1],
        "by": by,
        "best": head.best,
        "sources": [(role, v) for role, v in split[:4] if abs(v) >= 0.005],
    }


# ---------------------------------------------------------------------------------- what is drawn


def _maps(report: HeadReport, figures: Figures) -> list[dict[str, Any]]:
    tables = plots.head_tables(report)
    limit = max((float(abs(table["value"]).max()) for table in tables.values()), default=0.0)
    out = []
    for (kind, way, at), table in tables.items():
        figure = plots.draw_heads(report, {(kind, way, at): table}, limit, "")
        figure.update_traces(showscale=True)
        what = "Written at answer" if at == "answer" else "Read at query_is"
        out.append({"title": f"{what}: {kind}, {way}", "figure": figures.add(figure)})
    return out


def _sources(report: HeadReport, figures: Figures) -> list[dict[str, Any]]:
    out = []
    for at, title in (("answer", "at the answers"), ("query_is", "at query_is")):
        if any(h.sources and h.site.role == at for h in report.found):
            figure = plots.plot_sources(report, at=at, title="")
            out.append({"title": f"Heads {title}", "figure": figures.add(figure)})
    return out


def _paths(report: HeadReport, figures: Figures) -> dict[str, Any] | None:
    if report.paths is None:
        return None
    table = report.paths.ci("recovered" if report.paths.total_is_clear() else "mean")
    flat = table.to_dataframe().reset_index()
    return {
        "figure": figures.add(plots.plot_scores(report.paths, title="")),
        "about": _about(report.paths),
        "rows": flat.to_dict("records"),
    }


def _demos(report: HeadReport, figures: Figures) -> dict[str, Any] | None:
    try:
        scores = effects_by_demo(report)
    except PromptError as error:
        return {"figure": f"Not computed: {error}", "about": "", "n": 0}
    if scores is None:
        return None
    return {
        "figure": figures.add(plots.plot_scores(scores, title="", top=N_HEADS)),
        "about": _about(scores),
        "n": scores.data.sizes["prompt"],
    }


def _about(scores: Scores) -> str:
    return f"corruption {scores.attrs['corruption']}, {scores.attrs['direction']}"


def _attention(report: HeadReport) -> dict[str, Any] | None:
    """Record the attention of the strongest heads on the shortest test prompt."""
    from markupsafe import Markup

    heads = (*report.writers[:N_HEADS], *report.readers[:N_HEADS])
    heads = heads or (*report.copiers[:N_HEADS], *report.relays[:N_HEADS])
    if report.model is None or not heads:
        return None
    prompts = report.prompts
    row = int(prompts.lengths.argmin())
    n = int(prompts.lengths[row])
    if n * n > views.MAX_CELLS:  # megabytes of numbers that nobody can see
        return None
    adapter = Adapter.of(report.model)
    layers = sorted({h.site.layer for h in heads})
    last: HookName = ("resid_post", adapter.n_layers - 1)
    reads = [last, *(("pattern", i) for i in layers)]
    _, seen = adapter.read(prompts.tokens[row : row + 1, :n], reads)
    pieces, roles = prompts.pieces(row), prompts.roles_of(row)
    shown = heads[: max(1, views.MAX_CELLS // (n * n))]
    pattern = {h.site: seen["pattern", h.site.layer][0, h.site.head].float().cpu() for h in heads}
    view = views.attention_view(
        torch.stack([pattern[h.site] for h in shown]),
        [f"{piece} ({role})" for piece, role in zip(pieces, roles, strict=True)],
        [f"{h.site.layer}.{h.site.head} {LETTERS[h.label]}" for h in shown],
        name="attention",
    )
    looks = []
    for i, head in enumerate((*report.writers[:2], *report.readers[:2])):
        where = prompts.positions(head.site.role)[row]
        dest = int(where[-1]) if where.ndim else int(where)
        values = pattern[head.site][dest]
        looks.append(
            {
                "name": f"L{head.site.layer}H{head.site.head}, {head.label}",
                "dest": f"{pieces[dest]} ({roles[dest]})",
                "view": Markup(
                    views.token_view(
                        [f" {piece} " for piece in pieces[: dest + 1]],
                        values[: dest + 1],
                        min_value=-1,
                        max_value=1,
                        name=f"look-{i}",
                    ).html
                ),
            }
        )
    predicted = views.logits_view(
        [*prompts.tokens[row, :n].tolist(), int(prompts.answer[row])],
        adapter.logits(seen[last])[0],
        lambda token: f" {prompts.tokenizer.decode([token]).strip()} ",
        name="predicted",
    )
    return {
        "view": Markup(view.html),
        "looks": looks,
        "predicted": Markup(predicted.html),
        "row": row,
        "text": prompts.texts[row],
    }


def _examples(prompts: Prompts) -> list[Any]:
    from markupsafe import Markup

    return [
        Markup(tokens_html(prompts.labelled(row, f"right answer: {readable(sample.answer)}")))
        for row, sample in enumerate(prompts.samples[:N_EXAMPLES])
    ]


def _corrupted(report: HeadReport) -> list[tuple[str, str, str]]:
    """Corrupt the first prompt as for the measurement; what does not fit it is left out."""
    out = []
    for kind in report.settings.get("corruptions", []):
        try:
            pair = report.prompts.select([0]).corrupt(kind, seed=report.settings["seed"] + 2)
        except PromptError:
            continue
        out.append((kind, pair.corrupted.texts[0], pair.corrupted.samples[0].foil))
    return out
