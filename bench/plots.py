"""What do the figures look like? Two pictures: bars that compare the peers, and time against bytes moved."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .extras import extra
from .report import TITLES, times
from .rivals import CONTESTANTS
from .rows import COPY, FASTBN, Row, Run
from .targets import geometric_mean, threads_in_words

INK, PALE, FAINT = "#222222", "#666666", "#e3e3e3"
OURS = ("#c0392b", "#e67e5f", "#8e2417", "#f0a58f")
PEERS = dict(
    zip(
        CONTESTANTS,
        ("#9ecae1", "#2171b5", "#a1d99b", "#238b45", "#8c6bb1", "#d08fc0", "#b8860b", "#e3c05c", "#c4c4c4", "#7d7d7d"),
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
BAR_HEIGHT, HEAD_HEIGHT = 0.2, 1.1  # inches
LONG_NAME = 16  # characters: eight names of this length are wider than the picture


def _name(row: Row) -> str:
    """The contestant's name, followed by the activation and strides if they are not plain."""
    return f"{row.contestant} {row.variant.extras}".rstrip()


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """The contestant of each name. For each operation, fastbn's come first, then the peers in their usual order."""
    operations = list(dict.fromkeys(row.variant.extras for row in rows))
    order = {name: i for i, name in enumerate(CONTESTANTS)}
    racers = [row for row in rows if row.kind != COPY]
    racers.sort(key=lambda row: (operations.index(row.variant.extras), order.get(row.contestant, -1)))
    return {_name(row): row.contestant for row in racers}


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    names = _names(rows)
    ours = [name for name, contestant in names.items() if contestant not in PEERS]
    many = extra("matplotlib").colormaps["turbo"]
    own = OURS if len(ours) <= len(OURS) else [many((i + 0.5) / len(ours)) for i in range(len(ours))]
    return {name: PEERS.get(contestant) or own[ours.index(name)] for name, contestant in names.items()}


def _is_peer(name: str) -> bool:
    return not name.startswith(FASTBN)


class _Sheet:
    """A figure of panels: a row of panels for each (dtype, threads), a column for each pass."""

    def __init__(self, run: Run, title: str, width: float, heights: dict[tuple[str, int], float]) -> None:
        rows = run.rows
        self.lines = list(heights)
        self.passes = [pass_ for pass_ in TITLES if any(row.pass_ == pass_ for row in rows)]
        width, height = width * len(self.passes), sum(heights.values()) + 0.9
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


def _bars_of(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[float]]]:
    """(layout, name, the ratios to a copy for all shapes), layout by layout."""
    for layout in GROUPS:
        here = [row for row in rows if row.layout == layout and row.kind != COPY]
        for name in _names(here):
            yield layout, name, [row.to_copy for row in here if _name(row) == name]


def _bar_panel(ax: Any, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    across = ax.get_yaxis_transform()
    at, previous, names = -0.6, "", {}
    for layout, name, ratios in _bars_of(rows):
        if layout != previous:
            names[at + 0.5] = f"{GROUPS[layout]}, {len(ratios)} shape{'s' * (len(ratios) != 1)}"
            at += 1.6
        previous, names[at] = layout, name
        mean, weight = geometric_mean(ratios), "normal" if _is_peer(name) else "bold"
        ax.barh(at, mean - 1, left=1, height=0.74, color=colours[name], zorder=2)
        ax.plot(ratios, [at] * len(ratios), "o", ms=2.4, color=INK, alpha=0.5, mew=0, zorder=3)
        ax.text(1.03, at, times(mean), transform=across, fontsize=8, va="center", fontweight=weight)
        at += 1
    ax.set_yticks(list(names), list(names.values()))
    for label in ax.get_yticklabels():
        text = label.get_text()
        label.set_fontweight("normal" if _is_peer(text) else "bold")
        label.set_color(PALE if text.split(",")[0] in GROUPS.values() or text.startswith("(") else INK)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(at - 0.3, -0.7)


def _ratio_axis(ax: Any, rows: Sequence[Row]) -> None:
    ticker = extra("matplotlib.ticker")
    ratios = [row.to_copy for row in rows]
    ax.set_xscale("log")
    low, high = min(0.6, min(ratios) / 1.1), max(3.0, max(ratios) * 1.1)
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5) if high / low < 200 else (1,)))
    ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.grid(axis="x", color=FAINT, linewidth=0.7, zorder=0)
    ax.set_axisbelow(True)
    ax.axvline(1, color=INK, linewidth=1.2, zorder=4)
    ax.annotate("a copy", (1, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="center", va="bottom", color=INK)


def draw_bars(run: Run, path: Path) -> Path:
    """Draws each contestant's time over a copy's: a bar for the geometric mean of the shapes, a dot for each shape."""
    groups: dict[tuple[str, int], dict[str, set[tuple[str, str]]]] = {}
    for row in run.rows:
        bars = groups.setdefault((row.dtype, row.threads), {}).setdefault(row.pass_, set())
        bars.add((row.layout, _name(row)))
    heights = {line: max(map(len, bars.values())) * BAR_HEIGHT + HEAD_HEIGHT for line, bars in groups.items()}
    sheet = _Sheet(run, "Time over that of a copy of the same array (left is better)", 4.6, heights)
    colours = _colours(run.rows)
    for ax, rows in sheet.panels(run.rows):
        if rows:
            _bar_panel(ax, rows, colours)
            _ratio_axis(ax, rows)
            ax.set_xlabel("times a copy; bar: geometric mean, dots: shapes", fontsize=8, color=PALE)
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
    ax.set_xscale("log")
    ax.set_yscale("log")
    for name, layout in dict.fromkeys((_name(row), row.layout) for row in rows if row.kind != COPY):
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
    entries += [line([], [], ls="", marker=marker, color=colour, label=name) for name, marker, colour in dots]
    sheet.figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def draw_roofline(run: Run, path: Path) -> Path:
    """Draws each row's time against the bytes that it must at least move, and the line of the copies."""
    heights = {(row.dtype, row.threads): 4.0 for row in run.rows}
    sheet = _Sheet(run, "Time against bytes moved, and the limit that a copy sets", 4.6, heights)
    colours = _colours(run.rows)
    for ax, rows in sheet.panels(run.rows):
        if rows:
            _roofline_panel(ax, rows, colours)
    _legend(sheet, run.rows, colours)
    return sheet.save(path)


def draw(run: Run, folder: Path) -> list[Path]:
    """Draws both pictures, and returns their paths."""
    return [draw_bars(run, folder / "bars.png"), draw_roofline(run, folder / "roofline.png")]
