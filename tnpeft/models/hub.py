"""The hub's models: whether a configuration lies on this machine, and whether the hub can be asked for one."""

from __future__ import annotations

from contextlib import suppress
from socket import create_connection
from threading import Event, Thread
from urllib.parse import urlsplit
from urllib.request import getproxies


def cached(name: str) -> bool:
    """True if the configuration of a model of the hub lies on this machine."""
    try:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except (ImportError, ValueError):  # HFValidationError is a ValueError
        return False


def answers() -> bool:
    """True if the hub takes a connection within a second; asking one that does not takes half a minute of retries."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return False
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    place = urlsplit(constants.ENDPOINT)
    address = place.hostname or "", place.port or {"http": 80}.get(place.scheme, 443)
    answered = Event()

    def ask() -> None:  # in a thread, since looking up a name takes as long as it likes
        with suppress(OSError), create_connection(address, timeout=1):
            answered.set()

    Thread(target=ask, daemon=True).start()
    return answered.wait(1)
