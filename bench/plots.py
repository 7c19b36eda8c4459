"""What do the figures look like? Bars that compare contestants, and for several shapes time against bytes moved.

For one shape the bars are times, so that all panels can be compared. For several they are geometric means of times over
fastbn's, with a dot for each shape.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .extras import extra
from .report import TITLES, duration, times
from .rivals import CONTESTANTS
from .rows import COPY, FASTBN, LIMIT, Row, Run, races
from .shapes import written
from .summary import of_fewer
from .targets import geometric_mean, threads_in_words

INK, PALE, FAINT = "#222222", "#666666", "#e3e3e3"
OURS = ("#c0392b", "#e67e5f", "#8e2417", "#f0a58f")
PEERS = dict(
    zip(
        CONTESTANTS,
        (
            "#9ecae1",
            "#2171b5",
            "#08306b",
            "#a1d99b",
            "#238b45",
            "#8c6bb1",
            "#d08fc0",
            "#b8860b",
            "#e3c05c",
            "#c4c4c4",
            "#7d7d7d",
        ),
        strict=True,
    )
)
GROUPS = {"nchw": "NCHW", "nhwc": "NHWC", "nc": "(N, C)"}
MARKERS = {"nchw": "o", "nhwc": "s", "nc": "D"}

# In the second picture, the layouts of a shape are drawn a little apart, so that they do not hide each other.
BESIDE = {"nchw": 0.94, "nhwc": 1.06, "nc": 1.0}

# An axis that spans a smaller factor also has ticks at 2 and 5 times the powers of ten.
NARROW = 30

# The axis of bytes spans at least this factor, even if all arrays have the same size.
LEAST_SPAN = 12

DPI = 150
BAR_HEIGHT, HEAD_HEIGHT, LEAST_WIDTH = 0.2, 1.1, 7.5  # inches

# Bytes moved are an axis if there are at least this many sizes.
LEAST_SIZES = 3
LONG_NAME = 16  # characters: eight names of this length are wider than the picture


def _name(row: Row) -> str:
    """The contestant's name, followed by the activation and strides if they are not plain."""
    return f"{row.contestant} {row.variant.extras}".rstrip()


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """The contestant of each name. For each operation, fastbn's come first, then the peers in their usual order."""
    operations = list(dict.fromkeys(row.variant.extras for row in rows))
    order = {name: i for i, name in enumerate(CONTESTANTS)}
    racers = [row for row in rows if row.kind not in (COPY, LIMIT)]
    racers.sort(key=lambda row: (operations.index(row.variant.extras), order.get(row.contestant, -1)))
    return {_name(row): row.contestant for row in racers}


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    names = _names(rows)
    ours = [name for name, contestant in names.items() if contestant not in PEERS]
    many = extra("matplotlib").colormaps["YlOrRd"]
    own = OURS if len(ours) <= len(OURS) else [many(0.35 + 0.6 * (i + 0.5) / len(ours)) for i in range(len(ours))]
    return {name: PEERS.get(contestant) or own[ours.index(name)] for name, contestant in names.items()}


def _is_peer(name: str) -> bool:
    return not name.startswith(FASTBN)


class _Sheet:
    """A figure of panels: a row of panels for each (dtype, threads), a column for each pass."""

    def __init__(self, run: Run, title: str, width: float, heights: dict[tuple[str, int], float]) -> None:
        rows = run.rows
        self.lines = list(heights)
        self.passes = [pass_ for pass_ in TITLES if any(row.pass_ == pass_ for row in rows)]
        width, height = max(LEAST_WIDTH, width * len(self.passes)), sum(heights.values()) + 0.9
        self.figure = extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", dpi=DPI)
        self.figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.55 / height), w_pad=0.12, h_pad=0.1)
        self.axes = self.figure.subplots(
            len(self.lines), len(self.passes), squeeze=False, height_ratios=list(heights.values())
        )
        self.figure.text(0.012, 1 - 0.16 / height, title, fontsize=13, fontweight="bold", color=INK, va="top")
        machine = f"{run.machine.get('processor', '')}"
        self.figure.text(0.012, 1 - 0.42 / height, machine, fontsize=8, color=PALE, va="top")

    def panels(self, rows: Sequence[Row]) -> Iterator[tuple[Any, list[Row]]]:
        """Each panel's axes, with title and style set, and its rows of figures."""
        for (dtype, threads), line in zip(self.lines, self.axes, strict=True):
            for pass_, ax in zip(self.passes, line, strict=True):
                here = [row for row in rows if (row.pass_, row.dtype, row.threads) == (pass_, dtype, threads)]
                title = f"{TITLES[pass_]}, {dtype}, {threads_in_words(threads)}"
                ax.set_title(title, fontsize=10, loc="left", color=INK, pad=14)
                ax.spines[["top", "right"]].set_visible(False)
                ax.tick_params(labelsize=8, colors=INK)
                yield ax, here

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path)
        return path


class _Bar(NamedTuple):
    """A contestant in one layout: its value, the values of `found` of its shapes, and whether all of them are noisy."""

    layout: str
    name: str
    contestant: str
    value: float
    dots: list[float]
    noisy: bool
    found: int
    shapes: int


def _first(race: Sequence[Row]) -> Row:
    """The first of fastbn's rows."""
    return next(row for row in race if row.kind == FASTBN)


def _ratio(row: Row, race: Sequence[Row]) -> float:
    """The time over that of fastbn's first row; of an operation of fastbn alone, over that of the call without it."""
    over = [ratio for base, ratio in row.against.items() if base != "float32"]
    is_only = sum(other.kind == FASTBN for other in race) == 1
    return over[0] if row.kind == FASTBN and is_only and over else row.to_copy / _first(race).to_copy


def _bars_of(rows: Sequence[Row], alone: bool) -> Iterator[_Bar]:
    """The bars of a panel, layout by layout: copies, limits, then fastbn's and the peers, operation by operation."""
    by_race = races(rows)
    for layout in GROUPS:
        here = [row for row in rows if row.layout == layout]
        yardsticks = {kind: kind for kind in (LIMIT, COPY) if any(row.kind == kind for row in here)}
        for name, contestant in {**yardsticks, **_names(here)}.items():
            if name in yardsticks:  # of the plain calls, if there are any
                all_of = [row for row in here if row.kind == name]
                mine = [row for row in all_of if not row.variant.extras] or all_of
            else:
                mine = [row for row in here if _name(row) == name]
            steady = [row for row in mine if not (row.noisy or (not alone and _first(by_race[row.key]).noisy))]
            shown = steady or mine
            dots = [row.seconds if alone else _ratio(row, by_race[row.key]) for row in shown]
            yield _Bar(
                layout,
                name,
                contestant,
                geometric_mean(dots),
                dots,
                not steady,
                len({row.shape for row in shown}),
                len({row.shape for row in mine}),
            )


def _bar_panel(ax: Any, bars: Sequence[_Bar], colours: dict[str, Any], alone: bool) -> None:
    across, start = ax.get_yaxis_transform(), 0 if alone else 1
    at, previous, names = -0.6, "", {}
    for bar in bars:
        if bar.layout != previous:
            shapes = max(other.shapes for other in bars if other.layout == bar.layout)
            names[at + 0.5] = (
                GROUPS[bar.layout] if alone else f"{GROUPS[bar.layout]}, {shapes} shape{'s' * (shapes != 1)}"
            )
            at += 1.6
        previous, names[at] = bar.layout, bar.name
        colour = colours.get(bar.name, PALE)
        look = {"facecolor": "none", "hatch": "////"} if bar.noisy else {"facecolor": colour}
        ax.barh(at, bar.value - start, left=start, height=0.74, edgecolor=colour, linewidth=0.5, zorder=2, **look)
        if not alone and len(bar.dots) > 1:
            ax.plot(bar.dots, [at] * len(bar.dots), "o", ms=2.4, color=INK, alpha=0.5, mew=0, zorder=3)
        text = f"{'~' * bar.noisy}{duration(bar.value) if alone else times(bar.value)}"
        text += "" if alone else of_fewer(bar.found, shapes)
        weight = "bold" if bar.contestant.startswith(FASTBN) else "normal"
        ax.text(1.03, at, text, transform=across, fontsize=8, va="center", fontweight=weight)
        at += 1
    ax.set_yticks(list(names), list(names.values()))
    headings = GROUPS.values()
    for label in ax.get_yticklabels():
        text = label.get_text()
        label.set_fontweight("bold" if text.startswith(FASTBN) else "normal")
        label.set_color(PALE if any(text == one or text.startswith(f"{one}, ") for one in headings) else INK)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(at - 0.3, -0.7)


def _ratio_axis(ax: Any, bars: Sequence[_Bar]) -> None:
    ticker = extra("matplotlib.ticker")
    ratios = [dot for bar in bars for dot in bar.dots]
    ax.set_xscale("log")
    low, high = min(0.6, min(ratios) / 1.1), max(3.0, max(ratios) * 1.1)
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5) if high / low < 200 else (1,)))
    ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.grid(axis="x", color=FAINT, linewidth=0.7, zorder=0)
    ax.axvline(1, color=INK, linewidth=1.2, zorder=4)
    ax.annotate("fastbn", (1, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="center", va="bottom", color=INK)
    own = "\nfastbn's operations: times its plain call's" * any(bar.name != bar.contestant for bar in bars)
    ax.set_xlabel(f"times fastbn's; bar: geometric mean, dots: shapes{own}", fontsize=8, color=PALE)


def _time_axis(ax: Any, most: float) -> None:
    ticker = extra("matplotlib.ticker")
    ax.set_xlim(0, most * 1.03)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(_time))
    ax.grid(axis="x", color=FAINT, linewidth=0.7, zorder=0)
    ax.set_xlabel("time of a call", fontsize=8, color=PALE)


def draw_bars(run: Run, path: Path) -> Path:
    """Draws how long each contestant takes: times for one shape, else times over fastbn's."""
    shapes = {row.shape for row in run.rows}
    alone, lines = len(shapes) == 1, dict.fromkeys((row.dtype, row.threads) for row in run.rows)
    passes = dict.fromkeys(row.pass_ for row in run.rows)
    panels = {
        (*line, pass_): list(_bars_of([r for r in run.rows if (r.dtype, r.threads, r.pass_) == (*line, pass_)], alone))
        for line in lines
        for pass_ in passes
    }
    heights = {
        line: (max(len(panels[*line, pass_]) for pass_ in passes) + 0.6 * len(GROUPS)) * BAR_HEIGHT + HEAD_HEIGHT
        for line in lines
    }
    title = (
        f"Time for {written(*shapes)} (left is better)"
        if alone
        else "Time over fastbn's (right of 1: slower than fastbn)"
    )
    sheet = _Sheet(run, title, 4.6, heights)
    colours = _colours(run.rows)
    for ax, rows in sheet.panels(run.rows):
        if rows:
            bars = panels[rows[0].dtype, rows[0].threads, rows[0].pass_]
            _bar_panel(ax, bars, colours, alone)
            if alone:
                _time_axis(ax, max(b.value for (*_, pass_), of in panels.items() if pass_ == rows[0].pass_ for b in of))
            else:
                _ratio_axis(ax, bars)
    return sheet.save(path)


def _copy_line(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """The copies' bytes and median times, extended at the last copy's speed beyond the largest row."""
    by_bytes: dict[int, list[float]] = {}
    for row in rows:
        if row.kind == COPY:
            by_bytes.setdefault(row.bytes_moved, []).append(row.seconds)
    moved: list[float] = [float(size) for size in sorted(by_bytes)]
    seconds = [statistics.median(by_bytes[size]) for size in sorted(by_bytes)]
    most = max(row.bytes_moved for row in rows) * 1.4
    return [*moved, most], [*seconds, seconds[-1] * most / moved[-1]]


def _size(value: float, _: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def _time(value: float, _: int) -> str:
    if value == 0:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size * 0.999:
            return f"{value / size:g} {unit}"
    return f"{value / 1e-9:g} ns"


def _roofline_panel(ax: Any, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    ticker = extra("matplotlib.ticker")
    moved, seconds = _copy_line(rows)
    low = min(row.seconds for row in rows) / 1.6
    ax.fill_between(moved, seconds, low, color=FAINT, alpha=0.6, linewidth=0, zorder=1)
    ax.plot(moved, seconds, color=INK, linewidth=1.4, zorder=2)
    limits = sorted((row.bytes_moved, row.seconds) for row in rows if row.kind == LIMIT and not row.noisy)
    if limits:
        ax.plot(*zip(*limits, strict=True), color=INK, linewidth=1.2, ls=":", zorder=2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for name, layout in dict.fromkeys((_name(row), row.layout) for row in rows if row.kind not in (COPY, LIMIT)):
        here = [row for row in rows if (_name(row), row.layout) == (name, layout)]
        peer = _is_peer(name)
        look = {"ms": 4.2 if peer else 5.8, "alpha": 0.8 if peer else 1.0, "zorder": 3 if peer else 5}
        beside = [row.bytes_moved * BESIDE[layout] for row in here]
        taken = [row.seconds for row in here]
        ax.plot(beside, taken, MARKERS[layout], mfc=colours[name], mec="white", mew=0.5, **look)
    ax.set_ylim(low, max(row.seconds for row in rows) * 1.5)
    ax.set_xlim(min(min(row.bytes_moved for row in rows) / 1.4, moved[-1] / LEAST_SPAN), moved[-1])
    for axis, (least, most) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5) if most / least < NARROW else (1,)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(_size))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(_time))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    ax.grid(color=FAINT, linewidth=0.7, zorder=0)
    ax.text(0.98, 0.03, "faster than a copy", transform=ax.transAxes, fontsize=8, ha="right", color=PALE)
    ax.set_xlabel("bytes that the pass must move", fontsize=8, color=PALE)


def _legend(sheet: _Sheet, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    line = extra("matplotlib.lines").Line2D
    looks = {contestant if _is_peer(name) else name: colours[name] for name, contestant in _names(rows).items()}
    dots = [(name, "o", colour) for name, colour in looks.items()]
    columns = 8 if max(map(len, looks)) < LONG_NAME else 6
    present = {row.layout for row in rows}
    dots += [(title, MARKERS[layout], PALE) for layout, title in GROUPS.items() if layout in present]
    entries = [line([], [], color=INK, linewidth=1.4, label="a copy")]
    if any(row.kind == LIMIT for row in rows):
        entries.append(line([], [], color=INK, linewidth=1.2, ls=":", label="the limit"))
    entries += [line([], [], ls="", marker=marker, color=colour, label=name) for name, marker, colour in dots]
    sheet.figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def draw_roofline(run: Run, path: Path) -> Path:
    """Draws each row's time against the bytes that it must at least move, and the line of the copies."""
    heights = {(row.dtype, row.threads): 4.0 for row in run.rows}
    sheet = _Sheet(run, "Time against bytes moved, beside a copy's", 4.6, heights)
    colours = _colours(run.rows)
    for ax, rows in sheet.panels(run.rows):
        if rows:
            _roofline_panel(ax, rows, colours)
    _legend(sheet, run.rows, colours)
    return sheet.save(path)


def draw(run: Run, folder: Path) -> list[Path]:
    """Draws the pictures that make sense for the run, and returns their paths."""
    pictures = [draw_bars(run, folder / "bars.png")]
    # A dtype has panels of its own.
    sizes: dict[str, set[int]] = {}
    for row in run.rows:
        if row.kind == COPY:
            sizes.setdefault(row.dtype, set()).add(row.bytes_moved)
    if max(map(len, sizes.values()), default=0) >= LEAST_SIZES:
        pictures.append(draw_roofline(run, folder / "roofline.png"))
    return pictures
