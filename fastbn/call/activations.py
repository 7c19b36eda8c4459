"""Which activations may follow the normalization, and which codes do the backends use for them?"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Activation(IntEnum):
    """The codes of `fbn_activation` in fastbn.h; a test compares the two lists.

    An activation that takes a number has, beside its code, the number that its name alone means. ("leaky_relu", slope)
    gives another. The number is called the slope, whatever it is.
    """

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    LEAKY_RELU = 3, 0.01
    SILU = 4
    HARDSWISH = 5
    SIGMOID = 6

    slope: float | None

    def __new__(cls, code: int, slope: float | None = None) -> Activation:
        self = int.__new__(cls, code)
        self._value_, self.slope = code, slope
        return self

    @property
    def public(self) -> str | None:
        """The name that users give."""
        return self.name.lower() if self else None


BY_NAME = {code.public: code for code in Activation}

DEFAULT_SLOPES: dict[str | None, float] = {name: code.slope for name, code in BY_NAME.items() if code.slope is not None}
"""The activations that have a slope, and the slope that the name alone means."""


def name_and_slope(activation: Any) -> tuple[str | None, float]:
    """The name and the slope of an activation as users give it; the slope is 0 for activations that have none."""
    return activation if isinstance(activation, tuple) else (activation, DEFAULT_SLOPES.get(activation, 0.0))


def as_given(name: str | None, slope: float) -> Any:
    """An activation as users give it, from its name and slope."""
    return name if slope == DEFAULT_SLOPES.get(name, slope) else (name, slope)
