"""HOW MUCH: parameters, parameter steps, rank bounds, degrees of freedom, budgets, and the cards of known models."""

from tnpeft.counting.budgets import Budget, BudgetRow, Rung, budget
from tnpeft.counting.cards import Card, SiteGroup, biases, card, groups, names, sites
from tnpeft.counting.cuts import RankWarning, clipped_ranks, cuts, rank_bound, unfolding_bounds, warn_ranks
from tnpeft.counting.freedom import dof
from tnpeft.counting.layout import Layout, Piece, Placement, layout
from tnpeft.counting.parameters import (
    optimizer_megabytes,
    parameter_step,
    parameters,
    parameters_by_factor,
    stored_megabytes,
)

__all__ = [
    "Budget",
    "BudgetRow",
    "Card",
    "Layout",
    "Piece",
    "Placement",
    "RankWarning",
    "Rung",
    "SiteGroup",
    "biases",
    "budget",
    "card",
    "clipped_ranks",
    "cuts",
    "dof",
    "groups",
    "layout",
    "names",
    "optimizer_megabytes",
    "parameter_step",
    "parameters",
    "parameters_by_factor",
    "rank_bound",
    "sites",
    "stored_megabytes",
    "unfolding_bounds",
    "warn_ranks",
]
