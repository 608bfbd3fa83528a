"""Property tests for networks: hypothesis strategies, brute force, and :func:`check` for a network of your own."""

from tnpeft.testing.agreement import agrees
from tnpeft.testing.check import Finding, Report, check, examine
from tnpeft.testing.oracle import brute, jacobian_rank, tolerance
from tnpeft.testing.strategies import factors_for, networks, random_factors, sizes_for

__all__ = [
    "Finding",
    "Report",
    "agrees",
    "brute",
    "check",
    "examine",
    "factors_for",
    "jacobian_rank",
    "networks",
    "random_factors",
    "sizes_for",
    "tolerance",
]
