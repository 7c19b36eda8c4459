"""How fast should it be? The project's targets, in one place, and whether a run meets them. No test depends on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .problem import ACTIVATIONS, PASSES, Variant
from .rows import COPY, FASTBN, LIMIT, Row, races
from .shapes import Shape, written

Bounds = tuple[float, float, float, float, float]

LARGE: Bounds = (1.15, 1.25, 1.15, 1.2, 1.1)
SMALL_PLANES: Bounds = (1.6, 1.6, 1.6, 1.7, 1.4)
ANY_OTHER: Bounds = (2.0, 2.0, 2.0, 2.0, 1.5)
"""The largest ratios to the limit that the C backend may have, in float32, with out=, on one thread: forward
channels-first and channels-last, backward likewise, and inference in either layout."""

TABLE: dict[Shape, Bounds] = {
    (32, 64, 112, 112): LARGE,
    (32, 256, 56, 56): LARGE,
    (32, 512, 28, 28): LARGE,
    (32, 1024, 14, 14): SMALL_PLANES,
    (32, 2048, 7, 7): SMALL_PLANES,
    (256, 1024): ANY_OTHER,
    (1, 256, 56, 56): ANY_OTHER,
}
"""The bounds of single shapes. ANY_OTHER bounds all others that `is_bounded` admits."""

LEAST_VALUES, LEAST_OF_CHANNEL, MOST_CHANNELS = 1 << 18, 64, 4096

SMALL: tuple[tuple[str, Shape, str, float], ...] = (
    ("infer", (1, 64), "NumPy careful", 1.0),  # two ufuncs
    ("forward", (8, 64), "torch", 0.5),
    ("backward", (8, 64), "torch", 0.5),
)
"""Small calls on one thread: the largest ratio to that peer's time that the C backend may have."""

GEOMETRIC_MEANS = {"forward": 2.8, "backward": 1.55, "infer": 1.3}
"""How many times faster than "torch reused" the C backend should be, in the geometric mean of the table's shapes."""

SPEEDUP_OF_TWO_THREADS = 1.7
NUMBA_OVER_C, NUMBA_FROM_ELEMENTS = 1.5, 1_000_000

AGAINST: dict[str, tuple[str, float]] = {
    "float16": ("float32", 0.65),
    "bfloat16": ("float32", 0.65),
    "float64": ("float32", 2.2),
    "relu": ("unfused", 1.05),
    "silu": ("unfused", 1.5),
    "sigmoid": ("unfused", 1.5),
    **{name: ("unfused", 1.3) for name in ACTIVATIONS if name not in ("none", "relu", "silu", "sigmoid")},
}
"""For a dtype or activation: its base, and the largest ratio to the base's time that the C backend may have on LARGE's
shapes."""

_COLUMNS = {("forward", "nchw"): 0, ("forward", "nhwc"): 1, ("backward", "nchw"): 2, ("backward", "nhwc"): 3}


def is_bounded(shape: Shape) -> bool:
    """Whether a shape is large enough, and ordinary enough, to have bounds."""
    values, channels = math.prod(shape), shape[1]
    return values >= max(LEAST_VALUES, LEAST_OF_CHANNEL * channels) and channels <= MOST_CHANNELS


def is_plain(row: Row) -> bool:
    """Whether a row is of what the targets are for: the C backend on one thread, float32, out= and nothing else."""
    return is_c(row) and row.threads == 1 and row.variant == Variant()


def bound(row: Row) -> float | None:
    """The largest ratio to the limit that this row may have, or None."""
    if not is_plain(row) or row.over_limit is None or not is_bounded(row.shape):
        return None
    layout = "nchw" if row.layout == "nc" else row.layout
    return TABLE.get(row.shape, ANY_OTHER)[_COLUMNS.get((row.pass_, layout), 4)]


def is_c(row: Row) -> bool:
    """Whether a row is the C backend's, with any instruction set."""
    return row.kind == FASTBN and row.contestant.split()[1] == "c"


@dataclass(frozen=True)
class Verdict:
    """A target in words, what was measured, and whether the target is met."""

    target: str
    measured: str
    met: bool


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean, which is the right mean for ratios."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def threads_in_words(threads: int) -> str:
    """A number of threads in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def _name(row: Row) -> str:
    variant = "" if row.variant == Variant() else f" {row.variant}"
    return f"{row.pass_} {written(row.shape)} {row.layout}{variant}, {threads_in_words(row.threads)}"


def _table(rows: list[Row]) -> Iterator[Verdict]:
    quiet = {row.key for row in rows if row.kind == LIMIT and not row.noisy}
    found = [(row, row.over_limit, bound(row)) for row in rows if row.key in quiet and not row.noisy]
    bounded = [(row, ratio, most) for row, ratio, most in found if ratio is not None and most is not None]
    missed = [f"{_name(row)}: {ratio:.2f} > {most:g}" for row, ratio, most in bounded if ratio > most]
    if bounded:
        score = f"{len(bounded) - len(missed)} of {len(bounded)} cells"
        yield Verdict("time over the limit within the table's bounds", "; ".join([score, *missed]), not missed)


def faster_peers(rows: Sequence[Row]) -> list[str]:
    """For each peer that is faster in rows of fastbn: in how many, and by how much at best. Noisy rows do not count."""
    steady = {(row.key, row.contestant) for row in rows if not row.noisy}
    ours = [row for row in rows if row.kind == FASTBN and row.over and not row.noisy]
    found = []
    for peer in dict.fromkeys(peer for row in ours for peer in row.over):
        faced = [row for row in ours if peer in row.over and (row.key, peer) in steady]
        lost = sorted((row for row in faced if row.over[peer] < 1), key=lambda row: row.over[peer])
        if lost:
            worst = f"{lost[0].over[peer]:.2f}x for {_name(lost[0])}"
            found.append(f"{peer} in {len(lost)} of {len(faced)} rows that are not noisy, at best {worst}")
    return found


def _no_faster_peer(rows: list[Row]) -> Iterator[Verdict]:
    ours = [row for row in rows if is_c(row)]
    steady = {(row.key, row.contestant) for row in rows if not row.noisy}
    if any((row.key, one) in steady for row in ours if not row.noisy for one in row.over):
        beaten = faster_peers([*ours, *(row for row in rows if row.kind != FASTBN)])
        yield Verdict("no peer is faster", "; ".join(beaten) or "none is", not beaten)


def _torch(rows: list[Row]) -> Iterator[Verdict]:
    for pass_, least in GEOMETRIC_MEANS.items():
        fitting = [row for row in rows if is_plain(row) and row.shape in TABLE and row.pass_ == pass_]
        ratios = [row.over["torch reused"] for row in fitting if "torch reused" in row.over]
        if ratios:
            mean = geometric_mean(ratios)
            target = f"torch reused over fastbn, {pass_}, 1 thread, geometric mean: at least {least:g}"
            yield Verdict(target, f"{mean:.2f} of {len(ratios)} rows", mean >= least)


def _small(rows: list[Row]) -> Iterator[Verdict]:
    for pass_, shape, peer, most in SMALL:
        for row in rows:
            here = (row.pass_, row.shape, row.threads, row.variant) == (pass_, shape, 1, Variant())
            if is_c(row) and here and peer in row.over:
                ratio = 1 / row.over[peer]
                yield Verdict(f"{pass_} {written(shape)} at most {most:g} of {peer}", f"{ratio:.2f}", ratio <= most)


def _two_threads(rows: list[Row]) -> Iterator[Verdict]:
    """If a copy becomes this much faster with a second thread, every pass should."""
    times = {(*row.key[:4], row.contestant, row.threads): row.seconds for row in rows}
    slow, count = [], 0
    for row in rows:
        one = (*row.key[:4], row.contestant, 1)
        copies = [(*row.key[:4], COPY, threads) for threads in (1, 2)]
        if not is_c(row) or row.threads != 2 or one not in times or any(copy not in times for copy in copies):
            continue
        if times[copies[0]] / times[copies[1]] >= SPEEDUP_OF_TWO_THREADS:
            count += 1
            gain = times[one] / row.seconds
            if gain < SPEEDUP_OF_TWO_THREADS:
                slow.append(f"{_name(row)}: {gain:.2f}")
    if count:
        target = f"two threads at least {SPEEDUP_OF_TWO_THREADS:g} times faster than one, where a copy is"
        yield Verdict(target, "; ".join([f"{count - len(slow)} of {count} rows", *slow]), not slow)


def _numba(rows: list[Row]) -> Iterator[Verdict]:
    slow, count = [], 0
    for race in races(rows).values():
        c, numba = ([row for row in race if row.contestant == name] for name in ("fastbn c", "fastbn numba"))
        if c and numba and math.prod(c[0].shape) >= NUMBA_FROM_ELEMENTS:
            count += 1
            ratio = numba[0].to_copy / c[0].to_copy
            if ratio > NUMBA_OVER_C:
                slow.append(f"{_name(numba[0])}: {ratio:.2f}")
    if count:
        target = f"numba at most {NUMBA_OVER_C:g} times c from {NUMBA_FROM_ELEMENTS:,} elements"
        yield Verdict(target, "; ".join([f"{count - len(slow)} of {count} rows", *slow]), not slow)


def _against(rows: list[Row]) -> Iterator[Verdict]:
    """What a dtype or an activation costs where memory bandwidth is the limit."""
    large = [row for row in rows if is_c(row) and TABLE.get(row.shape) == LARGE]
    for word, (base, most) in AGAINST.items():
        found = [row for row in large if word in (row.dtype, row.activation) and base in row.against]
        over = [f"{_name(row)}: {row.against[base]:.2f}" for row in found if row.against[base] > most]
        if found:
            worst = [
                f"{pass_} at most {max(ratios):.2f}"
                for pass_ in PASSES
                if (ratios := [row.against[base] for row in found if row.pass_ == pass_])
            ]
            score = f"{len(found) - len(over)} of {len(found)} rows; {', '.join(worst)}"
            yield Verdict(f"{word} at most {most:g} of {base}", "; ".join([score, *over]), not over)


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The verdict on each target that the rows have figures for. Noisy rows of fastbn meet and miss none."""
    steady = [row for row in rows if not (row.kind == FASTBN and row.noisy)]
    reports = (_table, _no_faster_peer, _torch, _small, _two_threads, _numba, _against)
    return [verdict for report in reports for verdict in report(steady)]
