"""Knowledge relations over shared inputs, and the pairs that bijections are made of.

A relation is *typed* where the answer alone tells it from its neighbours (a currency is no
capital), and *shared* where another relation has the same inputs and the same answers, so that only
the pair tells: France-Paris and France-Madrid are both country and capital, but of two relations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .base import PairTask
from .words import DECADES, LETTERS, NUMBERS, column

Pairs = Mapping[str, str]


def _columns(table: str, x: str, y: str) -> dict[str, str]:
    return dict(zip(column(table, x), column(table, y), strict=True))


def _step(words: Sequence[str], by: int, change: Callable[[str], str] = str) -> dict[str, str]:
    return {w: change(words[(i + by) % len(words)]) for i, w in enumerate(words)}


def _after(first: Pairs, then: Pairs) -> dict[str, str]:
    return {x: then[y] for x, y in first.items()}


def relations() -> dict[str, dict[str, str]]:
    """Build every relation as ``{name: {input: answer}}``."""
    country = {
        y: _columns("countries", "country", y)
        for y in ("capital", "language", "currency", "continent", "neighbour")
    }
    capital = {y: _columns("countries", "capital", y) for y in ("country", "language", "continent")}
    adjective = {
        y: _columns("adjectives", "adjective", y) for y in ("antonym", "comparative", "superlative")
    }
    verb = {y: _columns("verbs", "verb", y) for y in ("past", "gerund", "third")}
    months = column("months", "month")
    out: dict[str, dict[str, str]] = {}
    out |= {f"country-{y}": pairs for y, pairs in country.items()}
    out |= {
        f"country-neighbour-{y}": _after(country["neighbour"], country[y])
        for y in ("capital", "language")
    }
    out |= {f"capital-{y}": pairs for y, pairs in capital.items()}
    out |= {f"adjective-{y}": pairs for y, pairs in adjective.items()}
    out["adjective-antonym-comparative"] = _after(adjective["antonym"], adjective["comparative"])
    out |= {f"verb-{y}": pairs for y, pairs in verb.items()}
    out["noun-plural"] = _columns("nouns", "noun", "plural")
    out["letter-next"] = _step(LETTERS, 1)
    out["letter-previous"] = _step(LETTERS, -1)
    out["letter-upper"] = _step(LETTERS, 0, str.upper)
    out["letter-next-upper"] = _step(LETTERS, 1, str.upper)
    out["month-next"] = _step(months, 1)
    out["month-previous"] = _step(months, -1)
    out["number-next"] = _step(NUMBERS, 1)
    out["number-previous"] = _step(NUMBERS, -1)
    out["number-decade"] = {n: DECADES[int(n) // 10] for n in NUMBERS}
    out["number-parity"] = {n: ("even", "odd")[int(n) % 2] for n in NUMBERS}
    return out


PARTNERS = {
    # Shared answers: the same inputs and the same answer set, another relation.
    "country-capital": "country-neighbour-capital",
    "country-neighbour-capital": "country-capital",
    "country-language": "country-neighbour-language",
    "country-neighbour-language": "country-language",
    "adjective-comparative": "adjective-antonym-comparative",
    "adjective-antonym-comparative": "adjective-comparative",
    "letter-next": "letter-previous",
    "letter-previous": "letter-next",
    "letter-upper": "letter-next-upper",
    "letter-next-upper": "letter-upper",
    "month-next": "month-previous",
    "month-previous": "month-next",
    "number-next": "number-previous",
    "number-previous": "number-next",
    # Typed: the same inputs, answers of another kind.
    "country-currency": "country-capital",
    "country-continent": "country-currency",
    "country-neighbour": "country-currency",
    "capital-country": "capital-language",
    "capital-language": "capital-country",
    "capital-continent": "capital-country",
    "adjective-antonym": "adjective-superlative",
    "adjective-superlative": "adjective-antonym",
    "verb-past": "verb-gerund",
    "verb-gerund": "verb-past",
    "verb-third": "verb-past",
    "number-decade": "number-next",
    "number-parity": "number-decade",
}

SHARED = frozenset(
    {
        "country-capital",
        "country-neighbour-capital",
        "country-language",
        "country-neighbour-language",
        "adjective-comparative",
        "adjective-antonym-comparative",
        "letter-next",
        "letter-previous",
        "letter-upper",
        "letter-next-upper",
        "month-next",
        "month-previous",
        "number-next",
        "number-previous",
    }
)


def knowledge_tasks() -> list[PairTask]:
    """Build one task for every relation."""
    return [
        PairTask(name, pairs, partner=PARTNERS.get(name)) for name, pairs in relations().items()
    ]
