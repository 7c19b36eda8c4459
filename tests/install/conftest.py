"""What do the tests of installing share? A copy of the checkout, a repaired wheel of it, and fresh environments."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
from installing import Environment, run

HERE = Path(__file__).parent
NOT_COPIED = shutil.ignore_patterns(".git", "lib.*", "bdist.*", "dist", "*.egg-info", "*_cache", "__pycache__", "*.so")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They build and install, which takes minutes."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if not (cases.CHECKOUT / "src_c").is_dir():
                item.add_marker(pytest.mark.skip(reason="src_c is not beside the tests: no checkout"))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, with the objects that are compiled already."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(cases.CHECKOUT, copy, ignore=NOT_COPIED)
    return copy


@pytest.fixture(scope="session")
def new_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    def made(*packages: str, python: object = sys.executable) -> Environment:
        folder = tmp_path_factory.mktemp("fresh")
        run(python, "-m", "venv", folder / "env", folder=folder)
        environment = Environment(folder)
        environment.pip("install", *packages)
        return environment

    return made


@pytest.fixture(scope="session")
def tools(new_environment: Callable[..., Environment]) -> Environment:
    """The tools of the group `wheels`, but cibuildwheel, and what a build without isolation needs."""
    project = tomllib.loads((cases.CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [tool for tool in project["dependency-groups"]["wheels"] if not tool.startswith("cibuildwheel")]
    return new_environment(*wanted, *project["build-system"]["requires"], "wheel")


@pytest.fixture(scope="session")
def built(checkout: Path, tools: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as the compiler made it, beside the sdist from which it was made."""
    folder = tmp_path_factory.mktemp("built")
    tools.run("-m", "build", "--no-isolation", "--outdir", folder, checkout)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest) -> Path:
    """The wheel with the libraries that it needs, as it would be published; FASTBN_WHEEL names one to take instead."""
    if "FASTBN_WHEEL" in os.environ:
        return Path(os.environ["FASTBN_WHEEL"]).resolve()
    if sys.platform != "linux":
        pytest.skip("auditwheel is for Linux; FASTBN_WHEEL names a wheel that delocate or delvewheel has repaired")
    built, tools = request.getfixturevalue("built"), request.getfixturevalue("tools")
    folder = built.parent / "repaired"
    path = f"{tools.python.parent}{os.pathsep}{os.environ['PATH']}"
    tools.run("-m", "auditwheel", "repair", "--wheel-dir", folder, built, PATH=path)
    [wheel] = folder.glob("*.whl")
    return wheel
