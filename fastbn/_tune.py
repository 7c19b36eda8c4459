"""Which habits suit this machine? What `fastbn.tune()` runs: habits take turns, and medians of ratios decide.

One habit after another is measured, on passes that depend on it. In each round every candidate runs each pass once, in
a new random order, and its time is divided by that of the habits so far in the same round, so that drift affects both
alike. The best candidate is then measured again, alone against the habits so far, since the best of several noisy
numbers is too good to be true. It is taken if it gains clearly both times, and all that were taken remain if they gain
together.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ._backends import get_num_threads, select
from .config import environment, habits
from .ops import backward, forward, infer

Array = np.ndarray[Any, Any]
Habits = dict[str, int]
Shows = Callable[[str, float], None]

SECONDS, QUICK_SECONDS = 48.0, 1.2
CLEARLY = 0.97
"""A habit is changed where the geometric mean of its passes' times is below this, ..."""
AT_MOST = 1.05
"""... and none of them is above this."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 60
MIB = 1 << 20


class Pass(NamedTuple):
    """A call that is timed. Its arrays are larger than the caches, or remain in them from one call to the next."""

    name: str
    call: Callable[[], object]


class Stage(NamedTuple):
    """A habit, what it may be, and the passes that depend on it."""

    habit: str
    candidates: tuple[int, ...]
    passes: list[Pass]


class Found(NamedTuple):
    """A row of the table: times are over those of the default."""

    habit: str
    usual: int
    best: int
    over: float


# ---- what is timed ----


class Arrays:
    """Float32 arrays of any shape, on memory that all passes share."""

    def __init__(self, size: int) -> None:
        """`size` is in bytes."""
        rng = np.random.default_rng(0)
        self.values = max(size // 4, 2 * 200_704)
        self.x, self.dy = (rng.standard_normal(self.values, dtype=np.float32) for _ in range(2))
        self.out = np.zeros(self.values, np.float32)

    def passes(
        self, name: str, shape: tuple[int, ...], axis: int, wanted: str = "forward backward infer"
    ) -> list[Pass]:
        """The passes on arrays of a shape whose first size is replaced by one that fills the memory."""
        shape = (self.values // math.prod(shape[1:]), *shape[1:])
        x, dy, out = (array[: math.prod(shape)].reshape(shape) for array in (self.x, self.dy, self.out))
        here: dict[str, Any] = {"axis": axis, "out": out, "backend": "c"}
        gamma, zeros = np.ones(shape[axis], np.float32), np.zeros(shape[axis], np.float32)
        _, cache = forward(x, gamma, zeros, **here)
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(forward, x, gamma, zeros, **here),
            "backward": partial(backward, dy, cache, out=out, backend="c"),
            "infer": partial(infer, x, gamma, zeros, zeros, gamma, **here),
        }
        return [Pass(f"{pass_}, {name}", calls[pass_]) for pass_ in wanted.split()]


def _back_and_forth(size: int) -> Pass:
    """A layer and the next one, which reads what the first has written: whether that is still in a cache matters."""
    shape = (max(2, size // 4 // 50_176), 64, 28, 28)
    one, other = np.ones(shape, np.float32), np.ones(shape, np.float32)
    ones, zeros = np.ones(64, np.float32), np.zeros(64, np.float32)

    def call() -> None:
        for x, out in ((one, other), (other, one)):
            infer(x, ones, zeros, zeros, ones, out=out, backend="c")

    return Pass(f"two layers, {size / MIB:.1f} MiB", call)


def _stages(caches: tuple[int, ...], threads: int, quick: bool) -> tuple[list[Stage], list[Pass]]:
    """The stages, and the passes on which all that was found is compared with the default."""
    core, shared = caches[1] or MIB, caches[2] or 8 * MIB
    arrays = Arrays(4 * MIB if quick else min(max(shared * 3 // 2, 48 * MIB), 160 * MIB))
    between = Arrays(2 * MIB if quick else min(max(shared // 3, 2 * core), 32 * MIB))
    planes, small = arrays.passes("NCHW 56x56", (0, 64, 56, 56), 1), arrays.passes("NCHW 14x14", (0, 1024, 14, 14), 1)
    rows, few = arrays.passes("NHWC 64", (0, 64), -1), arrays.passes("NHWC 3", (0, 3), -1)
    wide = arrays.passes("NHWC 512", (0, 512), -1)
    middle = between.passes("NCHW 28x28, in cache", (0, 64, 28, 28), 1, "forward backward")
    middle += between.passes("NHWC 256, in cache", (0, 256), -1, "forward")
    # The default is an eighth of the shared cache. Results of a call that only maps are half as large as is needed to
    # write them around the cache.
    parts, needed = tuple(shared * part // 32 for part in (1, 2, 8, 16, 32)), 1.5 if threads == 1 else 2.5
    ladder = [_back_and_forth(int(size * needed / 2)) for size in (*parts[:2], shared // 8, *parts[2:])]
    stages = [
        Stage("streams", (1, 2, 4, 8), planes + small),
        Stage("turn", (256, 512, 1024, 2048, 4096), planes + small),
        Stage("row_streams", (1, 2, 3, 4), rows + wide),
        Stage("ahead", (-1, 256, 512, 1024, 2048, 3072, 4096), rows + small[:2]),
        Stage("block", (core // 8, core // 4, core // 2, core), small[:2] + middle[:2]),
        Stage("stream_from", (*parts, -1), [*ladder, planes[2]]),
    ]
    return stages, planes + small + rows + few + middle


# ---- how it is timed ----


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, after another if calls are short, so that the caches are as its own calls leave them."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > 2e-3:
        return first
    start, calls = time.perf_counter(), max(1, min(10, int(1e-3 / max(first, 1e-6))))
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _ratios(
    bridge: Any, candidates: Sequence[Habits], passes: Sequence[Pass], seconds: float, show: Callable[[float], None]
) -> tuple[list[list[float]], list[float]]:
    """For each candidate, each pass's time over that of the first candidate; and the latter's seconds."""
    order, start = random.Random(0), time.perf_counter()
    times: list[list[list[float]]] = [[[] for _ in passes] for _ in candidates]
    for number in range(MOST_ROUNDS):
        spent = time.perf_counter() - start
        show(min(1.0, spent / seconds))
        if number >= LEAST_ROUNDS and spent + spent / number > seconds:
            break
        for where, timed in enumerate(passes):
            for who in order.sample(range(len(candidates)), len(candidates)):
                bridge.set_habits(candidates[who])
                times[who][where].append(_seconds(timed.call))
    first = times[0]
    ratios = [
        [
            statistics.median(mine / usual for mine, usual in zip(own, base, strict=True))
            for own, base in zip(of_one, first, strict=True)
        ]
        for of_one in times
    ]
    return ratios, [statistics.median(samples) for samples in first]


def _gains(ratios: Sequence[float]) -> bool:
    return statistics.geometric_mean(ratios) < CLEARLY and max(ratios) < AT_MOST


def _best(bridge: Any, usual: Habits, stage: Stage, seconds: float, show: Callable[[float], None]) -> Found:
    """The candidate that gains clearly over the habits so far, or that which they have."""
    now = usual[stage.habit]
    others = [{**usual, stage.habit: value} for value in stage.candidates if value != now]
    ratios, _ = _ratios(bridge, [usual, *others], stage.passes, 0.65 * seconds, lambda part: show(0.65 * part))
    promising = [(statistics.geometric_mean(own), number) for number, own in enumerate(ratios) if _gains(own)]
    if not promising:
        return Found(stage.habit, now, now, 1.0)
    chosen = others[min(promising)[1] - 1]
    (_, again), _ = _ratios(
        bridge, [usual, chosen], stage.passes, 0.35 * seconds, lambda part: show(0.65 + 0.35 * part)
    )
    if not _gains(again):
        return Found(stage.habit, now, now, 1.0)
    return Found(stage.habit, now, chosen[stage.habit], statistics.geometric_mean(again))


# ---- what is shown ----


@contextmanager
def _progress(total: int) -> Iterator[Shows]:
    """Shows on a terminal which habit is measured and how far it is, if rich is installed."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        yield lambda text, done: None
        return
    from rich import progress

    columns = (progress.TextColumn("{task.description:<12}"), progress.BarColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, description=text, completed=done)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ", "   ".join([f"{row[0]:<{widths[0]}}", *cells]), sep="")


def run(*, quick: bool = False, kept: bool = True) -> Habits:
    """Measures, prints, puts in force and keeps. Returns the habits that were found."""
    bridge: Any = select("c")
    if kept:
        habits.writable_folder()  # before a minute is spent
    before, usual, threads = bridge.habits(), bridge.usual_habits(), get_num_threads()
    words = f"{threads} thread{'s' * (threads > 1)}"
    print(f"Habits of this machine, on {words}, in less than a minute; no bit of a result depends on them.", flush=True)
    try:
        found, rows, over = _measured(bridge, usual, quick)
    finally:
        bridge.set_habits(before)
    _report(found, rows)
    best = dict(usual)
    if over < 1:
        best.update({row.habit: row.best for row in found})
    elif rows:
        print("Taken together they gain nothing: the default remains.")
    record = habits.record_of(bridge, best, threads)
    if kept:
        print(f"Kept in {habits.keep(record)}.")
    if environment.environment_tuning() == "off":
        print("FASTBN_TUNING=off: this process does not use what was measured.")
    else:
        habits.put(bridge, record)
    return best


def _measured(bridge: Any, usual: Habits, quick: bool) -> tuple[list[Found], list[tuple[str, ...]], float]:
    """What each stage found; for each pass, what all of it gains; and the mean time over the default's."""
    stages, passes = _stages(bridge.caches(), get_num_threads(), quick)
    if quick:
        stages = [Stage(habit, candidates[:2], timed[:2]) for habit, candidates, timed in stages]
        passes = passes[:2]
    seconds, best, found = (QUICK_SECONDS if quick else SECONDS) / (len(stages) + 2), dict(usual), list[Found]()
    with _progress(len(stages) + 2) as show:
        for number, stage in enumerate(stages):
            found.append(_best(bridge, best, stage, seconds, partial(_shown, show, stage.habit, number)))
            best[stage.habit] = found[-1].best
        if best == usual:
            return found, [], 1.0
        (_, ratios), times = _ratios(
            bridge, [usual, best], passes, 2 * seconds, lambda part: show("all of them", len(stages) + 2 * part)
        )
    rows = [
        (timed.name, f"{1e3 * base:.2f} ms", f"{1e3 * base * ratio:.2f} ms", f"{ratio:.2f}")
        for timed, base, ratio in zip(passes, times, ratios, strict=True)
    ]
    over = statistics.geometric_mean(ratios)
    return found, [*rows, ("mean", "", "", f"{over:.2f}")], over


def _shown(show: Shows, text: str, before: int, part: float) -> None:
    show(text, before + part)


def _report(found: Sequence[Found], rows: Sequence[Sequence[str]]) -> None:
    """What was found, and what all of it gains on each pass."""
    gains = ["" if row.usual == row.best else f"{row.over:.2f}" for row in found]
    words = [(row.habit, habits.written(row.usual), habits.written(row.best)) for row in found]
    table = [(*row, gain) for row, gain in zip(words, gains, strict=True)]
    _print_table(("habit", "default", "best here", "time over default's"), table)
    if rows:
        print("All of them:")
        _print_table(("pass", "default", "here", "time over default's"), rows)
    else:
        print("The default habits are the best here, or nothing gains more than 3 %.")
