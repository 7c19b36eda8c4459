"""What is printed? Progress during the run, then a table for each pass, what is fastest, and what is missing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .answer import RESULT_WORDS, Answer, answers
from .compare import Change
from .extras import extra
from .rows import FASTBN, LIMIT, PEER, Row, Run, races
from .shapes import written
from .summary import columns, of_fewer, summary
from .targets import bound, faster_peers, threads_in_words, verdicts

WIDTH = 120
"""The width, in characters, of output to a file or a pipe."""

TITLES = {"forward": "Training forward", "backward": "Backward", "infer": "Inference"}

RATIOS = "Ratios are times over fastbn's in the same row: 2.00x takes twice as long. ~: too noisy to compare."

FASTEST = (
    "With one change: the time of the call that differs in that alone, over the fastest's. "
    "≈: the difference is within the spreads; ~: too noisy to compare."
)

MEANS = "(7): the mean of 7 shapes alone; others are too noisy, or did not run."

KEY = (
    "time: median of a call; ±: interquartile range over it, and ~ where that is beyond a third; GB/s: the least\n"
    "bytes the pass must move, over the time; limit: the plainest loops in C that move them (one thread, from 1 MiB);\n"
    "copy: np.copyto of x by as many threads; a peer: red where it is faster, ! where its result differs.\n"
    "The other columns are the same call with one thing changed: in float32, unfused (without the activation), on\n"
    "dense arrays, with out=, unmasked, with no residual."
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
    if ratio < 0.0995:
        return f"{ratio:.2g}x"
    decimals = 2 if ratio < 9.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:.{decimals}f}x"


def long_duration(seconds: float) -> str:
    """A duration in minutes and seconds, as far as they matter."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return duration(seconds)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if rest else f"{minutes} min"


def beforehand(races: int, seconds: float) -> str:
    """A sentence on how many races there are and how long they time calls."""
    if races == 1:
        return f"One race, timed for about {duration(seconds)}; arrays, checks and slow calls come on top."
    return (
        f"{races} races, timed for about {duration(seconds)} each, {long_duration(races * seconds)} in all; arrays, "
        "checks and slow calls come on top."
    )


def _target(row: Row, race: Sequence[Row]) -> str:
    """The time over the limit, what it may be, and whether it is."""
    most = bound(row)
    if most is None or row.over_limit is None:
        return ""
    if any(one.noisy for one in race if one is row or one.kind == LIMIT):
        return "[dim]~[/]"
    met = row.over_limit <= most
    return f"[{'green' if met else 'red'}]{row.over_limit:.2f} of {most:g} {'✓' if met else '✗'}[/]"


def _ratio(row: Row, name: str, race: Sequence[Row]) -> str:
    """The other's time over the row's, unless one of the two is noisy."""
    if name not in row.others:
        return "[dim]-[/]"
    other = next((other for other in race if other.contestant == name), None)
    if row.noisy or (other is not None and other.noisy):
        return "[dim]~[/]"
    text = times(row.others[name])
    if other is None or other.kind != PEER:
        return text
    return f"[{'red' if row.others[name] < 1 else 'green'}]{text}[/]{'' if other.agrees else '[red]![/]'}"


def _grid(left: Sequence[str], right: Sequence[str]) -> Any:
    """A table with columns that are flush left and others that are flush right."""
    table = extra("rich.table").Table(box=extra("rich.box").SIMPLE_HEAD, padding=0)
    for heading in left:
        table.add_column(heading, no_wrap=True, vertical="bottom")
    for heading in right:
        lines = heading.replace(" ", "\n").replace("OpenVINO", "Open\nVINO").replace("torch.compile", "torch.\ncompile")
        table.add_column(lines, justify="right", no_wrap=True, vertical="bottom")
    return table


def _operation(row: Row, results: bool) -> str:
    """What is asked of the call; where its result goes, if several places are timed."""
    words = [row.activation, row.strides, RESULT_WORDS[row.result] if results else ""]
    words += ["mask" * row.mask, "residual" * row.residual]
    return ", ".join(word for word in words if word not in ("none", "dense", "")) or "plain"


def _table(by_race: Sequence[Sequence[Row]], targets: bool) -> Any:
    rows = [row for race in by_race for row in race]
    several = len({row.contestant for row in rows if row.kind == FASTBN}) > 1
    bounded = targets and any(bound(row) is not None for row in rows)
    varied, results = any(row.variant.extras for row in rows), len({row.result for row in rows}) > 1
    compared = columns(rows)
    left = ["shape", "", *(["operation"] if varied else []), *(["backend"] if several else [])]
    table = _grid(left, ["time", "±", "GB/s", *(["over limit: target"] if bounded else []), *compared])
    for race in by_race:
        for row in race:
            if row.kind == FASTBN:
                cells = [written(row.shape), row.layout, *([_operation(row, results)] if varied else [])]
                cells += [row.contestant.removeprefix("fastbn ")] if several else []
                cells += [duration(row.seconds), f"{'~' * row.noisy}{row.spread:.0%}", f"{row.gb_per_s:.1f}"]
                cells += [_target(row, race)] if bounded else []
                table.add_row(*cells, *(_ratio(row, name, race) for name in compared))
    return table


def _tables(rows: Sequence[Row], targets: bool) -> Iterator[tuple[str, Any]]:
    """Titles and tables."""
    groups: dict[tuple[str, str, int], list[list[Row]]] = {}
    for race in races(rows).values():
        first = race[0]
        groups.setdefault((first.pass_, first.dtype, first.threads), []).append(race)
    for (pass_, dtype, threads), by_race in groups.items():
        yield f"{TITLES[pass_]}, {dtype}, {threads_in_words(threads)}", _table(by_race, targets)


def _in_short(rows: Sequence[Row]) -> Any:
    """A table of geometric means over the shapes, a line for each operation and backend."""
    names, lines = summary(rows)
    table = _grid([""], ["shapes", *names])
    for case, count, means in lines:
        cells = (f"{times(mean[0])}{of_fewer(mean[1], count)}" if mean else "[dim]-[/]" for mean in means)
        table.add_row(case, str(count), *cells)
    return table


def _over(answer: Answer, other: Row) -> str:
    """The other's time over the fastest's, and whether that says anything."""
    return "~" if other.noisy else f"{'≈' * answer.even(other)}{times(answer.over(other))}"


def _against(answer: Answer) -> Iterator[str]:
    """Sentences on how long other calls take."""
    others = sorted(answer.others.items(), key=lambda item: (item[1].noisy, item[1].seconds))
    if others:
        yield f"With one change: {', '.join(f'{name} {_over(answer, other)}' for name, other in others)}"
    if answer.peer:
        same = answer.peer.threads == answer.fastest.threads
        threads = "" if same else f", {threads_in_words(answer.peer.threads)}"
        yield f"The fastest peer: {answer.peer.contestant}{threads} {_over(answer, answer.peer)}"


def _fastest(found: Sequence[Answer]) -> Iterator[str]:
    """Sentences on what is fastest, and how much longer other calls take."""
    previous = ""
    for answer in found:
        row = answer.fastest
        here = f"{written(row.shape)} {row.layout} {replace(row.variant, result='out')}"
        if here != previous:
            yield f"[bold]Fastest for {here}[/]"
        previous = here
        if answer.words:
            yield ". ".join([f"  {row.pass_}: [green]{answer.words}[/], {duration(row.seconds)}", *_against(answer)])
        else:
            yield f"  {row.pass_}: too noisy to say"


def show(where: Any, run: Run, targets: bool = False) -> None:
    """Prints the machine, the tables, what is fastest and the notes; for developers, whether targets are met."""
    escape = extra("rich.markup").escape
    for key, value in run.machine.items():
        where.print(f"[bold]{escape(key)}[/]  {escape(value)}", soft_wrap=True)
    tables = list(_tables(run.rows, targets))
    if len({row.shape for row in run.rows}) > 1:
        tables.append((f"In short: geometric means over the shapes. {MEANS}", _in_short(run.rows)))
    for title, table in tables:
        where.print(f"\n[bold]{title}[/]\n[dim]{RATIOS}[/]", soft_wrap=True)
        where.print(table)
    if run.rows:
        where.print(f"[dim]{KEY}[/]\n", soft_wrap=True)
    found = list(answers(run.rows))
    for line in _fastest(found):
        where.print(line, soft_wrap=True)
    if found:
        where.print(f"[dim]{FASTEST}[/]\n", soft_wrap=True)
    for verdict in verdicts(run.rows) if targets else []:
        mark = "[green]✓[/]" if verdict.met else "[red]✗[/]"
        where.print(f"{mark} {escape(verdict.target)}: {escape(verdict.measured)}", soft_wrap=True)
    faster = [f"a peer is faster: {peer}" for peer in faster_peers(run.rows)]
    for note in [*faster, *run.notes, *_of_noise(run.rows)]:
        where.print(f"[yellow]•[/] {escape(note)}", soft_wrap=True)


def _of_noise(rows: Sequence[Row]) -> list[str]:
    ours = [row for row in rows if row.kind == FASTBN]
    noisy = sum(row.noisy for row in ours)
    if not noisy:
        return []
    waiting = any(row.noisy and row.threads > 1 for row in ours) and "OMP_WAIT_POLICY" not in os.environ
    return [
        f"{noisy} of {len(ours)} rows of fastbn are too noisy to compare: other programs run, or --seconds is short"
        + "; with several threads, OMP_WAIT_POLICY=passive in the environment may help" * waiting
    ]


def show_changes(where: Any, changes: Sequence[Change]) -> None:
    """Prints the rows that both runs have, new over old, and what can be said of each."""
    if not changes:
        where.print("No row is in both runs.")
        return
    counts = Counter(change.verdict for change in changes)
    table = extra("rich.table").Table(
        title="[bold]Against the earlier run[/]\n[dim]Ratios are new times over old, both relative to a copy's.[/]",
        title_justify="left",
        title_style="",
        box=extra("rich.box").SIMPLE_HEAD,
    )
    for heading in ("row", "old", "new", "new over old", "±", ""):
        table.add_column(heading, justify="left" if heading in ("row", "") else "right", no_wrap=True)
    for change in changes:
        pass_, layout, variant, shape, threads = change.new.key
        name = f"{pass_} {written(shape)} {layout} {variant} x{threads} {change.new.contestant.removeprefix('fastbn ')}"
        colour = {"slower": "red", "faster": "green"}.get(change.verdict, "dim")
        spans = (duration(change.old.seconds), duration(change.new.seconds), times(change.ratio))
        table.add_row(name, *spans, f"{change.noise:.0%}", f"[{colour}]{change.verdict}[/]")
    if set(counts) != {"equal"}:
        where.print(table)
    words = ", ".join(f"{counts[word]} {word}" for word in ("equal", "slower", "faster", "noisy") if counts[word])
    where.print(f"Of {len(changes)} rows: {words}.")
