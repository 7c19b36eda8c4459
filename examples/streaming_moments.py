"""How is data normalized that does not fit in memory? Moments block by block, merged; then y block by block.

    python examples/streaming_moments.py                    # a quarter of a gigabyte
    python examples/streaming_moments.py --gigabytes 100    # more than memory, if the disk has twice that

Needs rich for its progress bar: pip install "fastbn[demo]".
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastbn

try:
    from rich.progress import track
except ImportError as error:
    raise SystemExit('The progress bar needs rich: pip install "fastbn[demo]"') from error

CHANNELS, HEIGHT, WIDTH = 64, 32, 32
BLOCK = 64
"""Elements of axis 0 that are in memory at a time: 16 MB of float32."""


def blocks_of(rows: int, what: str) -> Iterator[slice]:
    """Slices of axis 0, with a progress bar."""
    for start in track(range(0, rows, BLOCK), description=f"{what:<10}"):
        yield slice(start, min(start + BLOCK, rows))


def array_in(path: Path, rows: int) -> np.memmap[Any, Any]:
    """A new file of float32, seen as an array."""
    return np.memmap(path, np.float32, "w+", shape=(rows, CHANNELS, HEIGHT, WIDTH))


def fill(x: np.memmap[Any, Any]) -> None:
    """Values far from 0 whose mean drifts from block to block: most of the variance lies between the blocks."""
    rng = np.random.default_rng(0)
    for some in blocks_of(len(x), "data"):
        x[some] = rng.standard_normal(x[some].shape, np.float32)
        x[some] += 1000 + 10 * some.start / len(x)


def normalize(x: np.memmap[Any, Any], y: np.memmap[Any, Any]) -> fastbn.Moments:
    """What fastbn.forward(x, out=y) would do, with a block in memory at a time."""
    moments = sum(fastbn.moments(x[some]) for some in blocks_of(len(x), "moments"))
    for some in blocks_of(len(x), "normalize"):
        fastbn.forward(x[some], moments=moments, out=y[some])
    return moments


def main() -> None:
    """Runs the example in a temporary folder."""
    parser = argparse.ArgumentParser(description="Normalizes a file block by block.")
    parser.add_argument("--gigabytes", type=float, default=0.25, help="size of the file (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the two files go for the time being")
    arguments = parser.parse_args()
    rows = max(2, round(arguments.gigabytes * 1e9 / (CHANNELS * HEIGHT * WIDTH * 4)))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        x, y = array_in(Path(folder) / "x", rows), array_in(Path(folder) / "y", rows)
        fill(x)
        moments = normalize(x, y)
        found = sum(fastbn.moments(y[some]) for some in blocks_of(rows, "check"))
        print(f"x: {moments.count} values per channel, mean {moments.mean[0]:.4f}, variance {moments.var()[0]:.4f}")
        print(
            f"y: mean at most {abs(found.mean).max():.1e}, variance {found.var().min():.6f} to {found.var().max():.6f}"
        )
        del x, y  # Windows removes no file that is open


if __name__ == "__main__":
    main()
