"""What do the rows say in short? Geometric means over the shapes; and as a page in Markdown, one a processor."""

from __future__ import annotations

from collections.abc import Sequence

from .rivals import CONTESTANTS
from .rows import COPY, FASTBN, LIMIT, Row, Run, races
from .targets import geometric_mean, threads_in_words

HEAD = """# Batch norm on {processor}

How many times as long as fastbn others take: geometric means over {shapes}. Above 1, fastbn is faster. "limit": the
plainest loops in C that move the same bytes; "copy": `np.copyto` of the same array. A number in parentheses: the mean
is of so many shapes, since others were too noisy or did not run. Other processors differ.

By `{command}`, on {system}, {date}.

"""

PASSES = {"forward": "training forward", "backward": "backward", "infer": "inference"}
LAYOUTS = {"nchw": "channels-first", "nhwc": "channels-last", "nc": "matrices"}

Mean = tuple[float, int]
"""A geometric mean, and of how many shapes it is."""

Line = tuple[str, int, list[Mean | None]]


def columns(rows: Sequence[Row]) -> list[str]:
    """The names of what the rows of fastbn are compared with, in the order of the tables."""
    found = {name for row in rows if row.kind == FASTBN for name in row.others}
    bases = dict.fromkeys(base for row in rows for base in row.against)
    return [name for name in (LIMIT, COPY, *bases, *CONTESTANTS) if name in found]


def _steady(row: Row, name: str, race: Sequence[Row]) -> bool:
    """Whether the row has a ratio to this one, and neither is noisy."""
    noisy = row.noisy or any(other.noisy for other in race if other.contestant == name)
    return name in row.others and not noisy


def summary(rows: Sequence[Row]) -> tuple[list[str], list[Line]]:
    """The columns, and lines of (what, number of shapes, means); a mean is of the shapes that are not noisy."""
    by_race, names = races(rows), columns(rows)
    groups: dict[str, list[Row]] = {}
    several = len({row.contestant for row in rows if row.kind == FASTBN}) > 1
    for row in rows:
        if row.kind == FASTBN:
            backend = f", {row.contestant.removeprefix('fastbn ')}" * several
            what = (
                f"{PASSES[row.pass_]}, {LAYOUTS[row.layout]}, {row.variant}, {threads_in_words(row.threads)}{backend}"
            )
            groups.setdefault(what, []).append(row)
    lines: list[Line] = []
    for what, group in groups.items():
        means: list[Mean | None] = []
        for name in names:
            ratios = [row.others[name] for row in group if _steady(row, name, by_race[row.key])]
            means.append((geometric_mean(ratios), len(ratios)) if ratios else None)
        lines.append((what, len({row.shape for row in group}), means))
    return names, lines


def of_fewer(found: int, shapes: int) -> str:
    """What follows a mean that is not of all shapes: of how many it is."""
    return f" ({found})" if found < shapes else ""


def _figure(mean: Mean | None, shapes: int) -> str:
    if mean is None:
        return ""
    ratio, found = mean
    return (f"{ratio:.2f}" if ratio < 1.995 else f"{ratio:.1f}") + of_fewer(found, shapes)


def page(run: Run) -> str:
    """The summary in Markdown, with the processor, the command and the versions."""
    names, lines = summary(run.rows)
    count = len({row.shape for row in run.rows})
    head = HEAD.format(shapes=f"{count} shapes" if count > 1 else "one shape", **run.machine)
    table = [["", *names], ["---"] * (len(names) + 1)]
    table += [[what, *(_figure(mean, shapes) for mean in means)] for what, shapes, means in lines]
    versions = [
        f"- {name}: {value}"
        for name, value in run.machine.items()
        if name not in ("processor", "system", "date", "command")
    ]
    noisy = sum(row.noisy for row in run.rows)
    notes = [f"- {note}" for note in run.notes] + [f"- {noisy} of {len(run.rows)} rows were too noisy to count"] * (
        noisy > 0
    )
    body = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    return head + body + "\n" + "".join(f"{line}\n" for line in versions + notes)
