"""The house: imports run one way, importing is cheap, and the public names are a decision."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import tv_interp as tv

PACKAGE = Path(tv.__file__).parent

# Read down: a module imports only from its own folder and from those above it.
STAIRCASE = (
    "errors",
    "files",
    "display",
    "prompts.tasks",
    "prompts",
    "models",
    "interventions",
    "scores",
    "analysis",
    "theory",
    "show",
    "sweep",
    "cli",
)
EXCEPTIONS = {
    # result objects import how they are drawn when that is asked for
    ("scores.scores", "show"),
    ("analysis.circuits", "show"),
    ("analysis.faithfulness", "show"),
    ("analysis.information", "show"),
}


def step(module: str) -> int:
    for i in range(len(STAIRCASE) - 1, -1, -1):
        name = STAIRCASE[i]
        if module == name or module.startswith(name + "."):
            if name == "prompts" and module.startswith("prompts.tasks"):
                continue
            return i
    raise AssertionError(f"{module} has no place on the staircase")


def imports_of(path: Path) -> set[str]:
    package = list(path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                found.add(".".join([*base, *node.module.split(".")]))
            else:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return found - {""}


def test_imports_run_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        module = ".".join(p for p in parts if p != "__init__")
        if not module:
            continue
        for target in imports_of(path):
            allowed = any(module == m and target.startswith(t) for m, t in EXCEPTIONS)
            if step(target) > step(module) and not allowed:
                wrong.append(f"{module} imports {target}")
    assert not wrong, wrong


def test_importing_loads_no_heavy_library_and_prints_nothing():
    code = (
        "import sys, tv_interp; "
        "heavy = {'torch', 'transformer_lens', 'transformers', 'plotly', 'xarray'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]" and out.stderr == ""


def test_the_public_names_are_these_and_all_of_them_load():
    assert tv.__all__ == [
        "Cell",
        "Circuit",
        "CircuitReport",
        "CircuitTests",
        "Claims",
        "Combination",
        "Contrast",
        "Convergence",
        "Cut",
        "Edge",
        "Geometry",
        "HeadGeometry",
        "HeadRanking",
        "HeadReport",
        "HeadShares",
        "InformationMap",
        "Metric",
        "OneVector",
        "Patch",
        "Plan",
        "PlantedCircuit",
        "Predictions",
        "Prompts",
        "Recorded",
        "Role",
        "RoleGraph",
        "Scores",
        "Site",
        "Swept",
        "Task",
        "TvInterpError",
        "VectorReport",
        "Vectors",
        "ablate_demos",
        "check_circuit",
        "check_claims",
        "check_predictions",
        "combine_demonstrations",
        "compare_bijection",
        "compare_circuits",
        "compare_heads",
        "compare_vectors",
        "depth_profile",
        "discover_circuit",
        "draw_circuit",
        "estimate_sweep",
        "evaluate_circuit",
        "explain_failures",
        "extract_vectors",
        "find_circuit",
        "find_heads",
        "function_vector",
        "get_task",
        "head_geometry",
        "head_vectors",
        "implied_ranks",
        "information_map",
        "inject_many_vectors",
        "inject_one_vector",
        "inject_vectors",
        "knock_out",
        "label_flow",
        "leave_one_out",
        "list_tasks",
        "load_model",
        "load_sweep",
        "make_prompts",
        "measure_convergence",
        "measure_curve",
        "measure_geometry",
        "measure_head_shares",
        "measure_pair",
        "measure_stability",
        "patch_heads",
        "patch_interactions",
        "patch_local_paths",
        "patch_paths",
        "patch_positions",
        "patch_sources",
        "patch_together",
        "planted_circuit",
        "prune_edges",
        "rank_heads",
        "record",
        "run_sweep",
        "run_variants",
        "saliency_flow",
        "save_figure",
        "score_edges",
        "write_report",
    ]
    for name in tv.__all__:
        assert getattr(tv, name) is not None


def test_every_public_function_says_what_it_returns_and_raises():
    for name in tv.__all__:
        thing = getattr(tv, name)
        if callable(thing) and not isinstance(thing, type):
            text = thing.__doc__ or ""
            assert "Raises:" in text, name


def test_every_public_name_has_a_page_in_the_reference():
    pages = "".join(path.read_text() for path in (PACKAGE.parent / "docs" / "api").glob("*.md"))
    for name in tv.__all__:
        home = getattr(tv, name).__module__
        assert f".. automodule:: {home}\n   :members:" in pages, f"{name} of {home}"
