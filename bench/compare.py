"""Is fastbn slower than in an earlier run? Compares rows by their ratios to a copy, since times vary over the day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import COPY, FASTBN, Key, Row

LEAST = 0.03
"""A smaller difference is none, however small the spread."""


@dataclass(frozen=True)
class Change:
    """A row that both runs have, and whether one of the two, or the copy beside it, is noisy."""

    old: Row
    new: Row
    noisy: bool

    @property
    def ratio(self) -> float:
        """The new time over the old one, both relative to a copy. Above 1, the new run is slower."""
        return self.new.to_copy / self.old.to_copy

    @property
    def noise(self) -> float:
        """The larger of the two spreads."""
        return max(self.old.spread, self.new.spread)

    @property
    def verdict(self) -> str:
        """What can be said: "slower" or "faster" by more than the noise, "equal", or "noisy" for nothing."""
        if self.new == self.old:
            return "equal"
        if self.noisy:
            return "noisy"
        least = 1 + max(self.noise, LEAST)
        return "slower" if self.ratio > least else "faster" if self.ratio < 1 / least else "equal"


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """The rows of fastbn that both runs have."""
    before, after = ({(row.key, row.contestant): row for row in rows} for rows in (old, new))

    def noisy(key: Key, *contestants: str) -> bool:
        return any(rows[key, one].noisy for rows in (before, after) for one in contestants if (key, one) in rows)

    return [
        Change(before[row.key, row.contestant], row, noisy(row.key, row.contestant, COPY))
        for row in new
        if row.kind == FASTBN and (row.key, row.contestant) in before
    ]
