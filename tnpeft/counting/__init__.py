"""HOW MUCH: parameters, parameter steps, rank bounds, degrees of freedom, budgets, and the cards of known models."""

from tnpeft.counting.budgets import Budget, BudgetRow, Rung, budget, capped, nearest_ranks
from tnpeft.counting.cuts import RankWarning, clipped_ranks, cuts, rank_bound, unfolding_bounds, warn_ranks
from tnpeft.counting.dof import dof
from tnpeft.counting.parameters import (
    optimizer_megabytes,
    parameter_step,
    parameters,
    parameters_by_factor,
    site_shapes,
    stored_megabytes,
)
from tnpeft.layout import Layout, ParameterSpec, SiteLayout, layout
from tnpeft.models.cards import Card, SiteGroup, biases, card, groups, names, sites

__all__ = [
    "Budget",
    "BudgetRow",
    "Card",
    "Layout",
    "ParameterSpec",
    "RankWarning",
    "Rung",
    "SiteGroup",
    "SiteLayout",
    "biases",
    "budget",
    "capped",
    "card",
    "clipped_ranks",
    "cuts",
    "dof",
    "groups",
    "layout",
    "names",
    "nearest_ranks",
    "optimizer_megabytes",
    "parameter_step",
    "parameters",
    "parameters_by_factor",
    "rank_bound",
    "site_shapes",
    "sites",
    "stored_megabytes",
    "unfolding_bounds",
    "warn_ranks",
]
