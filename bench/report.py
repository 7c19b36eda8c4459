"""What is printed? Progress during the run, then a table for each pass, the verdicts, and notes on what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .compare import Change
from .extras import extra
from .rivals import CONTESTANTS
from .rows import FASTBN, PEER, Row, Run, races
from .shapes import written
from .targets import bound, geometric_mean, is_c, threads_in_words, verdicts

WIDTH = 120
"""The width, in characters, of output to a file or a pipe."""

TITLES = {"forward": "Training forward", "backward": "Backward", "infer": "Inference"}

KEY = (
    "time: median of a call; ±: interquartile range over it; GB/s: the least bytes the pass must move, over the time;\n"
    "copy: the time over that of a copy of x by as many threads; a peer's column: its time over ours, red where the\n"
    "peer is faster, ! where its result differs; x float32, unfused, dense: the time over fastbn's own in that case."
)


def console() -> Any:
    """The console to print to."""
    rich = extra("rich.console")
    found = rich.Console(highlight=False)
    return found if found.is_terminal else rich.Console(highlight=False, width=WIDTH)


@contextmanager
def progress(where: Any, total: int) -> Iterator[Callable[[str], None]]:
    """Shows which race is run and how many are left until the end of the block. Call the yielded function per race."""
    rich = extra("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=None),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=where, transient=True) as bar:
        task = bar.add_task("preparing", total=total, completed=-1)
        yield lambda race: bar.update(task, description=race, advance=1)


def duration(seconds: float) -> str:
    """A duration with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def times(ratio: float) -> str:
    """A ratio with at most three digits and an x."""
    decimals = 2 if ratio < 9.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:.{decimals}f}x"


def _target(row: Row) -> str:
    most = bound(row)
    if most is None:
        return ""
    return f"[green]{most:g} ✓[/]" if row.to_copy <= most else f"[red]{most:g} ✗[/]"


def _peer(row: Row, name: str, race: Sequence[Row]) -> str:
    if name not in row.over:
        return "[dim]-[/]"
    agrees = next(other.agrees for other in race if other.contestant == name)
    return f"[{'red' if row.over[name] < 1 else 'green'}]{times(row.over[name])}[/]{'' if agrees else '[red]![/]'}"


def _table(title: str, by_race: Sequence[Sequence[Row]]) -> Any:
    rows = [row for race in by_race for row in race]
    several = len({row.contestant for row in rows if row.kind == FASTBN}) > 1
    present = {row.contestant for row in rows if row.kind == PEER}
    peers = [name for name in CONTESTANTS if name in present]
    bounded = any(bound(row) is not None for row in rows)
    varied = any(row.variant.extras for row in rows)
    bases = list(dict.fromkeys(base for row in rows for base in row.against))
    table = extra("rich.table").Table(
        title=title, title_justify="left", title_style="bold", box=extra("rich.box").SIMPLE_HEAD, padding=0
    )
    for heading in ("shape", "", *(["operation"] if varied else []), *(["backend"] if several else [])):
        table.add_column(heading, no_wrap=True, vertical="bottom")
    for heading in (
        "time",
        "±",
        "GB/s",
        "copy",
        *(["target"] if bounded else []),
        *(f"x {base}" for base in bases),
        *peers,
    ):
        lines = heading.replace(" ", "\n").replace("OpenVINO", "Open\nVINO")
        table.add_column(lines, justify="right", no_wrap=True)
    for race in by_race:
        for row in race:
            if row.kind == FASTBN:
                cells = [written(row.shape), row.layout, *([row.variant.extras or "-"] if varied else [])]
                cells += [row.contestant.removeprefix("fastbn ")] if several else []
                cells += [duration(row.seconds), f"{row.spread:.0%}", f"{row.gb_per_s:.1f}", times(row.to_copy)]
                cells += [_target(row)] if bounded else []
                cells += [times(row.against[base]) if base in row.against else "[dim]-[/]" for base in bases]
                table.add_row(*cells, *(_peer(row, name, race) for name in peers))
    return table


def _tables(rows: Sequence[Row]) -> Iterator[Any]:
    groups: dict[tuple[str, str, int], list[list[Row]]] = {}
    for race in races(rows).values():
        first = race[0]
        groups.setdefault((first.pass_, first.dtype, first.threads), []).append(race)
    for (pass_, dtype, threads), by_race in groups.items():
        yield _table(f"{TITLES[pass_]}, {dtype}, {threads_in_words(threads)}", by_race)


def _in_short(rows: Sequence[Row]) -> Any:
    """A table of the C backend's geometric means over the shapes, a line for each operation."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if is_c(row):
            threads, isa = threads_in_words(row.threads), row.contestant.removeprefix("fastbn c")
            groups.setdefault(f"{row.pass_} {row.layout} {row.variant}, {threads}{isa}", []).append(row)
    present = {peer for group in groups.values() for row in group for peer in row.over}
    peers = [name for name in CONTESTANTS if name in present]
    table = extra("rich.table").Table(
        title="In short: geometric means over the shapes",
        title_justify="left",
        title_style="bold",
        box=extra("rich.box").SIMPLE_HEAD,
        padding=0,
    )
    for heading in ("", "shapes", "copy", *(name.replace(" ", "\n") for name in peers)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True, vertical="bottom")
    for case, group in groups.items():
        over = ([row.over[name] for row in group if name in row.over] for name in peers)
        cells = [times(geometric_mean(ratios)) if ratios else "[dim]-[/]" for ratios in over]
        table.add_row(case, str(len(group)), times(geometric_mean(row.to_copy for row in group)), *cells)
    return table


def show(where: Any, run: Run) -> None:
    """Prints the machine, the tables, the verdicts and the notes."""
    escape = extra("rich.markup").escape
    for key, value in run.machine.items():
        where.print(f"[bold]{escape(key)}[/]  {escape(value)}", soft_wrap=True)
    for table in _tables(run.rows):
        where.print(table)
    if run.rows:
        where.print(_in_short(run.rows))
        where.print(f"[dim]{KEY}[/]\n", soft_wrap=True)
    for verdict in verdicts(run.rows):
        mark = "[green]✓[/]" if verdict.met else "[red]✗[/]"
        where.print(f"{mark} {escape(verdict.target)}: {escape(verdict.measured)}", soft_wrap=True)
    for note in run.notes:
        where.print(f"[yellow]•[/] {escape(note)}", soft_wrap=True)


def show_changes(where: Any, changes: Sequence[Change]) -> None:
    """Prints the rows that both runs have, new over old, and marks those that are slower by more than the spread."""
    if not changes:
        where.print("No row is in both runs.")
        return
    table = extra("rich.table").Table(
        title="Against the earlier run: ratios to a copy", title_justify="left", box=extra("rich.box").SIMPLE_HEAD
    )
    for heading in ("row", "old", "new", "new / old", "±", ""):
        table.add_column(heading, justify="left" if heading in ("row", "") else "right", no_wrap=True)
    for change in changes:
        pass_, layout, variant, shape, threads = change.new.key
        name = f"{pass_} {written(shape)} {layout} {variant} x{threads} {change.new.contestant.removeprefix('fastbn ')}"
        flag = "[red]slower[/]" if change.slower else ""
        ratios = (times(change.old.to_copy), times(change.new.to_copy), f"{change.ratio:.2f}")
        table.add_row(name, *ratios, f"{change.noise:.0%}", flag)
    where.print(table)
    slower = sum(change.slower for change in changes)
    where.print(f"{slower} of {len(changes)} rows slower by more than the spread")
