"""What dropout does at full size: three shipped models that differ in what training dropped.

    python benchmarks/dropout.py

Prints the table of docs/reference_models.md from what the model cards measured
(`python -m tv_interp.show.card --parts phenomena`). Intervals are over relations, of one trained
model each: they do not say what another seed would do.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap

from tv_interp.files import read_rows
from tv_interp.models.load import reference_directory
from tv_interp.show.phenomena import CLEAR

NOTHING, *OTHERS = MODELS = ("reference-nodropout", "reference", "reference-tokendropout")


def gains(model: str, kind: str) -> np.ndarray:
    """Get the gain of a vector in each relation, in the order of the card."""
    directory = reference_directory(model)
    assert directory is not None
    rows = read_rows(directory / "phenomena.json")
    of_kind = [r for r in rows if r["kind"] == kind and r["family"] == "knowledge"]
    return np.array([r["gain_value"] for r in sorted(of_kind, key=lambda r: r["task"])])


def main() -> None:
    """Print the table."""
    print("| vector | model | relations that gain | mean gain | difference to nothing dropped |")
    print("|---|---|---|---|---|")
    for kind in ("global", "global, Trial Avg", "local"):
        plain = gains(NOTHING, kind)
        for model in MODELS:
            here = gains(model, kind)
            cells = [kind, model, f"{(here >= CLEAR).sum()} of {len(here)}", f"{here.mean():.2f}"]
            if model in OTHERS:
                change = here - plain
                low, high = bootstrap(
                    (change,), np.mean, method="percentile", rng=np.random.default_rng(0)
                ).confidence_interval
                cells.append(f"{change.mean():+.2f} [{low:.2f}, {high:.2f}]")
            print("| " + " | ".join([*cells, ""][:5]) + " |")


if __name__ == "__main__":
    main()
