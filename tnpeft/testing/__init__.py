"""Property tests for networks: hypothesis strategies, brute force, and :func:`check` for a network of your own."""

from tnpeft.testing.strategies import factors_for, networks, random_factors, sizes_for

__all__ = ["factors_for", "networks", "random_factors", "sizes_for"]
