"""Which architectures can be measured how: exact, by a longer way, or refused, and why.

    python benchmarks/breadth.py                 # print the table
    python benchmarks/breadth.py --write         # and put it into docs/breadth.md

Random models of two or three layers, in float32, both TransformerLens classes where both hold the
model. Each capability is compared with a plain loop of TransformerLens hooks (tests/naive.py) on
two prompts; "exact" is a difference under 1e-5 of the largest number.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import naive  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from random_models import ARCHITECTURES, OTHERS, hf_model, word_tokenizer, words  # noqa: E402

import tv_interp as tv  # noqa: E402
from tv_interp.models.convert import bridge_from_hf, hooked_class, hooked_from_hf  # noqa: E402

HEADS = [(0, 1), (1, 0), (1, 3)]
PAIRS = [(0, 1), (0, 3)]


def contrast_for(model: Any) -> tv.Contrast:
    """Two prompts of three demonstrations, answers deranged."""
    names = words()
    task = tv.Task.from_pairs(dict(zip(names[:20], names[20:40], strict=True)))
    return tv.make_prompts(model, task, n_demos=3, n_prompts=2, seed=0).corrupt("answers")


def at_heads(scores: tv.Scores) -> np.ndarray:
    """Effects at `HEADS`, ``[prompt, head]``."""
    return np.stack([scores.data.sel(layer=la, head=h).values for la, h in HEADS], 1)


CAPABILITIES: dict[str, Callable[[Any, tv.Contrast], tuple[Any, Any]]] = {
    "readers": lambda m, c: (
        at_heads(tv.patch_heads(m, c, at="query_is")),
        naive.patch_heads(m, c, [[h] for h in HEADS], "query_is"),
    ),
    "writers": lambda m, c: (
        at_heads(tv.patch_heads(m, c, at="answer")),
        naive.patch_heads(m, c, [[h] for h in HEADS], "answer"),
    ),
    "local paths": lambda m, c: (
        at_heads(tv.patch_local_paths(m, c)),
        naive.patch_local_paths(m, c, HEADS, "answer"),
    ),
    "knock-outs": lambda m, c: (
        at_heads(tv.knock_out(m, c.clean)),
        naive.knock_out(m, c.clean, [[h] for h in HEADS], "query_is", "answer"),
    ),
    "sources": lambda m, c: (
        tv.patch_sources(m, c, heads=HEADS, roles=["answer"], parts=["both"]).data.squeeze().values,
        naive.patch_sources(m, c, [(h, "answer", "both") for h in HEADS], "query_is"),
    ),
    "paths": lambda m, c: (
        tv.patch_paths(m, c, senders=PAIRS, receivers=[(1, 2)], via="kv").data.squeeze().values,
        naive.patch_paths(m, c, [(s, (1, 2), "kv") for s in PAIRS]),
    ),
}


def judge(model: Any, ask: Callable[[Any, tv.Contrast], tuple[Any, Any]]) -> tuple[str, str]:
    """Try one capability: a verdict, and what is to be said about it."""
    contrast = contrast_for(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            ours, theirs = (np.asarray(x, dtype=float) for x in ask(model, contrast))
        except tv.TvInterpError as error:
            return "refused", " ".join(str(error).split())
    if not np.abs(theirs).max() > 0:
        raise SystemExit("the plain loop sees no effect: the comparison would be empty")
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    if not error < 1e-5:
        return "WRONG", f"differs by {error:.1e}"
    slow = next((str(w.message) for w in said if "full forward pass" in str(w.message)), "")
    return ("falls back", slow) if slow else ("exact", "")


def models(arch: str) -> list[tuple[str, Any]]:
    """The architecture in each class that holds it; an error's text in place of a model."""
    tokenizer = word_tokenizer(words())
    out: list[tuple[str, Any]] = []
    classes = {"HookedTransformer": hooked_from_hf, "TransformerBridge": bridge_from_hf}
    for name, build in classes.items():
        if name == "HookedTransformer" and hooked_class() is None:
            continue
        try:
            out.append((name, build(hf_model(arch), tokenizer)))
        except tv.TvInterpError as error:
            out.append((name, " ".join(str(error).split())))
    return out


def table(architectures: tuple[str, ...]) -> tuple[str, bool]:
    """The table in Markdown, and whether no number is wrong."""
    lines = [
        f"| architecture | class | {' | '.join(CAPABILITIES)} |",
        "|---|---|" + "---|" * len(CAPABILITIES),
    ]
    notes: dict[str, str] = {}
    right = True
    for arch in architectures:
        for name, model in models(arch):
            if isinstance(model, str):
                if arch in ARCHITECTURES or name != "HookedTransformer":
                    notes[f"{arch}, {name}"] = model
                    lines.append(f"| {arch} | {name} | " + "not held | " * len(CAPABILITIES))
                continue
            cells = []
            for what, ask in CAPABILITIES.items():
                verdict, why = judge(model, ask)
                right &= verdict != "WRONG"
                cells.append(verdict)
                if why:
                    notes[f"{arch}, {name}, {what}"] = why
            print(f"{arch:<10}{name:<20}{' '.join(cells)}", flush=True)
            lines.append(f"| {arch} | {name} | {' | '.join(cells)} |")
    if notes:
        lines += ["", *(f"* {where}: {why}" for where, why in notes.items())]
    return "\n".join(lines), right


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/breadth.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    text, right = table((*ARCHITECTURES, *OTHERS))
    print(text)
    if given.write:
        page = HERE.parent / "docs" / "breadth.md"
        mark = "<!-- made by benchmarks/breadth.py --write -->"
        page.write_text(f"{page.read_text('utf-8').split(mark)[0]}{mark}\n\n{text}\n", "utf-8")
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
