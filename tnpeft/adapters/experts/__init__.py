"""Weights that hold one matrix for every expert of a mixture: where they are, and how they are adapted."""
