"""WHICH ONE: families and lines side by side at one budget on one model."""

from tnpeft.comparison.rows import compare
from tnpeft.comparison.table import Comparison, ComparisonRow

__all__ = ["Comparison", "ComparisonRow", "compare"]
