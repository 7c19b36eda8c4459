"""How is a Zarr array normalized that does not fit in memory? Moments and inference of a Dask array, block by block.

    python examples/out_of_core.py                             # 1 GB of data; 0.3 GB of memory
    python examples/out_of_core.py --gigabytes 100 --limit 2   # if the disk has room for 200 GB

The memory of Dask's worker is limited: Dask ends a worker that needs more, and the example fails.
Needs pip install "fastbn[dask]" distributed zarr.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import dask.array as da
import numpy as np
import zarr
from distributed import Client, LocalCluster

import fastbn.dask

CHANNELS, HEIGHT, WIDTH = 64, 32, 32
BLOCK = 16
"""Elements of axis 0 in a block: 4 MB of float32."""


def array_in(folder: Path, rows: int) -> zarr.Array:
    """A new array on disk. Noise is not worth compressing."""
    shape, chunks = (rows, CHANNELS, HEIGHT, WIDTH), (BLOCK, CHANNELS, HEIGHT, WIDTH)
    return zarr.create_array(folder, shape=shape, chunks=chunks, dtype=np.float32, compressors=None)


def fill(x: zarr.Array) -> None:
    """Values far from 0 whose mean drifts from block to block: most of the variance lies between the blocks."""
    noise = da.random.default_rng(0).standard_normal(x.shape, chunks=x.chunks, dtype=np.float32)
    drift = da.linspace(1000, 1010, x.shape[0], chunks=BLOCK, dtype=np.float32)
    da.store(noise + drift[:, np.newaxis, np.newaxis, np.newaxis], x, lock=False)


def normalize(x: zarr.Array, y: zarr.Array) -> fastbn.Moments:
    """Reads x twice: for the moments of all of it, and to normalize it with them."""
    array = da.from_zarr(x)
    moments: fastbn.Moments = fastbn.dask.moments(array).compute()
    mean = moments.mean + moments.mean_low  # in float64, since float32 would round what matters at this offset
    da.store(fastbn.dask.infer(array, None, None, mean, moments.var()), y, lock=False)
    return moments


def main() -> None:
    """Runs the example in a temporary folder."""
    parser = argparse.ArgumentParser(description="Normalizes a Zarr array that is larger than memory.")
    parser.add_argument("--gigabytes", type=float, default=1, help="size of the array (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.3, help="gigabytes of memory (default: %(default)s)")
    arguments = parser.parse_args()
    rows = max(2, round(arguments.gigabytes * 1e9 / (CHANNELS * HEIGHT * WIDTH * 4)))
    limited = LocalCluster(
        n_workers=1, threads_per_worker=2, memory_limit=int(arguments.limit * 1e9), dashboard_address=None
    )
    with tempfile.TemporaryDirectory() as folder, limited as cluster, Client(cluster):
        x, y = array_in(Path(folder) / "x", rows), array_in(Path(folder) / "y", rows)
        fill(x)
        moments = normalize(x, y)
        found: fastbn.Moments = fastbn.dask.moments(da.from_zarr(y)).compute()
        print(f"{x.nbytes / 1e9:.3f} GB of data, {arguments.limit:.3f} GB of memory")
        print(f"x: {moments.count} values per channel, mean {moments.mean[0]:.4f}, variance {moments.var()[0]:.4f}")
        print(
            f"y: mean at most {abs(found.mean).max():.1e}, variance {found.var().min():.6f} to {found.var().max():.6f}"
        )


if __name__ == "__main__":
    main()
