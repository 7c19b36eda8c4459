"""What does it cost to synchronize norms over ranks? Times steps, and the part of them that communication takes.

`fastbn bench --ranks` starts this module as the ranks, each with one thread and its share of a batch: over MPI with
fastbn.mpi's functions, and over gloo with fastbn.torch.SyncBatchNorm.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fastbn

from .extras import extra
from .report import duration
from .shapes import RESNET50, Shape, written
from .timing import Budget

IN_A_STEP = dict(zip(RESNET50, (1, 4, 1, 6, 5, 1, 7, 7, 1, 11, 4, 5), strict=True))
"""How many of ResNet-50's 53 norms have each shape."""

TRANSPORTS = {"MPI": "mpi4py", "gloo": "torch"}
"""How ranks communicate, and the package that is needed."""

KEY = (
    "a step: the slowest rank's median; of 1 rank's: over that of one rank with the whole batch; communication: in\n"
    "the gathers, of the rank that waits least; waiting: how much longer the rank is there that waits most; sent: by\n"
    "each rank."
)

MOST_STEPS = 200
TIMEOUT = 600


@dataclass(frozen=True)
class Row:
    """The forward and backward pass of one norm, on all ranks together.

    Attributes
    ----------
    seconds : the median over the steps of the slowest rank's time
    communication : the median of the time in gathers, of the rank that is there least: it does not wait for others
    waiting : the median of how much longer the rank is there that waits most
    sent : the bytes that a rank sends to each other rank, or to itself, in a step
    """

    transport: str
    ranks: int
    shape: Shape
    seconds: float
    communication: float
    waiting: float
    sent: int


# On a rank -----------------------------------------------------------------------------------------------------------


class Clock:
    """Adds up the seconds and the bytes of the gathers that it wraps."""

    def __init__(self) -> None:
        self.seconds, self.sent = 0.0, 0

    def timed(self, gather: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return gather(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.sent += size(*args)

        return wrapped


@dataclass
class Transport:
    """What a rank needs: its place, the gathers' clock, a gather of any objects, a maker of steps, and the way out."""

    rank: int
    ranks: int
    clock: Clock
    everyone: Callable[[Any], list[Any]]
    step: Callable[[Any, Any], Callable[[], Any]]
    leave: Callable[[], None]


def _mpi() -> Transport:
    mpi, layers, clock = importlib.import_module("mpi4py.MPI"), importlib.import_module("fastbn.mpi"), Clock()

    class Timed(mpi.Intracomm):  # type: ignore[misc, name-defined]
        Allgather = clock.timed(mpi.Intracomm.Allgather, lambda comm, sent, received: sent.nbytes)
        Allgatherv = clock.timed(mpi.Intracomm.Allgatherv, lambda comm, sent, received: sent.nbytes)

    comm = Timed(mpi.COMM_WORLD)

    def step(x: Any, dy: Any) -> Callable[[], Any]:
        channels, y, dx = x.shape[1], np.empty_like(x), np.empty_like(x)
        gamma, beta, mean, var = np.ones((4, channels), np.float32)

        def run() -> None:
            _, cache = layers.forward(x, gamma, beta, mean, var, comm=comm, out=y)
            layers.backward(dy, cache, comm=comm, out=dx)

        return run

    return Transport(comm.rank, comm.size, clock, mpi.COMM_WORLD.allgather, step, lambda: None)


def _gloo() -> Transport:
    torch, clock = importlib.import_module("torch"), Clock()
    dist, layers = torch.distributed, importlib.import_module("fastbn.torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    everyone = dist.all_gather_object
    dist.all_gather = clock.timed(dist.all_gather, lambda received, sent: sent.nbytes)

    def of_all(value: Any) -> list[Any]:
        found = [None] * dist.get_world_size()
        everyone(found, value)
        return found

    def step(x: Any, dy: Any) -> Callable[[], Any]:
        layer, given = layers.SyncBatchNorm(x.shape[1]), torch.from_numpy(x).requires_grad_()
        wanted = (given, layer.weight, layer.bias)
        return lambda: torch.autograd.grad(layer(given), wanted, torch.from_numpy(dy))

    def leave() -> None:
        """Ends gloo's threads, which would at times abort a process that ends before them."""
        dist.barrier()
        dist.destroy_process_group()

    return Transport(dist.get_rank(), dist.get_world_size(), clock, of_all, step, leave)


def _timed(transport: Transport, shape: Shape, budget: Budget) -> tuple[float, float, float, int]:
    """The seconds, communication, waiting and bytes of a step."""
    share = shape[0] // transport.ranks + (transport.rank < shape[0] % transport.ranks)
    x, dy = np.random.default_rng(transport.rank).standard_normal((2, share, *shape[1:]), np.float32)
    step, clock = transport.step(x, dy), transport.clock
    step()
    start = time.perf_counter()
    step()
    slowest = max(transport.everyone(time.perf_counter() - start))
    steps = min(MOST_STEPS, max(budget.least, int(budget.seconds / slowest)))
    seconds, gathers = [], []
    for _ in range(steps):
        transport.everyone(None)  # they start together
        clock.seconds, clock.sent, start = 0.0, 0, time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        gathers.append(clock.seconds)
    sent = clock.sent
    of_all = np.array(transport.everyone((seconds, gathers)))
    least, most = of_all[:, 1].min(axis=0), of_all[:, 1].max(axis=0)
    return float(np.median(of_all[:, 0].max(axis=0))), float(np.median(least)), float(np.median(most - least)), sent


def _work(name: str, job: dict[str, Any]) -> None:
    """What a rank does: rank 0 prints a line for each shape."""
    fastbn.set_num_threads(1)
    transport = {"MPI": _mpi, "gloo": _gloo}[name]()
    for shape in map(tuple, job["shapes"]):
        found = _timed(transport, shape, Budget(**job["budget"]))
        if transport.rank == 0:
            print(json.dumps(found), flush=True)
    transport.leave()


# The bench -----------------------------------------------------------------------------------------------------------


def _commands(name: str, ranks: int, job: str) -> Iterator[list[str]]:
    """The commands that start the ranks."""
    module = ["-m", "fastbn.bench.ranks", name, job]
    if name == "MPI":
        beside = Path(sys.executable).with_name("mpiexec")
        mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
        if mpiexec is None:
            raise ImportError('--ranks finds no mpiexec: pip install "fastbn[mpi]" mpich')
        yield [mpiexec, "-n", str(ranks), sys.executable, "-P", "-m", "mpi4py", *module]
        return
    for _ in range(ranks):
        yield [sys.executable, "-P", *module]


def _started(name: str, ranks: int, job: str) -> str:
    """What rank 0 prints. Raises RuntimeError with the last line of a rank that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(_commands(name, ranks, job))
    ]
    try:
        printed = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        if process.returncode:
            raise RuntimeError((errors.strip().splitlines() or [f"status {process.returncode}"])[-1])
    return printed[0][0]


def measure(ranks: Sequence[int], shapes: Sequence[Shape], budget: Budget) -> tuple[list[Row], list[str]]:
    """The rows, and notes on what does not run."""
    rows, notes = [], []
    job = json.dumps({"shapes": shapes, "budget": asdict(budget)})
    for name, package in TRANSPORTS.items():
        try:
            importlib.import_module(package)
            for number in ranks:
                lines = _started(name, number, job).splitlines()
                rows += [Row(name, number, shape, *json.loads(line)) for shape, line in zip(shapes, lines, strict=True)]
        except (ImportError, RuntimeError, subprocess.TimeoutExpired) as error:
            notes.append(f"{name} does not run: {error}")
    return rows, notes


def whole_steps(rows: Sequence[Row]) -> list[Row]:
    """ResNet-50's 53 norms together, where all of its shapes were timed."""
    found = []
    for transport, ranks in dict.fromkeys((row.transport, row.ranks) for row in rows):
        some = [row for row in rows if (row.transport, row.ranks) == (transport, ranks)]
        counts = [IN_A_STEP.get(row.shape[1:], 0) for row in some]
        if {row.shape[1:] for row in some} != set(IN_A_STEP):
            continue
        sums = [
            sum(count * getattr(row, name) for count, row in zip(counts, some, strict=True))
            for name in ("seconds", "communication", "waiting", "sent")
        ]
        found.append(Row(transport, ranks, (), *sums))
    return found


def table(rows: Sequence[Row]) -> Any:
    found = extra("rich.table").Table(
        title="Forward and backward of one norm, float32, on ranks of one thread that share the batch",
        title_justify="left",
        box=extra("rich.box").SIMPLE_HEAD,
    )
    for heading in ("shape", "", "ranks", "a step", "of 1 rank's", "communication", "waiting", "sent"):
        found.add_column(heading, justify="right" if heading not in ("shape", "") else "left", no_wrap=True)
    every = [*rows, *whole_steps(rows)]
    alone = {(row.transport, row.shape): row.seconds for row in every if row.ranks == 1}
    for row in every:
        before = alone.get((row.transport, row.shape))
        found.add_row(
            written(row.shape) or "ResNet-50's 53 norms",
            row.transport,
            str(row.ranks),
            duration(row.seconds),
            "-" if before is None else f"{row.seconds / before:.2f}",
            f"{duration(row.communication)} ({row.communication / row.seconds:.0%})",
            f"{duration(row.waiting)} ({row.waiting / row.seconds:.0%})",
            f"{row.sent / 1024:.1f} KiB",
        )
    return found


if __name__ == "__main__":
    _work(sys.argv[1], json.loads(sys.argv[2]))
