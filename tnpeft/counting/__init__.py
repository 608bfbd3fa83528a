"""HOW MUCH: parameters, parameter steps, rank bounds, degrees of freedom, budgets, and the cards of known models."""

from tnpeft.counting.cards import Card, SiteGroup, biases, card, groups, names, sites
from tnpeft.counting.layout import Layout, Piece, Placement, layout
from tnpeft.counting.parameters import (
    optimizer_megabytes,
    parameter_step,
    parameters,
    parameters_by_factor,
    stored_megabytes,
)

__all__ = [
    "Card",
    "Layout",
    "Piece",
    "Placement",
    "SiteGroup",
    "biases",
    "card",
    "groups",
    "layout",
    "names",
    "optimizer_megabytes",
    "parameter_step",
    "parameters",
    "parameters_by_factor",
    "sites",
    "stored_megabytes",
]
