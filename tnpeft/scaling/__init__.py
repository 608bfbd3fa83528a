"""HOW FAR: rules of initial values and their RMS, the gain of a line, learning rates by rule. Without torch."""

from tnpeft.scaling.gain import gain, gain_squares
from tnpeft.scaling.rates import KAPPA, learning_rates

__all__ = ["KAPPA", "gain", "gain_squares", "learning_rates"]
