"""Every error that bad input can cause: what was expected, what came, what to do.

One family, so that ``except TvInterpError`` is enough. A message is one line. Mistakes of our own
are plain ``assert`` statements and never reach a user on purpose.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral


class TvInterpError(ValueError):
    """Base of all errors that tv_interp raises on purpose."""


class UnknownName(TvInterpError):
    """A name that is not in a list of names: the message says which are nearest."""


class PromptError(TvInterpError):
    """Prompts that cannot be built or aligned."""


class ModelError(TvInterpError):
    """A model, architecture or hook that cannot be used exactly."""


class ScoreError(TvInterpError):
    """Scores that cannot be computed, combined or normalised."""


class TrainingError(TvInterpError):
    """Training that diverged: the message has the step and the last finite loss."""


class FileError(TvInterpError):
    """A file that cannot be read or written."""


def check_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        TvInterpError: if it is negative or no whole number.
    """
    if not isinstance(seed, Integral) or seed < 0:
        raise TvInterpError(f"expected seed to be a whole number of 0 or more, got {seed!r}")


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """Build the error for a name that is not known, with the nearest names first.

    Args:
        kind: What was being looked up, as a noun: ``"task"``.
        name: What came.
        known: Every name that would have been accepted.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "known are"
    listed = "" if near else " " + ", ".join(names)
    return UnknownName(f"unknown {kind} {name!r}: {hint}{listed}")
