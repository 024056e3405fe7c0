"""Where recorded runs are kept: where the model is, in the memory of the CPU, or on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..errors import FileError, TvInterpError
from ..files import make_directory
from ..models.replay import Tape

PARTS = ("resid", "keys", "values", "z")
"""What of a tape takes memory; the rest stays where it is."""


class Folder:
    """A directory that goes with its last reference, at the latest when Python ends."""

    def __init__(self, within: Path) -> None:
        """Make it within another."""
        self.path = Path(tempfile.mkdtemp(prefix="tv_interp-", dir=within))
        self.remove = weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a fork drops its references too
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Store:
    """Keeps tapes, and hands them back on the model's device.

    Attributes:
        kind: ``"model"``, ``"cpu"`` or ``"disk"``.
        folder: Where files are, for ``"disk"``.
    """

    kind: str
    folder: Folder | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Store:
        """Understand ``"model"``, ``"cpu"`` or ``"disk:DIRECTORY"``.

        Raises:
            TvInterpError: if it is none of these.
            FileError: if the directory cannot be written.
        """
        kind, _, path = text.partition(":") if isinstance(text, str) else ("", "", "")
        if (kind == "disk") != bool(path) or kind not in ("model", "cpu", "disk"):
            raise TvInterpError(
                f"expected store to be 'model', 'cpu' or 'disk:DIRECTORY', got {text!r}: "
                "write for example 'disk:/tmp'"
            )
        if kind != "disk":
            return cls(kind)
        return cls(kind, Folder(make_directory(path)))

    def keep(self, tape: Tape) -> Tape | Kept:
        """Put a tape away.

        Raises:
            FileError: if it cannot be written, as on a full disk.
        """
        if self.kind == "model":
            return tape
        tensors = {
            f"{part}.{i}": value.cpu().contiguous()
            for part in PARTS
            for i, value in enumerate(getattr(tape, part))
        }
        rest = replace(tape, **{part: [] for part in PARTS})
        if self.folder is None:
            return Kept(self, rest, tensors)
        from safetensors.torch import save_file

        number = len(list(self.folder.path.iterdir()))
        path = self.folder.path / f"{number}.safetensors"
        try:
            save_file({name: value.clone() for name, value in tensors.items()}, path)
        except Exception as error:  # safetensors has errors of its own beside OSError
            self.folder.remove()
            raise FileError(
                f"cannot write a recorded run to {path.parent.parent}: {error}; name another "
                "directory, or leave store out"
            ) from error
        return Kept(self, rest, path)


IN_PLACE = Store("model")


@dataclass(frozen=True, eq=False)
class Kept:
    """A tape that was put away.

    Attributes:
        store: Who keeps it.
        rest: The tape without its large parts.
        where: These, on the CPU or in a file.
    """

    store: Store
    rest: Tape
    where: dict[str, torch.Tensor] | Path

    def load(self, device: torch.device) -> Tape:
        """Get the tape back.

        Raises:
            FileError: if its file is gone.
        """
        from safetensors.torch import load_file

        try:
            found = self.where if isinstance(self.where, dict) else load_file(self.where)
        except Exception as error:  # safetensors has errors of its own beside OSError
            raise FileError(f"cannot read the recorded run {self.where}: record again") from error
        parts: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
        for name, value in sorted(found.items(), key=lambda item: int(item[0].split(".")[1])):
            parts[name.split(".")[0]].append(value.to(device))
        return replace(self.rest, **parts)
