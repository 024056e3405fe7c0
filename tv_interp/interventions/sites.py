"""Where a run is changed, and to what: every method is a list of these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import TvInterpError, UnknownName, unknown
from ..prompts.roles import DEMO_ROLES, parse_role

Head = tuple[int, int]
"""A head as (layer, head)."""

_PATTERN = re.compile(r"L(\d+)(?:H(\d+))?\.(\w+)@(\w+?)(?:\[(\d+)\])?")
HEAD_COMPONENTS = ("q", "k", "v", "z")
BLOCK_COMPONENTS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


@dataclass(frozen=True, order=True)
class Site:
    """An activation of one head, or of a whole block, at the tokens of one role.

    Prints and parses as ``L11H3.z@answer[2]`` or ``L11.resid_post@answer[2]``; without a
    demonstration it stands for all of them.

    Attributes:
        layer: Block, from 0.
        head: Head in the block, from 0; None for components of the block.
        component: ``q``, ``k``, ``v`` or ``z`` of a head; ``resid_pre``, ``attn_out``, ``mlp_out``
            or ``resid_post`` of a block.
        role: A role's name; the last token of each span is meant.
        demo: Demonstration, from 0; None for all, and for roles outside of demonstrations.
    """

    layer: int
    head: int | None
    component: str = "z"
    role: str = "answer"
    demo: int | None = None

    def __post_init__(self) -> None:
        """Refuse unknown roles and components.

        Raises:
            UnknownName: if role or component is not known, a component of heads has no head or one
                of blocks has one, or a demonstration is given for a role outside of
                demonstrations.
        """
        role = parse_role(self.role)
        if self.component not in HEAD_COMPONENTS + BLOCK_COMPONENTS:
            raise unknown("component", self.component, HEAD_COMPONENTS + BLOCK_COMPONENTS)
        if (self.head is None) is (self.component in HEAD_COMPONENTS):
            of, some = ("heads", "a head") if self.head is None else ("blocks", "no head")
            raise UnknownName(
                f"{self.component!r} is a component of {of}: expected {some}, got head={self.head}"
            )
        if self.demo is not None and role not in DEMO_ROLES:
            raise UnknownName(
                f"role {self.role!r} is outside of demonstrations, got demo={self.demo}: "
                "leave it out"
            )

    def __str__(self) -> str:
        """Write as ``L11H3.z@answer[2]``."""
        head = "" if self.head is None else f"H{self.head}"
        demo = "" if self.demo is None else f"[{self.demo}]"
        return f"L{self.layer}{head}.{self.component}@{self.role}{demo}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read what ``str(site)`` wrote.

        Raises:
            UnknownName: if the text is no site.

        Example:
            >>> Site.parse("L11H3.z@answer[2]")
            Site(layer=11, head=3, component='z', role='answer', demo=2)
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise UnknownName(
                f"expected a site such as 'L11H3.z@answer[2]' or 'L11H3.z@query_is', got {text!r}"
            )
        layer, head, component, role, demo = match.groups()
        number = None if head is None else int(head)
        return cls(int(layer), number, component, role, None if demo is None else int(demo))

    @property
    def at(self) -> Head:
        """The head as (layer, head)."""
        assert self.head is not None
        return self.layer, self.head


@dataclass(frozen=True, order=True)
class Edge:
    """A way from what one head writes to what another reads.

    Attributes:
        sender: Where it is written.
        receiver: Where it is read.
        via: Which input of the receiver: ``"q"``, ``"k"``, ``"v"`` or ``"kv"``.
    """

    sender: Site
    receiver: Site
    via: Literal["q", "k", "v", "kv"]

    def __str__(self) -> str:
        """Write as ``sender -> receiver via k``."""
        return f"{self.sender} -> {self.receiver} via {self.via}"


@dataclass(frozen=True, eq=False)
class Patch:
    """A change to a run: a site, and what to put there.

    Attributes:
        site: Where.
        value: ``[prompt, demo, d_head]`` for roles of demonstrations (``[prompt, d_head]`` where
            the site names one), ``[prompt, d_head]`` for the others; d_model in place of d_head
            for components of blocks.
        mode: ``"replace"`` the activation or ``"add"`` to it.
        positions: ``[prompt, place]`` tokens that are meant instead of the role's, with a value
            ``[prompt, place, ...]``; None for those of the site's role.
    """

    site: Site
    value: Tensor
    mode: Literal["replace", "add"] = "replace"
    positions: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Cut:
    """Attention taken away: scores set to minus infinity, so the softmax renormalises.

    Attributes:
        layer: Block.
        head: Head in the block.
        dest: ``[prompt, pos]`` tokens that may no longer look.
        src: ``[prompt, pos]`` tokens that they may no longer look at.
    """

    layer: int
    head: int
    dest: Tensor
    src: Tensor

    def __post_init__(self) -> None:
        """Refuse a cut that leaves a token nothing to attend to.

        Raises:
            TvInterpError: naming the first such prompt and token.
        """
        n = self.dest.shape[-1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        left = causal & ~self.src[:, None, :]
        blind = self.dest & ~left.any(-1)
        if blind.any():
            row, pos = blind.nonzero()[0].tolist()
            raise TvInterpError(
                f"the cut leaves token {pos} of prompt {row} nothing to attend to: cut fewer roles"
            )


Variant = tuple[Patch | Cut, ...]
"""Changes that are made in the same run."""
