"""What is fastest for a shape? Among backends, numbers of threads, places for the result, and peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .rows import FASTBN, PEER, Row
from .targets import threads_in_words

RESULT_WORDS = {"out": "out=", "fresh": "a fresh result", "inplace": "in place"}

CHOICES: tuple[Callable[[Row], str], ...] = (
    lambda row: row.contestant.removeprefix("fastbn "),
    lambda row: threads_in_words(row.threads),
    lambda row: RESULT_WORDS[row.result],
)
"""What can be chosen of a call to fastbn: the backend, the number of threads, and where the result goes."""


@dataclass(frozen=True)
class Answer:
    """The fastest row of one pass on one array, and the rows that differ from it in one choice alone.

    `words` are the choices that make the fastest row. They are empty where that is noisy: there is no answer. `peer` is
    the fastest of the peers whose results agree. Noisy rows are among these, since no other row may stand in for them.
    """

    fastest: Row
    words: str
    others: dict[str, Row]
    peer: Row | None = None

    def over(self, other: Row) -> float:
        """The other's time over that of the fastest."""
        return other.seconds / self.fastest.seconds

    def even(self, other: Row) -> bool:
        """Whether the difference is within the spreads."""
        most = 1 + max(self.fastest.spread, other.spread)
        return 1 / most < self.over(other) < most


def in_words(row: Row, rows: Sequence[Row]) -> str:
    """The choices that make a row, as far as there were any."""
    return ", ".join(choice(row) for choice in CHOICES if len({choice(other) for other in rows}) > 1)


def _question(row: Row) -> tuple[object, ...]:
    """What is the same for all rows among which can be chosen."""
    return (row.shape, row.layout, replace(row.variant, result="out"), row.pass_)


def answers(rows: Sequence[Row]) -> Iterator[Answer]:
    """For each question for which fastbn has several answers: the best."""
    ours = [row for row in rows if row.kind == FASTBN]
    peers = [row for row in rows if row.kind == PEER and row.agrees]
    for question in dict.fromkeys(map(_question, ours)):
        asked = [row for row in ours if _question(row) == question]
        rivals = [row for row in peers if _question(row) == question]
        if len(asked) < 2:
            continue
        fastest = min(asked, key=lambda row: row.seconds)
        if fastest.noisy:
            yield Answer(fastest, "", {})
            continue
        others = {}
        for row in asked:
            changed = [choice(row) for choice in CHOICES if choice(row) != choice(fastest)]
            if len(changed) == 1:
                others[changed[0]] = row
        peer = min(rivals, key=lambda row: row.seconds, default=None)
        yield Answer(fastest, in_words(fastest, asked), others, peer)
