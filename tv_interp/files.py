"""Files that are whole or not there: nothing half-written ever stands under a final name."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import FileError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Hand out a path beside the final one, and move it there once the block has ended well.

    Raises:
        FileError: if the file cannot be written; what was there before stays.
    """
    path = Path(path)
    # a name of its own: two processes may write the same file at once, and the later one stays
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise FileError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # gone where all went well
            partial.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        FileError: if it cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write measured rows as JSON, one a line, whole or not at all.

    Raises:
        FileError: if they cannot be written.
    """
    lines = [json.dumps(row) for row in rows]
    write_text(path, "[\n " + ",\n ".join(lines) + "\n]\n")


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote.

    Raises:
        FileError: if it cannot be read or is something else.
    """
    try:
        rows = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FileError(f"expected a file of rows in {path}, got something else")
    return rows


def make_directory(path: str | os.PathLike) -> Path:
    """Make a directory, parents included.

    Raises:
        FileError: if it cannot be made or written.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot write to directory {str(path)!r}: {error.strerror}; name another directory"
        ) from error
    if not os.access(directory, os.W_OK):
        raise FileError(f"cannot write to directory {str(path)!r}: permission denied; name another")
    return directory


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write bytes, whole or not at all: libraries that write by themselves hide what went wrong.

    Raises:
        FileError: if they cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)
