"""Which attention heads carry a task through a prompt: who writes, who reads, by which paths.

``import tv_interp as tv`` is cheap: names load what they need when they are first used, and
importing changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.circuits import Circuit, discover_circuit
    from .analysis.claims import check_claims
    from .analysis.comparison import VectorReport, compare_vectors
    from .analysis.convergence import (
        Convergence,
        ablate_demos,
        measure_convergence,
    )
    from .analysis.discovery import find_circuit
    from .analysis.edges import score_edges
    from .analysis.faithfulness import (
        CircuitReport,
        compare_circuits,
        evaluate_circuit,
        measure_curve,
        measure_stability,
    )
    from .analysis.features import Geometry, measure_geometry
    from .analysis.find import HeadReport, find_heads
    from .analysis.graph import RoleGraph
    from .analysis.head_geometry import HeadGeometry, head_geometry
    from .analysis.head_vectors import HeadShares, head_vectors, measure_head_shares
    from .analysis.heads import (
        knock_out,
        patch_heads,
        patch_local_paths,
        patch_sources,
        patch_together,
    )
    from .analysis.hypotheses import CircuitTests, check_circuit
    from .analysis.information import InformationMap, information_map
    from .analysis.interactions import patch_interactions
    from .analysis.many_vectors import (
        Combination,
        combine_demonstrations,
        inject_many_vectors,
        leave_one_out,
    )
    from .analysis.one_vector import (
        OneVector,
        compare_bijection,
        implied_ranks,
        inject_one_vector,
    )
    from .analysis.paths import patch_paths
    from .analysis.positions import patch_positions
    from .analysis.predictions import Predictions, check_predictions
    from .analysis.pruning import prune_edges
    from .analysis.ranking import HeadRanking, rank_heads
    from .analysis.saliency import label_flow, saliency_flow
    from .analysis.vectors import Vectors, extract_vectors, function_vector, inject_vectors
    from .analysis.verdicts import Claims
    from .errors import TvInterpError
    from .interventions import Cut, Edge, Patch, Recorded, Site, record, run_variants
    from .models.generator import PlantedCircuit, draw_circuit, planted_circuit
    from .models.load import load_model
    from .prompts import Contrast, Prompts, Role, Task, get_task, list_tasks, make_prompts
    from .scores import Metric, Scores
    from .show.paper import save_figure
    from .show.report import write_report
    from .sweep.compare import compare_heads, depth_profile
    from .sweep.estimate import estimate_sweep
    from .sweep.failures import explain_failures, measure_pair
    from .sweep.plan import Cell, Plan
    from .sweep.run import Swept, load_sweep, run_sweep

_HOME = {
    "Claims": ".analysis.verdicts",
    "check_claims": ".analysis.claims",
    "VectorReport": ".analysis.comparison",
    "compare_vectors": ".analysis.comparison",
    "Convergence": ".analysis.convergence",
    "ablate_demos": ".analysis.convergence",
    "measure_convergence": ".analysis.convergence",
    "Geometry": ".analysis.features",
    "measure_geometry": ".analysis.features",
    "HeadReport": ".analysis.find",
    "find_heads": ".analysis.find",
    "HeadGeometry": ".analysis.head_geometry",
    "head_geometry": ".analysis.head_geometry",
    "InformationMap": ".analysis.information",
    "information_map": ".analysis.information",
    "HeadShares": ".analysis.head_vectors",
    "head_vectors": ".analysis.head_vectors",
    "measure_head_shares": ".analysis.head_vectors",
    "knock_out": ".analysis.heads",
    "patch_heads": ".analysis.heads",
    "patch_local_paths": ".analysis.heads",
    "patch_sources": ".analysis.heads",
    "patch_together": ".analysis.heads",
    "patch_interactions": ".analysis.interactions",
    "patch_paths": ".analysis.paths",
    "Vectors": ".analysis.vectors",
    "extract_vectors": ".analysis.vectors",
    "function_vector": ".analysis.vectors",
    "inject_vectors": ".analysis.vectors",
    "patch_positions": ".analysis.positions",
    "OneVector": ".analysis.one_vector",
    "inject_one_vector": ".analysis.one_vector",
    "compare_bijection": ".analysis.one_vector",
    "implied_ranks": ".analysis.one_vector",
    "Combination": ".analysis.many_vectors",
    "inject_many_vectors": ".analysis.many_vectors",
    "combine_demonstrations": ".analysis.many_vectors",
    "leave_one_out": ".analysis.many_vectors",
    "Predictions": ".analysis.predictions",
    "check_predictions": ".analysis.predictions",
    "HeadRanking": ".analysis.ranking",
    "rank_heads": ".analysis.ranking",
    "TvInterpError": ".errors",
    "Cut": ".interventions",
    "Edge": ".interventions",
    "Patch": ".interventions",
    "Recorded": ".interventions",
    "Site": ".interventions",
    "record": ".interventions",
    "run_variants": ".interventions",
    "PlantedCircuit": ".models.generator",
    "draw_circuit": ".models.generator",
    "planted_circuit": ".models.generator",
    "load_model": ".models.load",
    "Contrast": ".prompts",
    "Prompts": ".prompts",
    "Role": ".prompts",
    "Task": ".prompts",
    "get_task": ".prompts",
    "list_tasks": ".prompts",
    "make_prompts": ".prompts",
    "label_flow": ".analysis.saliency",
    "RoleGraph": ".analysis.graph",
    "Circuit": ".analysis.circuits",
    "discover_circuit": ".analysis.circuits",
    "CircuitReport": ".analysis.faithfulness",
    "evaluate_circuit": ".analysis.faithfulness",
    "compare_circuits": ".analysis.faithfulness",
    "CircuitTests": ".analysis.hypotheses",
    "check_circuit": ".analysis.hypotheses",
    "measure_curve": ".analysis.faithfulness",
    "measure_stability": ".analysis.faithfulness",
    "find_circuit": ".analysis.discovery",
    "score_edges": ".analysis.edges",
    "prune_edges": ".analysis.pruning",
    "saliency_flow": ".analysis.saliency",
    "Metric": ".scores",
    "Scores": ".scores",
    "save_figure": ".show.paper",
    "write_report": ".show.report",
    "compare_heads": ".sweep.compare",
    "explain_failures": ".sweep.failures",
    "measure_pair": ".sweep.failures",
    "depth_profile": ".sweep.compare",
    "estimate_sweep": ".sweep.estimate",
    "Cell": ".sweep.plan",
    "Plan": ".sweep.plan",
    "Swept": ".sweep.run",
    "load_sweep": ".sweep.run",
    "run_sweep": ".sweep.run",
}

__all__ = [  # noqa: PLE0604
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tv_interp' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
