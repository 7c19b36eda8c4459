"""The bench times fastbn, its peers, plain copies and the plainest loops, side by side on the same arrays."""

from .api import run

__all__ = ["run"]
