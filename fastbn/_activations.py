"""What may follow the normalization, and under which number do the backends know it?"""

from __future__ import annotations

from enum import IntEnum


class Activation(IntEnum):
    """The codes of `fbn_activation` in fastbn.h; a test holds the two lists together."""

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    LEAKY_RELU = 3
    SILU = 4
    HARDSWISH = 5
    SIGMOID = 6


BY_NAME: dict[str | None, Activation] = {code.name.lower() if code else None: code for code in Activation}

SLOPES: dict[str | None, float] = {"leaky_relu": 0.01}
"""The activations with a parameter, and what it is where their name stands alone; ("leaky_relu", slope) has its own."""
