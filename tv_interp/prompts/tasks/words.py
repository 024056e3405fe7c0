"""The word lists that ship with the package, read from ``data/``."""

from __future__ import annotations

import csv
import string
from functools import cache
from importlib.resources import files

_DATA = files("tv_interp") / "prompts" / "tasks" / "data"
NUMBERS = tuple(str(n) for n in range(100))
LETTERS = tuple(string.ascii_lowercase)
DECADES = (
    "ones",
    "tens",
    "twenties",
    "thirties",
    "forties",
    "fifties",
    "sixties",
    "seventies",
    "eighties",
    "nineties",
)


@cache
def table(name: str) -> tuple[dict[str, str], ...]:
    """Read the rows of ``data/<name>.tsv``, one dict of column to word for each row."""
    with (_DATA / f"{name}.tsv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file, delimiter="\t"))


def column(name: str, key: str) -> tuple[str, ...]:
    """Read one column of a table, in order, repeats included."""
    return tuple(row[key] for row in table(name))


@cache
def label_words() -> tuple[str, ...]:
    """Read the label words that the reference models see as labels in training."""
    return tuple(w for i, w in enumerate(_all_label_words()) if i % 10 != 9)


@cache
def held_out_label_words() -> tuple[str, ...]:
    """Read the label words that never name a class in the reference models' training."""
    return tuple(w for i, w in enumerate(_all_label_words()) if i % 10 == 9)


def unanswered_label_words() -> tuple[str, ...]:
    """List those held-out label words that are never an answer in training, only inputs.

    The other held-out words are answers of look-up prompts, but never of categorization.
    """
    return held_out_label_words()[1::2]


@cache
def _all_label_words() -> tuple[str, ...]:
    return tuple((_DATA / "labels.txt").read_text("utf-8").split())
