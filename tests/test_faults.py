"""Files from elsewhere are not trusted: nothing in them runs, and nothing lands outside."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import tv_interp as tv
from tv_interp.errors import FileError
from tv_interp.scores import Scores
from tv_interp.sweep.run import load_sweep


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


LOADERS = {
    "scores": (Scores.load, "cells/x.nc"),
    "vectors": (tv.Vectors.load, "cells/x.nc"),
    "circuit": (tv.Circuit.load, "circuit.json"),
    "sweep": (lambda path: load_sweep(path.parent.parent), "cells/x.nc"),
    "plan": (tv.Plan.load, "plan.yaml"),
}


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_in_the_place_of_a_file_is_refused_and_runs_nothing(tmp_path, what, protocol):
    load, name = LOADERS[what]
    path, mark = tmp_path / name, tmp_path / "hacked"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb(mark), protocol))
    with pytest.raises(FileError):
        load(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # it would have
    assert mark.exists()


def test_no_module_reads_pickles():
    """Training resumes from its own checkpoint, and reads weights alone."""
    package = Path(tv.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|cloudpickle)", text, re.M), (
            path
        )
        assert not re.search(r"allow_pickle=True|yaml\.(load|unsafe_load|full_load)\(", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


@pytest.mark.parametrize(
    "text",
    [
        "measure: !!python/object/apply:os.system ['touch hacked']",
        "{measure: readers, grid: {seed: !!python/object/new:os.system ['touch hacked']}}",
        "{measure: readers, model: !!python/name:os.system }",
    ],
)
def test_yaml_with_python_in_it_is_refused_and_runs_nothing(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(FileError, match="is no YAML file"):
        tv.Plan.load("plan.yaml")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("field", ["model", "task", "metric", "template", "corruption"])
def test_no_field_of_a_cell_becomes_part_of_a_path(field):
    from tv_interp.sweep.cells import cell_file

    out = Path("/somewhere/out")
    for text in ("../../escaped", "/etc/passwd", "a\x00b", "x/../../y", "C:\\x"):
        path = cell_file(out, tv.Cell("readers", **{field: text}))
        assert path.parent == out / "cells" and re.fullmatch(r"[0-9a-f]{20}\.nc", path.name)
