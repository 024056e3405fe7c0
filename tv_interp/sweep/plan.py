"""What a sweep is asked: cells, and the grids that they come from."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import FileError, TvInterpError, unknown

Measure = Literal["writers", "readers", "local-paths", "knock-outs", "vectors"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
KINDS = {"int": int, "str": str, "str | None": (str, type(None))}
"""What the fields of a cell may be, by annotation."""


@dataclass(frozen=True, order=True)
class Cell:
    """What one run is asked; its hash names its file.

    Attributes:
        measure: ``writers``, ``readers`` (`patch_heads` at ``answer``, at ``query_is``),
            ``local-paths`` (`patch_local_paths`), ``knock-outs`` (`knock_out`: no corruption is
            used) or ``vectors`` (`inject_vectors`: local ones into dummy prompts).
        model: A preset, a directory or a hub name, as for `load_model`; or what ``load`` knows.
        task: Name of a task.
        corruption: As for `Prompts.corrupt`; None for the first of the task's family.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts.
        seed: Decides prompts and corruption.
        metric: Name of a metric.
        direction: ``denoise`` or ``noise``.
        template: As for `make_prompts`.
        backend: TransformerLens class, as for `load_model`.
    """

    measure: str
    model: str = "reference"
    task: str = "country-capital"
    corruption: str | None = None
    n_demos: int = 8
    n_prompts: int = 64
    seed: int = 0
    metric: str = "logit_diff"
    direction: str = "denoise"
    template: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        for each in fields(self):
            value, kind = getattr(self, each.name), KINDS[str(each.type)]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TvInterpError(f"expected {each.name} of type {each.type}, got {value!r}")
        if self.measure not in MEASURES:
            raise unknown("measure", self.measure, MEASURES)
        if self.direction not in ("denoise", "noise"):
            raise unknown("direction", self.direction, ("denoise", "noise"))
        for name in ("n_demos", "n_prompts"):
            if getattr(self, name) < 1:
                raise TvInterpError(f"expected {name} of 1 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise TvInterpError(f"expected seed of 0 or more, got {self.seed}")

    @property
    def key(self) -> str:
        """Hash of what is asked: the same on every machine."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def __str__(self) -> str:
        """Name what differs from the defaults, and always model, task and seed."""
        shown = {"model", "task", "seed"}
        plain = {f.name: f.default for f in fields(self)}
        parts = [
            f"{name}={value}"
            for name, value in asdict(self).items()
            if name != "measure" and (name in shown or value != plain[name])
        ]
        return f"{self.measure}({', '.join(parts)})"


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep.

    Attributes:
        cells: In the order in which they run: by model, so that each is loaded once.
    """

    cells: tuple[Cell, ...]

    @classmethod
    def of(
        cls,
        measure: Measure | Sequence[Measure],
        grid: Mapping[str, Sequence[Any]],
        **settings: Any,
    ) -> Plan:
        """Make the cells of a grid.

        Args:
            measure: What is measured, one name or several.
            grid: Values by field of `Cell`; every combination is a cell.
            **settings: Fields of `Cell` that are the same for all cells.

        Raises:
            UnknownName: if a field or a measure is not known.
            TvInterpError: if a value is not of its field's type, or there are no cells.
        """
        known = [f.name for f in fields(Cell) if f.name != "measure"]
        for name in (*grid, *settings):
            if name not in known:
                raise unknown("field of a cell", name, known)
        if both := set(grid) & set(settings):
            raise TvInterpError(f"{sorted(both)} are in the grid and in the settings: choose one")
        measures = [measure] if isinstance(measure, str) else list(measure)
        for name, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise TvInterpError(f"expected a list of values for {name}, got {values!r}")
        cells = {
            Cell(what, **dict(zip(grid, values, strict=True)), **settings)
            for what in measures
            for values in itertools.product(*grid.values())
        }
        if not cells:
            raise TvInterpError("the grid has no cells: give each field at least one value")
        return cls(tuple(sorted(cells, key=lambda c: (c.model, c.backend, str(asdict(c))))))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan from a YAML file of ``measure``, ``grid`` and settings.

        The file names things; it cannot run code or say where results go.

        Raises:
            FileError: if it cannot be read, or is no YAML mapping.
            TvInterpError: as `of`.
        """
        import yaml

        try:
            given = yaml.safe_load(Path(path).read_text("utf-8"))
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise FileError(f"{path} is no YAML file: {reason}") from error
        if not isinstance(given, dict) or not all(isinstance(k, str) for k in given):
            raise FileError(f"expected {path} to hold 'measure:' and 'grid:', got {given!r:.60}")
        given = dict(given)
        measure, grid = given.pop("measure", None), given.pop("grid", {})
        if not isinstance(grid, dict) or not all(isinstance(k, str) for k in grid):
            raise FileError(f"expected grid: of {path} to map fields to lists, got {grid!r:.60}")
        if not isinstance(measure, str) and not (isinstance(measure, list) and measure):
            raise FileError(f"{path} has no measure: one of {', '.join(MEASURES)}")
        return cls.of(measure, grid, **given)  # type: ignore[arg-type]
