"""WHAT a factorization is: factors, networks, factorizations, sites, their notation and their errors."""

from tnpeft.networks.errors import AdapterFileError, ConfigError, NetworkError, StudyError, TnpeftError
from tnpeft.networks.factor import Factor, Term
from tnpeft.networks.factorization import STACK, Factorization, Site, SiteRule
from tnpeft.networks.network import Network
from tnpeft.networks.notation import network
from tnpeft.networks.replicas import REPLICA, common, replicated

__all__ = [
    "REPLICA",
    "STACK",
    "AdapterFileError",
    "ConfigError",
    "Factor",
    "Factorization",
    "Network",
    "NetworkError",
    "Site",
    "SiteRule",
    "StudyError",
    "Term",
    "TnpeftError",
    "common",
    "network",
    "replicated",
]
