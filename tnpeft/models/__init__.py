"""Model cards: sizes of known models, and the sites that targets select in them."""

from tnpeft.models.bare import bare
from tnpeft.models.cards import Card, SiteGroup, biases, card, groups, names, sites

__all__ = ["Card", "SiteGroup", "bare", "biases", "card", "groups", "names", "sites"]
