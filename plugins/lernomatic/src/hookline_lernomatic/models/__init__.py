"""Models, by the name that the repository of LERNOMATIC has for them; its guide says `model`."""

from hookline_lernomatic.model import common

__all__ = ["common"]
