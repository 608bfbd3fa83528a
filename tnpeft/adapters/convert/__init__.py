"""Adapter files from one project's packing into another's, each conversion checked before anything is written."""

from __future__ import annotations

from tnpeft.adapters.convert.run import Conversion, convert

__all__ = ["Conversion", "convert"]
