"""The documentation: `make docs`, which turns every warning into an error."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version as version_of
from pathlib import Path

import nbformat
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tv_interp.show.plots import fragment

HERE = Path(__file__).parent

project = "tv_interp"
author = "The tv_interp authors"
release = version = version_of("tv-interp")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"tv_interp {release}"
html_copy_source = False
html_static_path = ["_static", "assets"]
html_css_files = ["style.css"]
templates_path = []

# The notebooks are shown as they ship: tests execute them, and building must not measure anew.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them; docstrings say what they mean
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


PLOTLY = "application/vnd.plotly.v1+json"
SCRIPT = '<script src="../_static/plotly.min.js"></script>\n'  # no figure asks the network


def copy_tutorials() -> None:
    """Bring the executed notebooks to where Sphinx looks for pages, with figures as HTML."""
    for name in ("tutorials", "_static"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        (HERE / name).mkdir()
    (HERE / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for path in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        for number, output in enumerate(outputs):
            if PLOTLY in output.get("data", {}):
                figure = go.Figure(output.data.pop(PLOTLY))
                output.data["text/html"] = SCRIPT + fragment(figure, f"figure-{number}")
        nbformat.write(notebook, HERE / "tutorials" / path.name)


def escape_bars(app: object, what: str, name: str, obj: object, options: object, lines: list):
    """Keep |x| from being read as a substitution, outside of literals."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`.*?`)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[i] = "".join(parts)


def setup(app: object) -> None:
    """Register what runs before pages are read."""
    app.connect("config-inited", lambda app, config: copy_tutorials())  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", escape_bars)  # type: ignore[attr-defined]
