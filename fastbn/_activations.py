"""What may follow the normalization, and under which number do the backends know it?"""

from __future__ import annotations

from enum import IntEnum


class Activation(IntEnum):
    """The codes of `fbn_activation` in fastbn.h; a test holds the two lists together."""

    IDENTITY = 0
    RELU = 1


BY_NAME: dict[str | None, Activation] = {None: Activation.IDENTITY, "relu": Activation.RELU}

PLANNED = ("relu6", "leaky_relu", "silu", "hardswish", "sigmoid")
"""In the contract, but not in this version."""
