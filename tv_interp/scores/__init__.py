"""Numbers that know what they are."""

from .metrics import METRICS, Metric, get_metric
from .scores import Scores

__all__ = ["METRICS", "Metric", "Scores", "get_metric"]
