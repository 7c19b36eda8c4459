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


BY_NAME: dict[str | None, Activation] = {
    None: Activation.IDENTITY,
    "relu": Activation.RELU,
    "relu6": Activation.RELU6,
    "leaky_relu": Activation.LEAKY_RELU,
    "silu": Activation.SILU,
    "hardswish": Activation.HARDSWISH,
    "sigmoid": Activation.SIGMOID,
}

DEFAULT_SLOPE = 0.01
"""Of "leaky_relu" alone; ("leaky_relu", slope) has its own."""
