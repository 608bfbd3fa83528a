"""K adapters trained in one pass over one frozen model."""

from tnpeft.adapters.replicas.api import attach, clip, learning_rates, losses, parameters, replica, save

__all__ = ["attach", "clip", "learning_rates", "losses", "parameters", "replica", "save"]
