"""Which activations may follow the normalization, and which codes do the backends use for them?"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Activation(IntEnum):
    """The codes of `fbn_activation` in fastbn.h; a test compares the two lists."""

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    LEAKY_RELU = 3
    SILU = 4
    HARDSWISH = 5
    SIGMOID = 6


BY_NAME: dict[str | None, Activation] = {code.name.lower() if code else None: code for code in Activation}

DEFAULT_SLOPES = {"leaky_relu": 0.01}
"""The activations that have a slope, and the slope that the name alone means; ("leaky_relu", slope) gives another."""


def name_and_slope(activation: Any) -> tuple[str | None, float]:
    """The name and the slope of an activation as users give it; the slope is 0 for activations that have none."""
    return activation if isinstance(activation, tuple) else (activation, DEFAULT_SLOPES.get(activation, 0.0))


def as_given(name: str | None, slope: float) -> Any:
    """An activation as users give it, from its name and slope."""
    return (name, slope) if name in DEFAULT_SLOPES else name
