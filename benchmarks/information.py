"""What the residual stream holds and how heads lie, where the methods fail beside where they work.

    python benchmarks/information.py measure     # half an hour on one core
    python benchmarks/information.py table       # the same numbers as tables

Four shipped models times tasks that have another rule over the same inputs. `benchmarks/
information.json` has a row for each pair, made by the first command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import tv_interp as tv
from tv_interp.files import read_rows, write_rows
from tv_interp.sweep.failures import OUTCOMES, explain_failures, measure_pair

HERE = Path(__file__).parent
MODELS = ("reference", "reference-natural", "reference-wired", "reference-words")
TASKS = ("country-capital", "digit", "letter-next", "country-continent")


def measure(out: Path, models: list[str], n_prompts: int) -> None:
    """Measure every pair and write the file after each, so that an interruption costs one pair."""
    torch.set_num_threads(1)
    rows = read_rows(out) if out.exists() else []
    known = {(row["preset"], row["task"]) for row in rows}
    loaded = {name: tv.load_model(name) for name in models}
    for task in TASKS:
        for name, model in loaded.items():
            if (name, task) in known:
                continue
            try:
                row = {"preset": name} | measure_pair(model, task, n_prompts=n_prompts)
            except tv.TvInterpError as error:
                print(f"{name}, {task}: left out, {error}", file=sys.stderr, flush=True)
                continue
            rows.append(row)
            write_rows(out, rows)
            print(name, task, {k: row[k] for k in OUTCOMES}, flush=True)


def show(path: Path) -> None:
    """Print the pairs, and what goes with failures, as Markdown."""
    rows = read_rows(path)
    held = ("rule at answer", "rule at x", "rule at query_is", "depth of the answer")
    names = ["few_shot", *OUTCOMES, *(f"map: {name}" for name in held)]
    print("| model | task | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for row in rows:
        cells = ["" if row.get(k) is None else f"{row[k]:.2f}" for k in names]
        print(f"| {row['preset']} | {row['task']} | " + " | ".join(cells) + " |")
    table = explain_failures(rows).sort_values("p")
    print("\n| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns))
    for row in table.head(14).itertuples(index=False):
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row]
        print("| " + " | ".join(cells) + " |")
    print(f"\n{len(table)} rows, {int((table.q <= 0.05).sum())} with q of .05 or less")


def main() -> None:
    """Measure or show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("--out", type=Path, default=HERE / "information.json")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--n-prompts", type=int, default=32)
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.out, given.models, given.n_prompts)
    else:
        show(given.out)


if __name__ == "__main__":
    main()
