"""Runs of a study: training, evaluation, and many of them side by side."""
