"""Are fastbn's numbers right, and its calls not slow, beside torch, which brings an OpenMP runtime of its own?"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fastbn
from fastbn.torch import convert_batchnorm

SHAPE = 32, 64, 28, 28


def seconds(call: Callable[[], object], turns: int = 30) -> float:
    """The median of some calls."""
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def runtimes() -> list[str]:
    """The OpenMP libraries of this process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split() if Path("/proc/self/maps").exists() else []
    return sorted({word for word in maps if word.startswith("/") and ("omp" in Path(word).name)})


def main() -> None:
    print(fastbn.__file__)
    torch.set_num_threads(2)
    x = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    out = np.empty_like(x)
    tensor = torch.from_numpy(x)
    alone = fastbn.forward(x, activation="relu").y

    def ours() -> None:
        assert fastbn.forward(x, activation="relu", out=out).y.tobytes() == alone.tobytes()

    def theirs() -> torch.Tensor:
        return torch.nn.functional.batch_norm(tensor, None, None, training=True)

    before = seconds(lambda: fastbn.forward(x, out=out))
    wanted = theirs().relu().numpy()
    assert abs(alone - wanted).max() < 1e-5
    print(*runtimes(), sep="\n")
    # In turns, as a training loop has them.
    for _ in range(20):
        ours()
        assert abs(theirs().relu().numpy() - wanted).max() < 1e-5
    beside = seconds(lambda: (theirs(), fastbn.forward(x, out=out))) - seconds(theirs)
    print(f"fastbn: {before * 1e3:.2f} ms before torch's threads are there, {beside * 1e3:.2f} ms in turns with them")
    # At once, from two threads.
    thread = threading.Thread(target=lambda: [theirs() for _ in range(50)])
    thread.start()
    for _ in range(50):
        ours()
    thread.join()
    # A network, converted.
    network = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
    plain = network(tensor).detach()
    assert (convert_batchnorm(network)(tensor).detach() - plain).abs().max() < 1e-4
    print("right")


if __name__ == "__main__":
    main()
