"""The only way anything is changed in a run."""

from .engine import run_variants
from .recording import Recorded, Run, record
from .sites import Cut, Edge, Patch, Site

__all__ = ["Cut", "Edge", "Patch", "Recorded", "Run", "Site", "record", "run_variants"]
