"""The installed version; the one place that looks it up."""

from __future__ import annotations

from importlib import metadata

__version__ = metadata.version("lorabooth")
