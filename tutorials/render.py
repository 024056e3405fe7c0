"""Execute tutorials in place, and put a picture beside every interactive figure.

GitHub does not run the scripts of a notebook and shows the picture; Jupyter prefers the figure.

    python tutorials/render.py tutorials/04_one_vector_one_demonstration.ipynb
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient
from playwright.sync_api import Page, sync_playwright

from tv_interp.files import write_text
from tv_interp.show.plots import fragment, plotly_script

CHROMIUM = "/usr/bin/chromium"
PLOTLY = "application/vnd.plotly.v1+json"


def render(path: Path, page: Page) -> None:
    """Execute one notebook and write it back, with pictures."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which differ at every run
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                output.data["image/png"] = picture(output.data[PLOTLY], page)
    write_text(path, nbformat.writes(notebook) + "\n")


def picture(figure: dict[str, Any], page: Page) -> str:
    """Draw a figure in the browser and take its picture, as base64."""
    body = plotly_script() + fragment(go.Figure(figure), "figure")
    page.set_content(f'<!doctype html><body style="margin: 0; background: white">{body}')
    page.wait_for_selector(".main-svg")
    return base64.b64encode(page.locator("#figure").screenshot()).decode()


if __name__ == "__main__":
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1000, "height": 600})
        for name in sys.argv[1:]:
            render(Path(name), view)
        browser.close()
