"""Adapter folders: which tensors they hold, how they are checked, written and read."""
