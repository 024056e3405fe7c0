"""Which method recovers planted circuits? ROC AUC and average precision of nodes and edges.

    python benchmarks/bench_recovery.py                  # 50 circuits, about five minutes
    python benchmarks/bench_recovery.py --circuits 8     # a glance
    python benchmarks/bench_recovery.py --write          # and the tables of README.md
    python benchmarks/bench_recovery.py --circuits 0     # programs compiled by tracr alone

Circuits are `draw_circuit(seed)` for seeds from 0 on: each a model with its task, its true nodes
and edges, and decoys. The truth is stated for ablation by the corrupted run under one of the
circuit's corruptions, in turn. The tables have means over circuits with 95 % bootstrap intervals,
for circuits whose edges act alone, for those with a gate of two parts (one suffices, or both are
needed), and for those where two of three suffice.

A method ranks all nodes (embedding, heads and MLPs at roles) or all edges of the graph of roles by
the absolute value of its mean score over prompts. AUC is the chance that a true one is ranked above
one that is not, ties counting half. A score below a thousandth of the method's largest counts as 0,
or else methods would be ranked by rounding, and so does a node that a method says nothing about.
Most edges carry nothing, which makes a high AUC cheap; average precision is the harder number.

Methods, all with logit_diff: exact exchange of each node or edge in one direction, in both (the
larger), and with the interaction of pairs (the largest); attribution of edges (EAP, EAP-IG with 3
midpoints), by which a node's score is the sum of the absolute scores of the edges that leave it.
Saliency, attention weight and knock-out score a head at a role by its largest value over the roles
that it attends to, `<bos>` left out. An edge is not run where the receiver's first weights map its
message to 0. Times are CPU seconds a circuit of this process on one thread.

Beside them two programs compiled by tracr, whose truths `compile_tracr.py` derives from tracr's own
weights and runs: one for ablation by the corrupted run, one for ablation by zero. Methods ablate in
either way and are held against either truth.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from edges_by_hand import EdgesByHand  # noqa: E402
from harness import cpu, keep, provenance, write_section  # noqa: E402
from scipy.stats import rankdata  # noqa: E402
from tracr_models import PROGRAMS, compiled  # noqa: E402

import tv_interp as tv  # noqa: E402
from tv_interp.analysis.common import DIRECTIONS, Experiment  # noqa: E402
from tv_interp.analysis.graph import RoleGraph, node_of, place_masks, split_edge  # noqa: E402
from tv_interp.interventions import Patch, Site  # noqa: E402
from tv_interp.models.generator import draw_circuit  # noqa: E402
from tv_interp.scores.statistics import bootstrap  # noqa: E402

N_PROMPTS, N_DEMOS = 8, 2
STEPS = 3  # of EAP-IG
FLOOR = 1e-3  # of a method's largest score: what is below counts as 0
MOVED = 1e-4  # least change between the runs of an output that is worth exchanging
SILENT = 2e-3  # most effect of what has none, in parts of the total
GROUPS = {
    "edges act alone": ("none",),
    "one of two suffices, or both are needed": ("or", "and"),
    "two of three suffice": ("majority",),
}
DESTINATIONS = ("is", "answer", "query_is")  # roles whose attention is looked at
NODES = ("nodes", "node pairs")
ATTRIBUTION = {"EAP": "eap", "EAP-IG": "eap-ig", "EAP-IG, activations": "eap-ig-activations"}
Values = dict[str, float]


# ----------------------------------------------------------------------------------- the scores


def auc(scores: np.ndarray, true: np.ndarray) -> float:
    """Area under the ROC curve, by ranks."""
    n = int(true.sum())
    return float((rankdata(scores)[true].sum() - n * (n + 1) / 2) / (n * (len(true) - n)))


def average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """Precision averaged over the true ones, ties taken together."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(true[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / true.sum())


class Contest:
    """One circuit under one corruption, and what each method makes of it."""

    def __init__(self, case, corruption: str) -> None:
        clean = tv.make_prompts(case.model, case.task, n_demos=N_DEMOS, n_prompts=N_PROMPTS)
        self.start(case.model, clean.corrupt(corruption), case.truths[corruption], "corrupted")

    def start(self, model, contrast: tv.Contrast, truth, ablation: str) -> None:
        self.model, self.contrast, self.truth, self.ablation = model, contrast, truth, ablation
        self.recorded = tv.record(model, contrast)
        self.graph = RoleGraph.of(model, contrast.clean)
        self.nodes = self.graph.nodes[:-1]
        assert self.truth.nodes <= set(self.nodes) and self.truth.edges <= set(self.graph.edges)
        self.known: dict[str, Values] = {}
        self.seconds: dict[str, float] = {}

    def scores(self, primitive: str) -> Values:
        """What a primitive gives; how long it took is kept."""
        if primitive not in self.known:
            self.known[primitive], self.seconds[primitive] = cpu(
                lambda: PRIMITIVES[primitive](self)
            )
        return self.known[primitive]

    # ---- exact

    def alone(self, direction: str) -> Values:
        """Effects of exchanging each node."""
        run = self.experiment(direction)
        patches = self.patches(run)
        effects = run.effects([(patch,) for patch in patches.values()]).mean(0)
        return dict(zip(patches, effects.tolist(), strict=True))

    def node_pairs(self, direction: str) -> Values:
        """The largest interaction that each node has with another."""
        run, alone = self.experiment(direction), self.scores(f"nodes {direction}")
        patches = self.patches(run)
        pairs = list(itertools.combinations(patches, 2))
        joint = run.effects([(patches[a], patches[b]) for a, b in pairs]).mean(0)
        return largest(
            *({node: effect - alone[a] - alone[b] for node in (a, b)}
              for (a, b), effect in zip(pairs, joint.tolist(), strict=True))
        )  # fmt: skip

    def edge_pairs(self, direction: str) -> Values:
        """The same of edges: those without effect alone, between nodes that have one."""
        nodes = largest(*(self.scores(f"{what} {way}") for what in NODES for way in DIRECTIONS))
        edges = largest(*(self.scores(f"edges {way}") for way in DIRECTIONS))
        by_hand = EdgesByHand(self.model, self.contrast, direction)
        least = SILENT * abs(by_hand.total)
        matter = {node for node, score in nodes.items() if score > least} | {"logits"}
        silent = [
            edge for edge, score in edges.items()
            if score < least and matter.issuperset(map(node_of, split_edge(edge)))
        ]  # fmt: skip
        return largest(
            *(dict.fromkeys(pair, by_hand.effect(*pair) * by_hand.total)
              for pair in itertools.combinations(silent, 2))
        )  # fmt: skip

    def experiment(self, direction: str) -> Experiment:
        return Experiment(
            self.model, self.contrast, self.recorded, direction, "logit_diff", "query_is"
        )

    def patches(self, run: Experiment) -> dict[str, Patch]:
        """A patch of each node whose output differs between the runs."""
        layers = run.adapter.layers
        names = [("resid_pre", 0), *((what, la) for la in layers for what in ("z", "mlp_out"))]
        (_, here), (_, there) = (
            run.adapter.read(side.prompts.tokens, names) for side in (run.base, run.donor)
        )
        found = {}
        for node in self.nodes:
            what, role = node.split("@")
            layer, *head = map(int, re.findall(r"\d+", what)) if what != "embed" else [0]
            component = "z" if head else "resid_pre" if what == "embed" else "mlp_out"
            at = self.contrast.clean.positions(role)
            row = torch.arange(len(at)).view(-1, *[1] * (at.ndim - 1))
            value, before = (
                side[component, layer][row, at][..., *head, :] for side in (there, here)
            )
            if self.ablation == "zero":
                value = torch.zeros_like(value)
            if (value - before).abs().max() > MOVED:
                site = Site(layer, head[0] if head else None, component, role)
                found[node] = Patch(site, value)
        return found

    def exact_edges(self, direction: str) -> Values:
        """Effects of exchanging each edge; 0 where the receiver takes up nothing of the message."""
        read = EdgesByHand(self.model, self.contrast, direction).read_edges(self.graph.edges)
        return self.edges("exact", direction, edges=read)

    def attribute_edges(self, method: str) -> Values:
        return self.edges(method, "noise", n_steps=STEPS)

    def edges(self, method: str, direction: str, **options) -> Values:
        found = tv.score_edges(
            self.model,
            self.contrast,
            method=method,
            direction=direction,
            ablation=self.ablation,
            recorded=self.recorded,
            **options,
        ).mean()
        return dict(zip(found.edge.values.tolist(), found.values.tolist(), strict=True))

    # ---- screens

    def knock_out(self) -> Values:
        clean = self.recorded.clean
        return self.by_head(
            lambda dest, src: tv.knock_out(
                self.model, clean.prompts, dest=dest, src=src, recorded=clean
            ).mean().values
        )  # fmt: skip

    def saliency(self) -> Values:
        mean = tv.saliency_flow(self.model, self.contrast.clean).mean()
        return self.by_head(lambda dest, src: mean.sel(dest=dest, src=src).values)

    def attention(self) -> Values:
        prompts, adapter = self.contrast.clean, self.recorded.clean.adapter
        names = [("pattern", layer) for layer in adapter.layers]
        _, kept = adapter.read(prompts.tokens, names)
        patterns = torch.stack([kept[name] for name in names], 1)  # prompt, layer, head, dest, src
        masks = place_masks(prompts, self.graph.places).to(patterns)
        share = torch.einsum("blhij,bid,bjs->lhds", patterns, masks, masks)
        share = share / masks.sum((0, 1))[:, None]
        place = self.graph.places.index
        return self.by_head(lambda dest, src: share[:, :, place(dest), place(src)].numpy())

    def by_head(self, score: Callable[[str, str], np.ndarray]) -> Values:
        """The largest over what a head at a role attends to."""
        found = []
        for src, dest in sorted(self.graph.sees):
            if src != "bos" and dest in DESTINATIONS:
                table = np.abs(score(dest, src))
                found.append({f"L{la}H{h}@{dest}": v for (la, h), v in np.ndenumerate(table)})
        return largest(*found)


class Compiled(Contest):
    """A program compiled by tracr: its truth for one ablation, and methods that use another."""

    def __init__(self, program: str, stated_for: str, ablation: str) -> None:
        case = compiled(program, N_PROMPTS)
        self.start(case.model, case.contrast, case.truths[stated_for], ablation)

    def exact_edges(self, direction: str) -> Values:
        """Effects of exchanging each edge, all of them."""
        return self.edges("exact", direction)


def largest(*scores: Values) -> Values:
    """The largest absolute score of each name."""
    found: Values = {}
    for some in scores:
        for name, value in some.items():
            found[name] = max(abs(value), found.get(name, 0.0))
    return found


def senders(edges: Values) -> Values:
    """Nodes by the edges that leave them."""
    found: Values = {}
    for name, value in edges.items():
        sender = split_edge(name)[0]
        found[sender] = found.get(sender, 0.0) + abs(value)
    return found


# ----------------------------------------------------------------------------------- the methods

PRIMITIVES: dict[str, Callable[[Contest], Values]] = {
    **{f"nodes {way}": (lambda c, way=way: c.alone(way)) for way in DIRECTIONS},
    **{f"node pairs {way}": (lambda c, way=way: c.node_pairs(way)) for way in DIRECTIONS},
    **{f"edges {way}": (lambda c, way=way: c.exact_edges(way)) for way in DIRECTIONS},
    **{f"edge pairs {way}": (lambda c, way=way: c.edge_pairs(way)) for way in DIRECTIONS},
    **{
        name: (lambda c, method=method: c.attribute_edges(method))
        for name, method in ATTRIBUTION.items()
    },
    "saliency": Contest.saliency,
    "attention weight": Contest.attention,
    "knock-out": Contest.knock_out,
}
_BOTH = tuple([f"{what} {way}" for way in DIRECTIONS] for what in ("nodes", "edges"))
_PAIRS = tuple([f"{what} pairs {way}" for way in DIRECTIONS] for what in ("node", "edge"))
METHODS: dict[str, tuple[list[str], list[str]]] = {  # primitives that score nodes, and edges
    **{f"exact, {way}": ([f"nodes {way}"], [f"edges {way}"]) for way in DIRECTIONS},
    "exact, both directions": _BOTH,
    "exact, both and pairs": (_BOTH[0] + _PAIRS[0], _BOTH[1] + _PAIRS[1]),
    **{name: ([], [name]) for name in ATTRIBUTION},
    **{name: ([name], []) for name in ("knock-out", "saliency", "attention weight")},
}


def judge(contest: Contest, methods: Sequence[str] = tuple(METHODS)) -> dict[str, dict[str, float]]:
    """Score methods on one circuit under one corruption."""
    found = {}
    for method in methods:
        of_nodes, of_edges = METHODS[method]
        edges = largest(*map(contest.scores, of_edges))
        nodes = largest(*map(contest.scores, of_nodes)) if of_nodes else senders(edges)
        heads = [node for node in contest.nodes if "H" in node]
        row = {"s": sum(contest.seconds[name] for name in {*of_nodes, *of_edges})}
        ranked = [("heads", heads, nodes, contest.truth.nodes)]
        if of_edges:  # the others say nothing about MLPs and the embedding
            ranked.append(("nodes", list(contest.nodes), nodes, contest.truth.nodes))
            ranked.append(("edges", list(contest.graph.edges), edges, contest.truth.edges))
        for what, names, scores, truth in ranked:
            values = np.array([abs(scores.get(name, 0.0)) for name in names])
            values[values < FLOOR * values.max()] = 0
            true = np.array([name in truth for name in names])
            row[f"{what} AUC"] = auc(values, true)
            row[f"{what} AP"] = average_precision(values, true)
        found[method] = row
    return found


def measure(n_circuits: int) -> list[dict]:
    """Judge every method on circuits from seed 0 on; ends early on Ctrl-C, with what is done."""
    rows = []
    with contextlib.suppress(KeyboardInterrupt):
        for seed in range(n_circuits):
            rows.append(judge_circuit(seed))
            exact, eap = (rows[-1]["methods"][name]["edges AP"] for name in ("exact, noise", "EAP"))
            print(f"circuit {seed}: AP of exact, noise {exact:.3f}, of EAP {eap:.3f}", flush=True)
    return rows


def judge_circuit(seed: int) -> dict:
    """Judge every method on one circuit, under one of its corruptions in turn."""
    case = draw_circuit(seed)
    contest = Contest(case, case.corruptions[seed % len(case.corruptions)])
    return dict(
        seed=seed,
        corruption=contest.truth.corruption,
        settings={name: value for name, value in case.settings.items() if value is not None},
        nodes=len(contest.nodes),
        edges=len(contest.graph.edges),
        true_edges=len(contest.truth.edges),
        methods=judge(contest),
    )


def judge_programs() -> list[dict]:
    """Judge methods on the compiled programs, under both ablations and against both truths."""
    rows = []
    for program, truth, ablation in itertools.product(PROGRAMS, STATED_FOR, STATED_FOR):
        contest = Compiled(program, truth, ablation)
        rows.append(
            dict(
                program=program,
                truth=truth,
                ablation=ablation,
                edges=len(contest.graph.edges),
                true_edges=len(contest.truth.edges),
                methods=judge(contest, OF_PROGRAMS),
            )
        )
    return rows


# ------------------------------------------------------------------------------------- the table

COLUMNS = ("heads AUC", "nodes AUC", "nodes AP", "edges AUC", "edges AP")
STATED_FOR = ("corrupted", "zero")
OF_PROGRAMS = ("exact, noise", "EAP", "EAP-IG")


def table(result: dict) -> str:
    """All groups as Markdown, then the compiled programs."""
    return "\n\n".join([table_of_circuits(result), table_of_programs(result["tracr"])])


def table_of_programs(rows: list[dict]) -> str:
    columns = [(ablation, what) for ablation in STATED_FOR for what in COLUMNS[1:]]
    lines = [
        "**Programs compiled by tracr**: under either ablation, against the truth of either.",
        "",
        "| program | truth for | true edges | method | "
        + " | ".join(f"{what}, {ablation}" for ablation, what in columns)
        + " |",
        "|---|" + "---|" * (3 + len(columns)),
    ]
    for program, truth, method in itertools.product(PROGRAMS, STATED_FOR, OF_PROGRAMS):
        of = {
            row["ablation"]: row
            for row in rows
            if (row["program"], row["truth"]) == (program, truth)
        }
        size = "{true_edges} of {edges}".format(**of[truth])
        cells = [f"{of[ablation]['methods'][method][what]:.3f}" for ablation, what in columns]
        lines.append(" | ".join([f"| {program}", truth, size, method, *cells]) + " |")
    return "\n".join(lines)


def table_of_circuits(result: dict) -> str:
    lines = [result["provenance"], ""]
    for title, kinds in GROUPS.items():
        rows = [row for row in result["circuits"] if row["settings"]["redundancy"] in kinds]
        if not rows:
            continue
        sizes = [int(np.median([row[key] for row in rows])) for key in ("nodes", "edges")]
        true = np.mean([row["true_edges"] for row in rows])
        lines += [
            f"**{title.capitalize()}**: {len(rows)} circuits, in the median {sizes[0]} nodes and "
            f"{sizes[1]} edges, of which {true:.0f} are true.",
            "",
            "| method | " + " | ".join(COLUMNS) + " | CPU s |",
            "|---|" + "---|" * (len(COLUMNS) + 1),
        ]
        for method in METHODS:
            cells = [interval([row["methods"][method].get(key) for row in rows]) for key in COLUMNS]
            seconds = np.mean([row["methods"][method]["s"] for row in rows])
            lines.append(f"| {method} | " + " | ".join(cells) + f" | {seconds:.2f} |")
        lines.append("")
    return "\n".join(lines).strip()


def interval(values: list[float | None]) -> str:
    """Mean and 95 % interval over circuits, within 0 and 1."""
    if None in values:
        return ""
    each = np.array(values, dtype=float)[:, None]
    low, high = bootstrap(each, np.arange(len(each)))
    return f"{each.mean():.3f} ({max(low[0], 0):.2f} to {min(high[0], 1):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--circuits", type=int, default=50, help="0: leave them as they are")
    parser.add_argument("--write", action="store_true", help="keep the result, remake README.md")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = provenance()
    result: dict = {"tracr": judge_programs()}
    if given.circuits:
        circuits, seconds = cpu(lambda: measure(given.circuits))
        about = f"Seeds 0 to {len(circuits) - 1}, {N_PROMPTS} prompts of {N_DEMOS} demonstrations, "
        about += f"{seconds / 60:.1f} minutes of CPU in all. {where}"
        result |= {"provenance": about, "circuits": circuits}
    if given.write:
        write_section("bench_recovery.py", table(keep("recovery.json", result)))
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n" + (table(result) if given.circuits else table_of_programs(result["tracr"])))


if __name__ == "__main__":
    main()
