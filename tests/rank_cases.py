"""What do the tests of several ranks share? Cases, how they are divided, how ranks are started, and what is right."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]

WORLD = 4
"""The ranks that are started once; a case on fewer ranks runs on the first of them."""

SHARES = {1: (12,), 2: (7, 5), 3: (4, 0, 8), 4: (0, 1, 8, 3)}
"""How many elements of axis 0 each rank has, by the number of ranks."""

MOMENTUM, EPS = 0.1, 1e-5


class Case(NamedTuple):
    """One forward and backward call of all ranks together."""

    shape: tuple[int, ...] = (12, 5, 4, 3)
    dtype: str = "float32"
    axis: int = 1
    offset: float = 0.5
    drift: float = 0
    """By how much the mean rises from one element of axis 0 to the next."""
    activation: Any = None
    residual: bool = False
    masked: bool = False
    training: bool = True
    order: tuple[int, ...] | None = None
    """The axes from the slowest in memory to the fastest."""
    backend: str | None = None

    def call(self) -> cases.Call:
        c = cases.call(self.shape, self.dtype, self.axis, self.offset)
        steps = self.drift * np.arange(self.shape[0]).reshape(-1, *[1] * (len(self.shape) - 1))
        return c._replace(x=(c.x + steps).astype(c.x.dtype))

    def mask(self) -> Array | None:
        """Leaves nothing of the first share of three."""
        if not self.masked:
            return None
        mask = cases.random_mask(self.shape, self.axis, seed=1, least=8)
        mask[: SHARES[3][0]] = False
        return mask

    def placed(self, array: Array) -> Array:
        """The array, in the case's order in memory."""
        if self.order is None:
            return np.ascontiguousarray(array)
        return np.ascontiguousarray(array.transpose(self.order)).transpose(np.argsort(self.order))


SHARED = {
    "float32": Case(),
    "float64": Case(dtype="float64"),
    "rows": Case((12, 5)),
    "rows of float64": Case((12, 7), "float64"),
    "one axis": Case((12, 5, 6)),
    "five axes": Case((12, 5, 2, 3, 2), "float64"),
    "channels-last seen as channels-first": Case(order=(0, 2, 3, 1)),
    "permuted": Case(order=(1, 0, 2, 3)),
    "batch innermost": Case(dtype="float64", order=(1, 2, 3, 0)),
    "far from zero": Case(offset=1e6),
    "the variance is between the ranks": Case(drift=1000),
    "the variance is between the ranks, float64": Case(dtype="float64", drift=1000),
    "activation": Case(activation="relu"),
    "activation and residual": Case(dtype="float64", activation="silu", residual=True),
    "residual": Case(residual=True),
    "frozen": Case(training=False),
    "frozen, activation and residual": Case(training=False, activation="hardswish", residual=True),
    "many channels": Case((12, 900)),
    **{half: Case(dtype=half) for half in cases.HALVES},
}
"""Cases that every transport runs."""

OF_MPI = {
    **SHARED,
    "channels-last": Case((12, 4, 3, 5), axis=-1),
    "channels-last, float64": Case((12, 4, 3, 5), "float64", axis=-1),
    "mask": Case(masked=True),
    "mask, channels-last, activation": Case((12, 4, 5), "float64", axis=-1, masked=True, activation="silu"),
    "mask, float16": Case(dtype="float16", masked=True),
    "NumPy": Case(backend="numpy", residual=True, activation="relu6"),
}
"""Those of fastbn.mpi, where channels may be on any axis."""


def share_of(rank: int, ranks: int) -> slice:
    sizes = SHARES[ranks]
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


# Starting ranks ------------------------------------------------------------------------------------------------------


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or the class and text of the error."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__, str(error)


def keep(folder: str, rank: int, results: dict[Any, Any]) -> None:
    """What a rank found, for the tests."""
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(results))


def _environment(**others: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not re.match("FASTBN_(?!CACHE_DIR)|PYTEST", key)}
    return {**kept, "OMP_NUM_THREADS": "1", **others}


def run(commands: list[list[str]], timeout: float = 150, **environment: str) -> str:
    """What commands print that run at the same time. If one fails or time is over, all are ended and the test fails."""
    processes = [
        subprocess.Popen(
            command,
            env=_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    deadline, said = time.monotonic() + timeout, []
    try:
        for process in processes:
            try:
                said.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                pytest.fail(f"a rank did not end within {timeout} seconds: {' '.join(process.args)}")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not any(process.returncode for process in processes), "\n".join(said)
    return "\n".join(said)


@contextmanager
def _once(shared: Path) -> Iterator[bool]:
    """Whether this is the first of several processes here. The others wait until its block has ended."""
    try:
        shared.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 200
        while not (shared / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield False
        return
    try:
        yield True
    finally:
        (shared / "done").touch()


def started(factory: pytest.TempPathFactory, name: str, start: Callable[[Path], None]) -> list[dict[Any, Any]]:
    """What each rank kept. Of xdist's workers, the first starts the ranks, and the others get the same results."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"ranks {name}"
    with _once(shared) as first:
        if first:
            start(shared)
    kept = [shared / f"rank{rank}" for rank in range(WORLD)]
    if not all(path.exists() for path in kept):
        pytest.fail(f"the ranks of {name} have kept nothing")
    return [pickle.loads(path.read_bytes()) for path in kept]


def _of_mpich(ending: str) -> str | None:
    """A file of the MPI that PyPI ships."""
    try:
        found = [path for path in files("mpich") or () if str(path).endswith(ending)]
    except PackageNotFoundError:
        return None
    return str(Path(found[0].locate()).resolve()) if found else None


def mpiexec() -> tuple[list[str], dict[str, str]]:
    """The command that starts ranks, and the environment in which mpi4py finds its MPI; skips a test without."""
    command = _of_mpich("bin/mpiexec") or shutil.which("mpiexec")
    if find_spec("mpi4py") is None or command is None:
        pytest.skip("needs mpi4py and an MPI")
    library = _of_mpich("/libmpi.so.12")
    return [command], {} if library is None else {"MPI4PY_LIBMPI": os.environ.get("MPI4PY_LIBMPI", library)}


def python(*arguments: object) -> list[str]:
    return [sys.executable, "-P", *map(str, arguments)]


EXAMPLES = cases.CHECKOUT / "examples"


def assert_example(printed: str) -> None:
    """Did an example that trains on two ranks learn, with the losses of one process?"""
    found = re.search(r"2 ranks, 40 steps: loss (\S+) to (\S+)\n.*one process: (\S+)", printed)
    assert found, printed
    first, last, apart = map(float, found.groups())
    assert last < first / 4
    assert apart < 1e-12


# What is right -------------------------------------------------------------------------------------------------------


def joined(parts: list[dict[str, Any]], name: str) -> Array:
    """The shares of a result, put together."""
    return np.concatenate([part[name] for part in parts])


def assert_right(case: Case, parts: list[dict[str, Any]], where: str, *, local: bool) -> None:
    """Are the shares those of the oracle's result? `local`: dgamma and dbeta are those of each share."""
    c, mask = case.call(), case.mask()
    added = c.residual if case.residual else None
    exact, wanted = cases.answers(c, case.axis, case.training, mask, case.activation, added, EPS)
    y = joined(parts, "y")
    assert y.dtype == c.x.dtype, where
    cases.assert_y(y, exact, c.gamma, axis=case.axis, activation=case.activation, where=where)
    for name in ("running_mean", "running_var"):
        assert len({part[name].tobytes() for part in parts}) == 1, f"{name} is not the same on all ranks {where}"
    mean, var = parts[0]["running_mean"], parts[0]["running_var"]
    if case.training:
        size = abs(oracle.long(c.x)).max()
        cases.assert_running("running_mean", mean, c.running_mean, exact.mean, MOMENTUM, where, size=size)
        unbiased = oracle.unbiased(exact.var, exact.count)
        cases.assert_running("running_var", var, c.running_var, unbiased, MOMENTUM, where)
    else:
        cases.assert_same_bits((mean, var), (c.running_mean, c.running_var), where)
    for name in ("dgamma", "dbeta"):
        if local:
            total, terms = sum(oracle.long(part[name]) for part in parts), getattr(wanted.terms, name)
            most = terms * (1e-12 if case.dtype == "float64" else 1e-6)
            assert (abs(total - getattr(wanted.exact, name)) <= most).all(), f"{name} {where}"
        else:
            assert len({part[name].tobytes() for part in parts}) == 1, f"{name} is not the same on all ranks {where}"
    whole = None if local else parts[0]
    gradients = SimpleNamespace(
        dx=joined(parts, "dx"),
        dgamma=whole and whole["dgamma"],
        dbeta=whole and whole["dbeta"],
        dresidual=joined(parts, "dresidual") if case.residual else None,
    )
    cases.assert_gradients(gradients, wanted, where)


def assert_building_blocks(case: Case, parts: list[dict[str, Any]], where: str) -> None:
    """Are y and dx, in every bit, those of moments and sums that are added up in rank order? So every transport's."""
    c, mask = case.call(), case.mask()
    shares = [share_of(rank, len(parts)) for rank in range(len(parts))]
    options: dict[str, Any] = {"axis": case.axis, "backend": case.backend}
    masks = [None if mask is None else mask[share] for share in shares]
    x, dy, added = (case.placed(array) for array in (c.x, c.dy, c.residual))
    moments = sum(fastbn.moments(x[share], mask=some, **options) for share, some in zip(shares, masks, strict=True))
    given = {"eps": EPS, "activation": case.activation, "moments": moments, **options}
    calls = [
        fastbn.forward(x[share], c.gamma, c.beta, mask=some, residual=added[share] if case.residual else None, **given)
        for share, some in zip(shares, masks, strict=True)
    ]
    backend = case.backend
    sums = sum(
        fastbn.backward_sums(dy[share], call.cache, backend=backend) for share, call in zip(shares, calls, strict=True)
    )
    for share, call, part in zip(shares, calls, parts, strict=True):
        cases.assert_same_bits(part["y"], call.y, where)
        dx = fastbn.backward(dy[share], call.cache, sums=sums, backend=backend).dx
        cases.assert_same_bits(part["dx"], dx, where)


def assert_told(outcomes: list[Any], bad: int, kind: str, text: str) -> None:
    """Did all ranks raise the error of one of them, and say whose it is?"""
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, tuple), f"rank {rank} did not raise: {outcome}"
        assert outcome[0] == kind, f"rank {rank}: {outcome}"
        told = outcome[1] if rank == bad else outcome[1].removeprefix(f"on rank {bad}: ")
        assert rank == bad or told != outcome[1], f"rank {rank}: {outcome}"
        assert re.match(text, told), f"rank {rank}: {outcome}"


def assert_all_raise(outcomes: list[Any], kind: str, text: str) -> None:
    """Did all ranks raise the same error?"""
    assert len(set(outcomes)) == 1, outcomes
    assert outcomes[0][0] == kind, outcomes
    assert re.match(text, outcomes[0][1]), outcomes
