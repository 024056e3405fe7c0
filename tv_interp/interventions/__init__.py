"""The only way anything is changed in a run."""

from .engine import Recorded, record, run_variants
from .sites import Cut, Edge, Patch, Site

__all__ = ["Cut", "Edge", "Patch", "Recorded", "Site", "record", "run_variants"]
