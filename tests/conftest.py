"""What do all tests share? The report's header, fixtures that select a kernel, the switch for slow tests, profiles."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import fastbn

try:
    from hypothesis import settings as profiles
except ImportError:
    pass  # its tests are skipped
else:
    common: dict[str, Any] = {"deadline": None, "database": None}
    profiles.register_profile("default", max_examples=200, derandomize=True, **common)
    profiles.register_profile("thorough", max_examples=10_000, **common)
    profiles.load_profile("default")

PEERS = ("torch", "keras", "onnx", "dask", "distributed", "zarr", "h5py", "mpi4py")
EXTRAS = ("hypothesis", "ml_dtypes")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pytest_report_header() -> list[str]:
    found = {name: _installed(name) for name in (*PEERS, *EXTRAS)}
    missing = [name for name, known in found.items() if known is None]
    return [
        f"fastbn: {fastbn.__version__} from {Path(fastbn.__file__).parent}",
        f"kernels: {', '.join(map(str, cases.KERNELS))}",
        f"beside it: {', '.join(f'{name} {known}' for name, known in found.items() if known) or 'none'}",
        f"missing, whose tests are skipped: {', '.join(missing) or 'none'}",
    ]


def _apart_from_kernel(item: pytest.Item) -> str:
    """What tells a test from others than its own on another kernel: its name, without that kernel's."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    kernel = parameters.get("kernel", parameters.get("any_backend"))
    return item.nodeid if kernel is None else item.nodeid.replace(str(kernel), "", 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The kernels' turns at one case follow each other, so that the oracle is asked once (see cases.check).
    first: dict[str, int] = {}
    places = {item: first.setdefault(_apart_from_kernel(item), place) for place, item in enumerate(items)}
    items.sort(key=places.__getitem__)
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(scope="session", autouse=True)
def compiled_in_turns(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where Numba's cache is empty, one of xdist's workers compiles for float32, another for float64, 20 seconds each.

    All of them, and the processes that tests start, then find it on disk.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    needed = "numba" in fastbn.backends() and any("numba" in item.nodeid for item in request.session.items)
    if workers == 1 or not needed:
        return
    place, shared = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")), tmp_path_factory.getbasetemp().parent
    done = [shared / f"{dtype} is compiled" for dtype in cases.DTYPES]
    for turn, dtype in enumerate(cases.DTYPES):
        if turn % workers == place:
            with contextlib.suppress(Exception):  # which the tests meet as well
                fastbn.forward(np.ones((2, 1), dtype), backend="numba")
            done[turn].touch()
    deadline = time.monotonic() + 120  # should another worker have died
    while not all(path.exists() for path in done) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.fixture(params=cases.KERNELS, ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[cases.Kernel]:
    """Runs the test once per backend and instruction set, which calls that name no backend then use."""
    with cases.running_on(request.param):
        yield request.param


@pytest.fixture(params=cases.BACKENDS, ids=str)
def any_backend(request: pytest.FixtureRequest) -> Iterator[cases.Kernel]:
    """Runs the test once per backend: for what happens before an instruction set matters."""
    with cases.running_on(request.param):
        yield request.param


@pytest.fixture(params=cases.DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Puts torch's number of threads back, which is a limit for the OpenMP that fastbn and torch share."""
    loaded: Any = sys.modules.get("torch")
    before = loaded.get_num_threads() if loaded else fastbn.get_num_threads()
    yield
    loaded = sys.modules.get("torch")
    if loaded and loaded.get_num_threads() != before:
        loaded.set_num_threads(before)


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts the process's backend and thread count back."""
    from fastbn.config import environment, thread_count

    before = environment.chosen, thread_count._threads
    yield
    environment.chosen, thread_count._threads = before
