"""Which role each token of a prompt plays, from the character spans of the template.

1. A prompt is rendered segment by segment, so every character belongs to a known role.
2. The tokenizer says which characters each token covers (offsets; nothing is ever decoded).
3. A token takes the role of its characters, leading and trailing white space left aside: the space
   that many tokenizers put in front of a word belongs to the word, also where it is a token of its
   own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ..errors import PromptError, unknown
from .tasks.base import Pair


class Role(IntEnum):
    """What a token is for. The value is its code in role arrays; the name is what users write."""

    other = 0
    """Template text in front of an input."""
    bos = 1
    x = 2
    """A demonstration's input."""
    is_ = 3
    """The connective between input and answer, whatever its text (written ``"is"``)."""
    answer = 4
    """A demonstration's answer."""
    end = 5
    """What separates a demonstration from the next; absent where it is no token."""
    query_x = 6
    query_is = 7
    """The query's connective; its last token is where the answer is predicted."""

    @property
    def label(self) -> str:
        """The name as users write it."""
        return self.name.rstrip("_")


DEMO_ROLES = (Role.x, Role.is_, Role.answer, Role.end)
ROLE_NAMES = tuple(role.label for role in Role)


def parse_role(name: str | Role) -> Role:
    """Get a role by the name that users write.

    Raises:
        UnknownName: if there is no such role; the message has the nearest names.
    """
    if isinstance(name, Role):
        return name
    if name not in ROLE_NAMES:
        raise unknown("role", name, ROLE_NAMES)
    return Role[name if name != "is" else "is_"]


@dataclass(frozen=True)
class Template:
    """A template split at ``{x}`` and ``{y}``: text before x, between, and after y."""

    text: str
    before: str
    between: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Template:
        """Split a template.

        Raises:
            PromptError: if ``{x}`` or ``{y}`` is missing or repeated, they are in the other order,
                or nothing but white space stands between them.
        """
        match = re.fullmatch(r"(.*?)\{x\}(.*?)\{y\}(.*)", text, flags=re.DOTALL)
        if not match or text.count("{x}") != 1 or text.count("{y}") != 1:
            raise PromptError(
                f"expected a template with {{x}} and then {{y}}, once each, got {text!r}: "
                "write for example '{x} is {y}\\n'"
            )
        if not match[2].strip():
            raise PromptError(
                f"expected a connective between {{x}} and {{y}}, got {text!r}: "
                "write for example '{x} -> {y}\\n'"
            )
        return cls(text, *match.groups())

    def render(self, demos: list[Pair], query: str) -> list[tuple[str, Role, int]]:
        """Write a prompt as segments of (text, role, demonstration or -1); it ends at query_is."""
        out = []
        for i, (x, y) in enumerate(demos):
            out += [
                (self.before, Role.other, i),
                (x, Role.x, i),
                (self.between, Role.is_, i),
                (y, Role.answer, i),
                (self.after, Role.end, i),
            ]
        connective = self.between.removesuffix(" ")
        out += [(self.before, Role.other, -1), (query, Role.query_x, -1)]
        return [*out, (connective, Role.query_is, -1)]

    @property
    def gap(self) -> str:
        """The space that belongs to the answer, where the connective ends in one."""
        return " " if self.between.endswith(" ") else ""


class Misaligned(Exception):
    """A prompt that this tokenizer cannot cut at its roles: left out and counted with a reason."""


def assign_roles(
    text: str,
    segments: list[tuple[str, Role, int]],
    offsets: list[tuple[int, int]],
) -> tuple[list[Role], list[int]]:
    """Give each token its role and its demonstration (-1 outside of demonstrations).

    Args:
        text: The prompt; the segments' texts joined.
        segments: What `Template.render` made.
        offsets: First and last character (exclusive) of each token.

    Raises:
        Misaligned: if a token covers characters of two roles.
        PromptError: if a word has no token at all: the tokenizer drops it.
    """
    owner: list[int] = []
    words = set()
    for i, (part, role, _) in enumerate(segments):
        if role in (Role.x, Role.answer, Role.query_x):
            words.add(len(owner))
        owner += [i] * len(part)
    roles, demos, seen = [], [], set()
    for start, end in offsets:
        inner = text[start:end].strip()
        if inner:
            first = text.index(inner[0], start)
            last = first + len(inner) - 1
            seen.add(owner[first])
        else:
            start = end if text[start:end] == " " and end in words else start
            first = last = min(start, len(text) - 1)
        _, role, demo = segments[owner[first]]
        if owner[first] != owner[last]:
            raise Misaligned(f"a token covers {role.label} and {segments[owner[last]][1].label}")
        roles.append(role)
        demos.append(demo)
    for i, (part, role, _) in enumerate(segments):
        needed = role in (Role.x, Role.answer, Role.query_x, Role.is_, Role.query_is)
        if needed and i not in seen:
            raise PromptError(
                f"the tokenizer drops {part!r} ({role.label}): it has no token for it; "
                "use another word or template"
            )
    return roles, demos


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer without character offsets.

    Raises:
        PromptError: if it is None or a slow tokenizer.
    """
    if tokenizer is None:
        raise PromptError(
            "the model has no tokenizer: set model.tokenizer, or load the model with load_model"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"expected a fast tokenizer with character offsets, got {type(tokenizer).__name__}: "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
