"""What do all tests share? The report's header, the fixtures that select a kernel, and the switch for slow tests."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cases
import pytest

import fastbn

PEERS = ("torch", "keras", "onnx")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pytest_report_header() -> list[str]:
    found = {name: _installed(name) for name in PEERS}
    missing = [name for name, known in found.items() if known is None]
    return [
        f"fastbn: {fastbn.__version__} from {Path(fastbn.__file__).parent}",
        f"kernels: {', '.join(map(str, cases.KERNELS))}",
        f"peers: {', '.join(f'{name} {known}' for name, known in found.items() if known) or 'none'}",
        f"missing peers, whose tests are skipped: {', '.join(missing) or 'none'}",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(params=cases.KERNELS, ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[cases.Kernel]:
    """Runs the test once per backend and instruction set, which calls that name no backend then use."""
    with cases.running_on(request.param):
        yield request.param


@pytest.fixture(params=cases.DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts the process's backend and thread count back."""
    from fastbn import _config

    before = _config._backend, _config._threads
    yield
    _config._backend, _config._threads = before
