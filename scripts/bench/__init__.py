"""Benchmarks: each module declares one, :mod:`bench.driver` runs them."""
