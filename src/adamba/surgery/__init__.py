"""Surgery: change a model's shape, keep its function. See DESIGN of each step in its module."""

from .expand import expand_width, expansion
from .insert import insert_mamba, insertion
from .permute import sort_by_importance
from .slice import slice_width, slicing
from .verify import SurgeryError, check, compare

__all__ = [
    "SurgeryError",
    "check",
    "compare",
    "expand_width",
    "expansion",
    "insert_mamba",
    "insertion",
    "slice_width",
    "slicing",
    "sort_by_importance",
]
