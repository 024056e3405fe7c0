"""What all pages share: one look, figures by number, everything from data escaped.

A page holds plotly.js once, asks no network (its own policy forbids it), and is the same for the
same inputs, byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import plots


class Figures:
    """Numbers the figures of a page."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, figure: Any) -> Any:
        """Write a figure as a fragment of the page."""
        from markupsafe import Markup

        self.count += 1
        return Markup(plots.fragment(figure, f"figure-{self.count}"))


def render_page(template: str, data: Any = None, **values: Any) -> str:
    """Fill a template of this folder.

    Args:
        template: Its file.
        data: Plain values that the page carries as JSON.
        values: What the template names.
    """
    import jinja2
    from markupsafe import Markup

    def load(name: str) -> str:
        return plots.read_asset("tv_interp.show", name)

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(load),
    )
    environment.filters["signed"] = lambda value: f"{value:+.2f}"
    return environment.get_template(template).render(
        data=Markup(plots.script_json(_finite(data))),
        plotly=Markup(plots.plotly_script()),
        **values,
    )


def plain_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Write settings as text."""
    return {
        key: value if isinstance(value, str) and key != "template" else json.dumps(value)
        for key, value in settings.items()
    }


def _finite(value: Any) -> Any:
    """Write numbers that JSON does not have as None."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
