"""Attention and token views of circuitsvis, safe to put into any page.

Bare circuitsvis puts 1.3 MB of script into each figure, leaves its element open (a second figure
then swallows the rest of the page), runs markup that stands in tokens, and asks google.com before
it shows itself. Here a view is data alone; the script stands once in a page; tokens are escaped
where the component takes HTML; nothing asks anybody. Patterns too large for circuitsvis to draw in
seconds become a plotly heatmap with a head drop-down.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..display import readable
from ..errors import TvInterpError
from .plots import _inline, _Sheet, check_id, fragment, plotly_script, read_asset, script_json

MAX_CELLS = 45_000
"""Heads x tokens^2 above which circuitsvis takes more than some ten seconds to draw."""

_CALL = re.compile(r"render\(\s*\"[^\"]+\",\s*(\w+),\s*(\{.*\})\s*\)\s*</script>\s*$", re.DOTALL)


@dataclass(frozen=True)
class View:
    """A picture for notebooks and pages.

    Attributes:
        html: A fragment of a page, without the script it needs.
        needs: Which script must stand in the page before it: `bundle_script` or `plotly_script`.
    """

    html: str
    needs: Literal["circuitsvis", "plotly"]
    _name: str = "tv-view"

    def _repr_html_(self) -> str:
        """Write for a notebook, with the script, under an id of its own at each display."""
        script = bundle_script() if self.needs == "circuitsvis" else plotly_script()
        return script + self.html.replace(self._name, f"tv-{uuid.uuid4().hex[:12]}")


def attention_view(
    patterns: Any, tokens: Sequence[str], names: Sequence[str], *, name: str | None = None
) -> View:
    """Show the attention of several heads on one prompt.

    Args:
        patterns: ``[head, dest, src]``, as tensor, array or lists.
        tokens: Labels of the positions, shown as they are.
        names: A short name for each head; thumbnails are narrow.
        name: Id of the element; None for one made from the content.

    Raises:
        TvInterpError: if shapes do not agree, or a number is not finite.
    """
    values = _array(patterns, "patterns", 3)
    labels = [readable(token) for token in tokens]
    n = len(labels)
    if values.shape != (len(names), n, n) or 0 in values.shape:
        raise TvInterpError(
            f"expected patterns [head, dest, src] of shape ({len(names)}, {n}, {n}) for "
            f"{len(names)} names and {n} tokens, got {values.shape}"
        )
    if values.size > MAX_CELLS:
        return _attention_heatmap(values, labels, names, name)
    from circuitsvis.attention import attention_heads

    # drawn on a canvas: tokens are no HTML there and must not be escaped
    figure = attention_heads(
        attention=values.tolist(),
        tokens=labels,
        attention_head_names=[str(each) for each in names],
        min_value=0,
        max_value=1,
        mask_upper_tri=True,
    )
    return _view(figure, name)


def token_view(
    tokens: Sequence[str],
    values: Any,
    *,
    min_value: float | None = None,
    max_value: float | None = None,
    name: str | None = None,
) -> View:
    """Show tokens on a ground coloured by value: blue above 0, red below.

    Args:
        tokens: The tokens, shown as they are; nothing in them runs.
        values: One number for each token.
        min_value: Value of the strongest red; None for minus the largest absolute value.
        max_value: Value of the strongest blue; None for the largest absolute value.
        name: Id of the element; None for one made from the content.

    Raises:
        TvInterpError: if there is not one finite number for each token.
    """
    numbers = _array(values, "values", 1)
    if numbers.shape != (len(tokens),) or not len(tokens):
        raise TvInterpError(
            f"expected one value for each of {len(tokens)} tokens, got shape {numbers.shape}"
        )
    largest = float(abs(numbers).max()) or 1.0
    from circuitsvis.tokens import colored_tokens

    figure = colored_tokens(
        # this component sets tokens as HTML
        tokens=[html.escape(readable(token)) for token in tokens],
        values=numbers.tolist(),
        min_value=-largest if min_value is None else float(min_value),
        max_value=largest if max_value is None else float(max_value),
    )
    return _view(figure, name)


def logits_view(
    ids: Sequence[int],
    logits: Any,
    to_string: Callable[[int], str],
    *,
    top: int = 5,
    name: str | None = None,
) -> View:
    """Show the tokens of a prompt by how likely the model held them; pointing lists its best.

    Redder: likelier. The first token, which nothing predicts, is not shown.

    Args:
        ids: The prompt's tokens, and after them the one that should come next.
        logits: ``[pos, vocab]`` at the prompt's tokens.
        to_string: From a token to its text, shown as it is; nothing in it runs.
        top: How many of the likeliest tokens are listed.
        name: Id of the element; None for one made from the content.

    Raises:
        TvInterpError: if there is not one row of finite logits for each token but the last, or an
            id or ``top`` lies outside of the vocabulary.
    """
    import torch

    values = _array(logits, "logits", 2)
    n, size = values.shape
    wanted = [int(each) for each in ids]
    if len(wanted) != n + 1 or n == 0:
        raise TvInterpError(
            f"expected logits [pos, vocab] with a row for each of {len(wanted)} tokens but the "
            f"last, which nothing follows, got {n}"
        )
    if not (1 <= top <= size and all(0 <= each < size for each in wanted)):
        raise TvInterpError(
            f"expected tokens from 0 to {size - 1} and top from 1 to {size}, the size of the "
            f"vocabulary, got {max(wanted, key=abs)} and {top}"
        )
    from circuitsvis.logits import token_log_probs

    likely = torch.from_numpy(values).log_softmax(-1)
    figure = token_log_probs(
        torch.tensor(wanted),
        torch.cat([likely, likely[-1:]]),  # the last row is not used: nothing follows
        # this component sets tokens as HTML
        lambda token: html.escape(readable(to_string(token))),
        top_k=top,
    )
    # the component leaves 350 pixels for its list, whatever is in it
    return _view(figure, name, f"#{{}}>div{{{{padding-bottom:{110 + 25 * top}px !important}}}}")


def bundle_script() -> str:
    """Write circuitsvis as one script element, to stand once in a page, before its views.

    A classic script: as a module it would keep its names to itself. A second copy does nothing.
    """
    script = _inline(read_asset("circuitsvis", "dist", "cdn", "iife.js"))
    return (
        f"<script>if(!globalThis.CircuitsVis){{{script}\n"
        "globalThis.CircuitsVis=CircuitsVis;}</script>\n"
    )


def _view(figure: Any, name: str | None, style: str = "") -> View:
    """Take component and data out of what circuitsvis made, and leave everything else."""
    match = _CALL.search(figure.cdn_src)
    try:
        if match is None:
            raise ValueError("no call of render")
        component = match[1]
        props = json.loads(match[2], parse_float=lambda text: round(float(text), 3))
    except ValueError as error:
        from importlib.metadata import version

        raise TvInterpError(
            f"the output of circuitsvis {version('circuitsvis')} has another form than tv_interp "
            f"reads ({error}): install circuitsvis 1.43.3"
        ) from error
    data = script_json(props)
    name = _name(name, data)
    call = f"CircuitsVis.render({script_json(name)},CircuitsVis.{component},{data})"
    return View(
        # the enlarged head would else be as small as its labels leave it
        f'<style>#{name} div[style*="min("]{{width:100% !important;max-width:640px !important}}'
        f"{style.format(name)}</style>\n"
        f'<div id="{name}" class="tv-view" style="max-width:760px">This figure needs JavaScript.'
        "</div>\n"
        "<script>(function(){var n=0;(function go(){"
        f"if(globalThis.CircuitsVis){{{call}}}else if(n++<100){{setTimeout(go,100)}}"
        "})()})();</script>\n",
        "circuitsvis",
        name,
    )


def _attention_heatmap(
    values: np.ndarray, labels: Sequence[str], names: Sequence[str], name: str | None
) -> View:
    positions = list(range(len(labels)))
    step = -(-len(positions) // 40)
    ticks = {
        "tickvals": positions[::step],
        "ticktext": [html.escape(label, quote=False) for label in labels[::step]],
        "showgrid": False,
    }
    sheet = _Sheet(1, 1, 540)
    sheet.panel(
        0, 0, "", {"title": {"text": "source"}} | ticks,
        {"title": {"text": "destination"}, "autorange": "reversed"} | ticks,
    )  # fmt: skip
    for i, pattern in enumerate(values):
        rows = [
            [round(float(v), 3) if src <= dest else None for src, v in enumerate(row)]
            for dest, row in enumerate(pattern)
        ]
        sheet.traces.append(
            {
                "type": "heatmap", "z": rows, "colorscale": "Blues", "reversescale": False,
                "zmin": 0, "zmax": 1, "visible": i == 0, "colorbar": {"thickness": 12},
                "hovertemplate": "from %{y} to %{x}: %{z:.3f}<extra></extra>",
            }
        )  # fmt: skip
    buttons = [
        {
            "label": html.escape(str(each), quote=False),
            "method": "restyle",
            "args": [{"visible": [j == i for j in range(len(names))]}],
        }
        for i, each in enumerate(names)
    ]
    figure = sheet.figure("")
    figure.layout.margin.t = 60
    figure.layout.updatemenus = [
        {
            "buttons": buttons,
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "bgcolor": "#fff",
            "bordercolor": "#bbb",
        }
    ]
    name = _name(name, str(figure.to_json(engine="json")))
    return View(fragment(figure, name), "plotly", name)


def _name(name: str | None, content: str) -> str:
    if name is None:
        return "tv-" + hashlib.sha256(content.encode()).hexdigest()[:12]
    check_id(name)
    return name


def _array(values: Any, what: str, ndim: int) -> np.ndarray:
    """Make an array of finite numbers."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().float().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TvInterpError(f"expected {what} as an array of numbers: {error}") from error
    if array.ndim != ndim:
        raise TvInterpError(f"expected {what} with {ndim} axes, got {array.ndim}")
    if not np.isfinite(array).all():
        raise TvInterpError(f"{what} have numbers that are not finite: a view cannot show them")
    return array
