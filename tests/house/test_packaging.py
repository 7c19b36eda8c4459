"""Do the files that package and release fastbn agree with each other, and keep to the field's conventions?"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import cases
import pytest

GITHUB = cases.CHECKOUT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
in_checkout = pytest.mark.skipif(not WORKFLOWS, reason=".github is not beside the tests: no checkout")


def read(name: str) -> str:
    return (cases.CHECKOUT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


@in_checkout
def test_packages() -> None:
    """Each folder with Python modules is installed, and nothing that is not there is named."""
    tools = project()["tool"]["setuptools"]
    places = tools["package-dir"]
    named = {places.get(package, package.replace(".", "/")) for package in tools["packages"]}
    folders = {path.parent for top in ("fastbn", "bench") for path in (cases.CHECKOUT / top).rglob("*.py")}
    assert named == {folder.relative_to(cases.CHECKOUT).as_posix() for folder in folders}


@in_checkout
def test_versions() -> None:
    """There is one, in four places; RELEASING.md names them."""
    version = project()["project"]["version"]
    assert re.search(r"^project\(fastbn VERSION (\S+)", read("src_c/CMakeLists.txt"), re.MULTILINE)[1] == version  # type: ignore[index]
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    assert f"\n## {version} (" in read("CHANGELOG.md")


@in_checkout
def test_pythons() -> None:
    """Those of the classifiers have wheels, and are tested."""
    named = re.findall(r"Python :: (3\.\d+)'", str(project()["project"]["classifiers"]))
    built = [build.removesuffix("-*") for build in project()["tool"]["cibuildwheel"]["build"]]
    assert [f"cp{version.replace('.', '')}" for version in named] == [
        build for build in built if not build.endswith("t")
    ]
    assert named[0] == project()["project"]["requires-python"].removeprefix(">=")
    tests = read(".github/workflows/tests.yml")
    for build in built:
        assert f'"3.{build.removeprefix("cp3")}"' in tests
    selected = re.search(r'CIBW_BUILD="cp3\{([\w,]+)\}-', read(".github/workflows/wheels.yml"))
    assert selected
    assert [f"cp3{number}" for number in selected[1].split(",")] == built


def actions() -> list[tuple[str, str]]:
    """What the workflows use, and the file."""
    found = [(used, path.name) for path in WORKFLOWS for used in re.findall(r"uses: (.+)", path.read_text("utf-8"))]
    return [(used, file) for used, file in found if not used.startswith("./")]


@in_checkout
def test_actions_are_pinned() -> None:
    """By the whole hash of a commit, with its version beside it, and the same everywhere."""
    assert actions()
    pins = {}
    for used, file in actions():
        pinned = re.fullmatch(r"([\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", used)
        assert pinned, f"{file}: {used}"
        assert pins.setdefault(pinned[1], pinned[2]) == pinned[2], f"{file}: {used}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow(path: Path) -> None:
    """It has no permissions but those that a job asks for, ends, and leaves no password in the checkout."""
    text = path.read_text("utf-8")
    assert "\npermissions: {}\n" in text
    assert "\nconcurrency:\n" in text
    jobs = text[text.index("\njobs:\n") :]
    assert len(re.findall(r"^    permissions:", jobs, re.MULTILINE)) == len(
        re.findall(r"^  [\w-]+:$", jobs, re.MULTILINE)
    )
    assert jobs.count("timeout-minutes:") == jobs.count("runs-on:")
    assert jobs.count("actions/checkout@") == jobs.count("persist-credentials: false")
    granted = set(re.findall(r"^      ([\w-]+: write)", jobs, re.MULTILINE))
    assert granted == (
        {"id-token: write", "attestations: write", "artifact-metadata: write"} if path.stem == "release" else set()
    )


@in_checkout
def test_release_counts_the_wheels() -> None:
    platforms = re.findall(r"build: \w+", read(".github/workflows/wheels.yml"))
    wheels = len(platforms) * len(project()["tool"]["cibuildwheel"]["build"])
    assert f"\"$(find dist -name '*.whl' | wc -l)\" = {wheels} " in read(".github/workflows/release.yml")
    assert f"an sdist and {wheels} wheels" in read("RELEASING.md")


def test_description_links() -> None:
    """A package index has README.md alone: what it links to and shows has a whole address, of this version."""
    found = metadata("fastbn")
    links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", found.json["description"])
    assert [address for picture, address in links if picture]
    for _, address in links:
        assert address.startswith("https://")
        if "/fastbn/fastbn" in address:
            assert f"/v{found['Version']}/" in address
