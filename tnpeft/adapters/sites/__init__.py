"""Kinds of weights that an adapter can be attached to, and the values of named stacks."""
