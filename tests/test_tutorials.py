"""Every tutorial runs from top to bottom, as it is shipped, with nothing but the package."""

from __future__ import annotations

from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.ipynb"))


def test_there_are_tutorials():
    assert [path.stem for path in TUTORIALS] == [
        "01_find_writers_and_readers",
        "02_local_and_global_vectors",
        "03_from_saliency_to_circuit",
        "04_one_vector_one_demonstration",
        "05_your_model_and_task",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_the_tutorial_runs(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another worker has the other cores
    notebook = nbformat.read(path, as_version=4)
    shipped = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in shipped if "import" not in cell.source), "not executed"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert "Warning" not in output.get("text", ""), output
