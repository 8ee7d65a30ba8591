"""Surgery: change a model's shape, keep its function. See DESIGN of each step in its module."""

from .expand import expand_width
from .insert import insert_mamba
from .permute import sort_by_importance
from .slice import slice_width
from .verify import SurgeryError, check, compare

__all__ = ["SurgeryError", "check", "compare", "expand_width", "insert_mamba", "slice_width", "sort_by_importance"]
