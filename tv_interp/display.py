"""How results show themselves: as text at 80 columns, and as HTML in a notebook.

An object says once what is to be seen, as blocks: lines of text, tables, tokens above their roles.
The HTML has no script and takes ink and ground from the page, so that light and dark both work.
Everything in it is escaped.
"""

from __future__ import annotations

import html
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH = 80
_TINTS = {  # of roles, mixed into the page's ground
    "x": "86,180,233", "answer": "213,94,0", "query_x": "0,158,115", "query_is": "204,121,167",
}  # fmt: skip
_REST = "128,128,128"


class Table(NamedTuple):
    """Rows of cells under names. Columns of numbers, written with a sign or digit first, go right.

    Attributes:
        names: Of the columns.
        rows: Cells as text.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[str]]


class Tokens(NamedTuple):
    """Tokens of one prompt above their roles.

    Attributes:
        cells: For each token its text, the name of its role, and its label (role and
            demonstration).
        title: What stands before it.
    """

    cells: Sequence[tuple[str, str, str]]
    title: str = ""


Block = str | Table | Tokens


class Shown:
    """A result that shows itself; a class says what by ``_blocks``, or has ``__str__`` alone."""

    def _blocks(self) -> Iterable[Block]:
        yield str(self)

    def __repr__(self) -> str:
        """As it is printed."""
        return str(self)

    def _repr_html_(self) -> str:
        """Write for a notebook."""
        return as_html(self._blocks())


def _visible() -> dict[int, str]:
    """Map characters that would break a line, steer a terminal or turn text around to signs."""
    signs = {i: chr(0x2400 + i) for i in range(32)} | {0x7F: "␡", 0x2028: "↵", 0x2029: "↵"}
    turns = (*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    signs |= {i: f"\\u{i:04x}" for i in turns}
    return signs | {ord("\n"): "↵", ord("\r"): "␍", ord("\t"): "⇥"}


_VISIBLE = _visible()


def readable(token: str) -> str:
    """Write line breaks, tabs and other control characters as signs, and nothing as ∅."""
    return str(token).translate(_VISIBLE) or "∅"


def columns(text: str) -> int:
    """Count the columns that a text takes in a terminal: East Asian and emoji take two."""
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2 if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )  # fmt: skip


def as_text(blocks: Iterable[Block], width: int = WIDTH) -> str:
    """Write blocks as text, in lines of at most ``width`` columns where words allow it."""
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            parts.append(_table_text(block, width))
        elif isinstance(block, Tokens):
            title = [block.title] if block.title else []
            parts.append("\n".join([*title, _tokens_text(block, width)]))
        else:
            parts.append("\n".join(wrapped(block.split("\n"), width)))
    return "\n\n".join(parts)


def wrapped(lines: Sequence[str], width: int = WIDTH) -> list[str]:
    """Break the lines longer than ``width``; what is broken off stands 4 further in than they."""
    out = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        broken = textwrap.wrap(line, width, subsequent_indent=indent)
        out += broken if len(line) > width else [line]
    return out


def as_html(blocks: Iterable[Block]) -> str:
    """Write blocks as a fragment of a page."""
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            parts.append(_table_html(block))
        elif isinstance(block, Tokens):
            parts.append(tokens_html(block))
        else:
            parts.append(
                '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;background:none;'
                f'color:inherit;margin:.4em 0;padding:0">{html.escape(block)}</pre>'
            )
    return f'<div class="tv-shown" style="max-width:100%">{"".join(parts)}</div>'


def tokens_html(tokens: Tokens) -> str:
    """Write tokens as boxes in the colour of their role; one that turns text around stays alone."""
    boxes = "".join(
        f'<span style="background:rgba({_TINTS.get(role, _REST)},.25);border-radius:4px;'
        "padding:.1em .35em;max-width:100%;overflow-wrap:anywhere;font:.85em/1.3 ui-monospace,"
        f'monospace"><bdi>{html.escape(readable(text))}</bdi><small style="display:block;'
        f'opacity:.75;font:.8em/1.2 system-ui,sans-serif">{html.escape(label)}</small></span>'
        for text, role, label in tokens.cells
    )
    title = f"<div>{html.escape(tokens.title)}</div>" if tokens.title else ""
    return (
        f'{title}<div class="tokens" style="display:flex;flex-wrap:wrap;gap:3px;'
        f'margin:.3em 0 .8em">{boxes}</div>'
    )


def _is_number(cell: str) -> bool:
    return cell[:1] in set("+-−0123456789.") or not cell


def _sides(table: Table) -> list[bool]:
    """Which columns stand at the right."""
    return [all(map(_is_number, column)) for column in zip(*table.rows, strict=True)] or [
        False for _ in table.names
    ]


def _table_text(table: Table, width: int) -> str:
    rows = [[readable(cell) if cell else "" for cell in row] for row in table.rows]
    sides = _sides(table)
    sizes = [max(map(columns, column)) for column in zip(table.names, *rows, strict=True)]
    while sum(sizes) + 2 * (len(sizes) - 1) > width and max(sizes) > 8:
        sizes[sizes.index(max(sizes))] -= 1  # the widest gives way
    lines = []
    for row in (table.names, *rows):
        cells = (
            _pad(_short(cell, size), size, right)
            for cell, size, right in zip(row, sizes, sides, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(text: str, size: int) -> str:
    if columns(text) <= size:
        return text
    while columns(text) > size - 1:
        text = text[:-1]
    return text + "…"


def _pad(text: str, size: int, right: bool = False) -> str:
    space = " " * (size - columns(text))
    return space + text if right else text + space


def _tokens_text(tokens: Tokens, width: int) -> str:
    lines, pieces, roles, taken = [], [], [], 0
    for text, _, label in tokens.cells:
        text = _short(readable(text), width)
        size = max(columns(text), columns(label))
        if pieces and taken + size > width:
            lines += [" ".join(pieces).rstrip(), " ".join(roles).rstrip(), ""]
            pieces, roles, taken = [], [], 0
        pieces.append(_pad(text, size))
        roles.append(_pad(label, size))
        taken += size + 1
    return "\n".join([*lines, " ".join(pieces).rstrip(), " ".join(roles).rstrip()])


def _table_html(table: Table) -> str:
    sides = _sides(table)

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} style="padding:.2em .7em .2em 0;vertical-align:top;'
            f"text-align:{'right' if right else 'left'};"
            f'{"white-space:nowrap" if len(text) < 30 else "min-width:12em"}">'
            f"<bdi>{html.escape(readable(text)) if text else ''}</bdi></{tag}>"
            for text, right in zip(cells, sides, strict=True)
        )

    body = "".join(f"<tr>{row(each, 'td')}</tr>" for each in table.rows)
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;color:inherit;'
        f'margin:.4em 0;font-size:.9em"><thead><tr>{row(table.names, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
