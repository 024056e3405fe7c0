"""The Python in README.md and in docs/ runs, page by page, as a reader would paste it."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import NamedTuple

import pytest

import tv_interp as tv

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SMALLER = {  # what a page asks for, and what is enough to see that it runs
    "README.md": {
        "n_prompts=64": "n_prompts=12",
        "n_demos=8": "n_demos=4",
        'tv.list_tasks(family="knowledge")': '["country-capital"]',
        "k=10": "k=2",
        'method="exact"': 'method="eap"',
    },
}
N_PROMPTS = 8
"""In place of every default."""


class Block(NamedTuple):
    """A fenced block of Python: where its first line stands, its text, and why it is not run."""

    line: int
    text: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """Read the blocks of Python of a page, each with the reason that stands right above it."""
    found, lines = [], page.split("\n")
    start: int | None = None
    for i, line in enumerate(lines):
        if start is not None and line.strip() == "```":
            above = re.fullmatch(r"<!-- not run: (.*) -->", lines[start - 1])
            text = "\n".join(lines[start + 1 : i])
            found.append(Block(start + 2, text, above[1] if above else None))
            start = None
        elif start is None and re.match(r"\s*(```+|~~~+)\s*\{?(py|python|python3)\b", line):
            assert line == "```python", f"line {i + 1}: {line!r} is a block that is not found"
            start = i
    assert start is None, f"line {start}: a block that does not end"
    return found


def read(name: str) -> list[Block]:
    return blocks((ROOT / name).read_text(encoding="utf-8"))


WITH_CODE = [name for name in PAGES if read(name)]


def test_blocks_are_found_with_their_reason():
    page = "a\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n```python\ny\nz\n```\n"
    assert blocks(page) == [Block(3, "x = 1", None), Block(7, "y\nz", "needs a GPU")]
    with pytest.raises(AssertionError, match="is a block that is not found"):
        blocks("```py\nx\n```")
    assert {"README.md", "docs/index.md", "docs/migration.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_block_that_is_not_run_says_why(name):
    for block in read(name):
        if block.reason is not None:
            print(f"{name}:{block.line} is not run: {block.reason}")
            assert len(block.reason) > 10
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count("not run:") == sum(block.reason is not None for block in read(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_of_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    connect = socket.socket.connect

    def refuse(self, address):
        assert self.family == socket.AF_UNIX, f"the network was asked: {address}"
        connect(self, address)  # a sweep's own processes

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    for function in (getattr(tv, each) for each in tv.__all__):
        defaults = getattr(function, "__kwdefaults__", None) or {}
        if "n_prompts" in defaults:
            monkeypatch.setitem(defaults, "n_prompts", N_PROMPTS)
    smaller, names = dict(SMALLER.get(name, {})), {"__name__": "__page__"}
    for block in read(name):
        if block.reason is not None:
            continue
        text = block.text
        for old, new in SMALLER.get(name, {}).items():
            if old in text:
                text, _ = text.replace(old, new), smaller.pop(old, None)
        # lines of a traceback are those of the page
        exec(compile("\n" * (block.line - 1) + text, ROOT / name, "exec"), names)
    assert not smaller, "the page no longer has these"
