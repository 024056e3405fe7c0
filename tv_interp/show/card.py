"""The model card's measurements: ``python -m tv_interp.show.card [--model reference]``.

Every number of a card comes from this command, run on the shipped weights or on a directory that
training wrote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import binomtest

from ..analysis.claims import check_claims
from ..analysis.verdicts import Claims
from ..errors import FileError
from ..files import write_rows, write_text
from ..interventions.recording import last_logits
from ..models.adapter import Adapter
from ..models.load import load_model, reference_directory
from ..prompts import Task, get_task, list_tasks, make_prompts
from ..prompts.tasks.categorization import Categorization, hybrid_task
from ..prompts.tasks.knowledge import SHARED
from ..prompts.tasks.words import held_out_label_words, unanswered_label_words
from ..scores.metrics import METRICS, Targets
from .learning import read_curve
from .phenomena import measure_phenomena, phenomena_section

DEMOS = (0, 1, 2, 4, 6, 8, 10)


def families() -> dict[str, list[Task]]:
    """Group the shipped tasks as the card reports them."""
    knowledge = [get_task(name) for name in list_tasks("knowledge")]
    out: dict[str, list[Task]] = {
        "knowledge, typed": [t for t in knowledge if t.name not in SHARED],
        "knowledge, shared answers": [t for t in knowledge if t.name in SHARED],
        "bijections": [get_task(n) for n in list_tasks("bijection") if n.endswith("bijection")],
        "look-up": [get_task("lookup")],
    }
    for name in list_tasks("categorization"):
        task = get_task(name)
        assert isinstance(task, Categorization)
        task = task.with_queries("held_out")
        out[name] = [task]
        never = unanswered_label_words()
        looked_up = [word for word in held_out_label_words() if word not in never]
        out[f"{name}, unseen label words"] = [task.with_labels(looked_up)]
        out[f"{name}, words never answered"] = [task.with_labels(never)]
    return out


def measure_accuracy(
    model: Any,
    *,
    n_prompts: int = 500,
    demos: Sequence[int] = DEMOS,
    seed: int = 1234,
) -> list[dict[str, Any]]:
    """Measure exact top-1 accuracy at the last query, by family and number of demonstrations.

    Queries of categorization tasks are inputs held out of training.

    Args:
        model: A model of the reference vocabulary.
        n_prompts: Prompts of each family and number of demonstrations, shared by its tasks.
        demos: Numbers of demonstrations.
        seed: Decides the prompts.

    Returns:
        One row a cell: family, n_demos, n, accuracy, lo, hi (Wilson, 95 %), choice.
    """
    adapter = Adapter.of(model)
    rows = []
    for family, tasks in families().items():
        for n_demos in demos:
            right, chosen = [], []
            for task in tasks:
                prompts = make_prompts(
                    model,
                    task,
                    n_demos=n_demos,
                    n_prompts=max(4, -(-n_prompts // len(tasks))),
                    seed=seed,
                )
                logits = last_logits(adapter, prompts)
                targets, every = Targets.of(prompts), torch.arange(len(prompts))
                right.append(METRICS["accuracy"].readout(targets)(logits, every))
                chosen.append(METRICS["choice"].readout(targets)(logits, every))
            hits, n = int(torch.cat(right).sum()), len(torch.cat(right))
            interval = binomtest(hits, n).proportion_ci(method="wilson")
            rows.append(
                {
                    "family": family,
                    "n_demos": n_demos,
                    "n": n,
                    "accuracy": round(hits / n, 4),
                    "lo": round(interval.low, 4),
                    "hi": round(interval.high, 4),
                    "choice": round(float(torch.cat(chosen).mean()), 4),
                }
            )
    return rows


def claim_tasks() -> list[str | Task]:
    """List the tasks on which the claims of arXiv 2406.16007 are asked: five of the paper's kinds.

    The hybrid, ours, labels countries by their continent.
    """
    names = ["country-capital", "adjective-antonym", "simple-string", "digit", "2d-data"]
    return [*names, hybrid_task()]


def write_card(
    model: str = "reference",
    n_prompts: int = 500,
    parts: Literal["all", "accuracy", "phenomena", "claims"] = "all",
) -> None:
    """Measure a model and write its README.md, and the numbers of each part, beside its weights.

    Args:
        model: Name of a shipped model, or the directory that training wrote.
        n_prompts: Prompts of each cell of the table of accuracies.
        parts: What is measured; the rest is read from what was written before.

    Raises:
        FileError: if there is no such model, training did not write it, or accuracies were never
            measured and are not asked for.
    """
    directory = reference_directory(model) or Path(model)
    read_curve(model)  # says so if training did not write this directory
    if parts not in ("all", "accuracy") and not (directory / "accuracy.json").exists():
        raise FileError(
            f"a card begins with accuracies, and {directory} has no accuracy.json: run "
            "--parts accuracy (or all) first"
        )
    loaded = load_model(model)
    torch.set_num_threads(1)  # a small model: more threads only wait for each other
    if parts in ("all", "accuracy"):
        write_rows(directory / "accuracy.json", measure_accuracy(loaded, n_prompts=n_prompts))
    if parts in ("all", "phenomena"):
        write_rows(directory / "phenomena.json", measure_phenomena(loaded))
    if parts in ("all", "claims"):
        check_claims(loaded, claim_tasks()).save(directory / "claims.json")
    rows = json.loads((directory / "accuracy.json").read_text("utf-8"))
    write_text(directory / "README.md", _card(directory.name, directory, rows))


def _phenomena(directory: Path) -> list[str]:
    """Write the section of the phenomena, where they were measured."""
    path = directory / "phenomena.json"
    return phenomena_section(json.loads(path.read_text("utf-8"))) if path.exists() else []


def _claims(name: str, directory: Path) -> list[str]:
    """Write the section of the claims, where they were measured."""
    path = directory / "claims.json"
    if not path.exists():
        return []
    claims = Claims.load(path)
    s = claims.settings
    return [
        "## Claims of arXiv 2406.16007",
        "",
        f"Asked by `python -m tv_interp.show.card --model {name} --parts claims`: "
        f"{s['n_demos']} demonstrations, {s['n_prompts']} prompts in each half (one chooses layers "
        f"and fits subspaces, the other is measured), seed {s['seed']}. Effect with its 95 % "
        "interval; *appears* and *does not* where it lies on one side of the number in brackets, "
        "which the claim is held against. k: the paper says so of knowledge tasks, c: of "
        "categorization, \\*: of both, o: our question. The paper's code and some of its choices "
        "are not public, so this is after the paper, not a replication.",
        "",
        claims.to_markdown(),
        "",
    ]


def _card(name: str, directory: Path, rows: Sequence[dict[str, Any]]) -> str:
    config = json.loads((directory / "config.json").read_text("utf-8"))
    about = config["tv_interp"]
    recipe, shape = about["recipe"], about["shape"]
    curve = read_curve(directory)
    demos = sorted({row["n_demos"] for row in rows})
    table = [
        "| family | " + " | ".join(f"{n}" for n in demos) + " |",
        "|---|" + "---|" * len(demos),
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = {row["n_demos"]: row for row in rows if row["family"] == family}
        shown = (f"{cells[n]['accuracy']:.2f}" for n in demos)
        table.append(f"| {family} | " + " | ".join(shown) + " |")
    widest = max(row["hi"] - row["lo"] for row in rows) / 2
    wired, separator = recipe["prewired"], recipe["separator"]
    start = (
        "These heads **started** as previous-token heads (an initialisation, freely trained "
        "afterwards), so a search for writers may find just these: "
        + ", ".join(f"L{k.replace('.', 'H')} ({v} back)" for k, v in wired.items())
        + "."
        if wired
        else "No head was pre-wired: every weight started at random."
        + (
            " In all heads alike, keys started correlated with queries "
            f"({recipe['likeness']:g}), and all embeddings with a shared direction of length "
            f"{recipe['mean']:g} (their own part: .5)."
            if recipe["likeness"]
            else ""
        )
    )
    steps = [row for i, row in enumerate(curve) if i % max(1, len(curve) // 10) == 0]
    if curve and curve[-1] not in steps:
        steps.append(curve[-1])
    kinds = [key for key in curve[-1] if key not in ("step", "loss")] if curve else []
    learning = [
        "| step | " + " | ".join(kinds) + " |",
        "|---|" + "---|" * len(kinds),
        *(f"| {r['step']} | " + " | ".join(f"{r[k]:.2f}" for k in kinds) + " |" for r in steps),
    ]
    phases = [
        f"{i}. {'at most ' if phase.get('until') else ''}{phase['steps']} steps of "
        f"{phase['batch']} sequences of {phase['length']} tokens, "
        f"{_dropped(recipe['drop'], phase['dropout'])}{_restricted(phase)}: "
        + ", ".join(f"{family} {weight:g}" for family, weight in phase["mix"].items())
        for i, phase in enumerate(recipe["phases"], 1)
    ]
    return "\n".join(
        [
            f"# {name}",
            "",
            "A small decoder trained to solve tasks from demonstrations, so that `tv_interp` runs "
            "offline. It knows a few hundred words and nothing else.",
            "",
            f"{shape['layers']} layers, {shape['heads']} heads, d_model {shape['width']}, gated "
            f"MLP of {shape['hidden']}, rotary positions, tied embeddings, {shape['vocab']} "
            "tokens, in the Llama layout. Prompts are "
            + (
                f"`<bos> x is y {separator} x is y {separator} ... x is`, with a constant "
                "separator after every answer."
                if separator
                else "`<bos> x is y x is y ... x is`, without a separator."
            ),
            "",
            "## What was planted",
            "",
            start + " The loss is the next answer, and nothing else: no loss or mask writes a "
            "mechanism in.",
            "",
            "## Accuracy",
            "",
            "Exact top-1 at the last query, by number of demonstrations; "
            f"{min(r['n'] for r in rows)} or more prompts a cell, 95 % intervals of at most "
            f"±{widest:.3f} (each in `accuracy.json`). Queries of categorization tasks are inputs "
            "never seen in a categorization prompt in training; label words are drawn for each "
            "prompt. Measured by `python -m tv_interp.show.card --model " + name + "`.",
            "",
            *table,
            "",
            "*Unseen label words* never named a class in training; in look-up prompts they were "
            "inputs and, where the script that made the model had it so, answers. *Words never "
            "answered* were inputs of look-up prompts and nothing else: a model that has learned "
            "never to say them is at 0, whatever it knows of the rule.",
            "",
            "*Typed*: the answer alone tells the relation. *Shared answers*: another relation has "
            "the same inputs and the same answers, so only the pair tells (France-Paris is the "
            "capital, France-Madrid the neighbour's capital).",
            "",
            *_phenomena(directory),
            *_claims(name, directory),
            "## Training",
            "",
            f"{_made(directory, about)}, "
            f"with torch {about['torch']}. Muon {recipe['muon_lr']:g} on matrices, AdamW "
            f"{recipe['adam_lr']:g} on the rest, from {recipe['decay_from']:.0%} of the steps on "
            "falling to 2 %. Families by weight:",
            "",
            *phases,
            "",
            "Accuracy while training (4 or 8 demonstrations, about 48 prompts a cell, so ±.14):",
            "",
            *learning,
            "",
        ]
    )


def _restricted(phase: dict[str, Any]) -> str:
    text = f", {phase['n_words']} label words" if phase["n_words"] else ""
    if phase.get("until"):  # models from before there was such a phase do not name it
        text += (
            f" (growing to them from those before) until {phase['until']:g} of look-ups of what "
            "was shown are right"
        )
    return text


def _made(directory: Path, about: dict[str, Any]) -> str:
    if "made_by" in about:
        return f"By the training script of {about['made_by']}. Seed {about['seed']}"
    took = json.loads((directory / "training.json").read_text("utf-8"))
    return (
        f"`python -m tv_interp.models.reference.train --preset {about['preset']} --seed "
        f"{about['seed']} --out DIR` took {took['minutes']:g} minutes on {took['machine']}"
        + (f" ({took['note']})" if "note" in took else "")
    )


def _dropped(what: str, share: float) -> str:
    if what == "nothing" or share == 0:
        return "no dropout"
    kind = "heads" if what == "heads" else "whole token columns after each block but the last"
    return f"dropout growing to {share:g} of {kind}"


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write_card, as_positional=False)
