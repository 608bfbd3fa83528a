"""INTO a transformer: a PEFT tuner whose update is any factorization.

Importing this package imports peft first, and with it registers the tuner: no module of it ever runs before that.
"""

from __future__ import annotations

import peft as _peft  # noqa: F401  (see above)

from tnpeft._lazy import lazy

_HOME = {
    "TensorNetworkConfig": "config",
    "TensorNetworkModel": "model",
    "factors": "state",
    "set_factors": "state",
    "refresh": "state",
    "select": "sites.selection",
    "explain": "layer.routes",
    "hotswap": "storage.files",
    "export_lora": "export",
    "replica": "replicas",
    "replicas": "",
}

__all__ = [*_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME)
