"""Is what a build makes complete, and nothing but what the sources say?"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
from installing import Environment


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def wheel_of(checkout: Path, tools: Environment, **environment: str) -> Path:
    for old in (checkout / "dist").glob("*.whl"):
        old.unlink()
    tools.run("-m", "build", "--no-isolation", "--wheel", checkout, **environment)
    [wheel] = (checkout / "dist").glob("*.whl")
    return wheel


def test_a_module_that_is_no_more(checkout: Path, tools: Environment) -> None:
    """Is not installed, although an earlier build has left it in build/."""
    module, data = checkout / "fastbn/former.py", checkout / "fastbn/former.pxd"
    module.write_text("")
    data.write_text("")
    before = names(wheel_of(checkout, tools))
    module.unlink()
    data.unlink()
    assert before - names(wheel_of(checkout, tools)) == {"fastbn/former.py", "fastbn/former.pxd"}


@pytest.fixture
def objects(checkout: Path, tools: Environment) -> Iterator[dict[str, int]]:
    """When the objects were written, by their names."""
    wheel_of(checkout, tools)
    yield {path.stem: path.stat().st_mtime_ns for path in (checkout / "build").rglob("*.o") if path.stem != "bridge"}


@pytest.mark.parametrize(
    ("name", "read_by"),
    [
        ("split.h", {"split", "run", "panel", "finish", "mixed", "tile", "verbs"}),
        ("kernels/float_sums.h", {"baseline", "avx2", "avx512", "neon"}),  # which a macro names
    ],
)
def test_a_header_that_has_changed(
    checkout: Path, tools: Environment, objects: dict[str, int], name: str, read_by: set[str]
) -> None:
    """Even to one with an older date, as in an archive: what includes it is compiled again, and nothing else."""
    header = checkout / "src_c" / name
    header.write_text(header.read_text(encoding="utf-8") + "/* another */\n", encoding="utf-8")
    os.utime(header, (0, 0))
    wheel_of(checkout, tools)
    paths = {path.stem: path for path in (checkout / "build").rglob("*.o")}
    new = {name for name, written in objects.items() if paths[name].stat().st_mtime_ns != written}
    assert new
    assert new == read_by & set(paths)


def test_openmp_that_is_no_longer_wanted(checkout: Path, tools: Environment) -> None:
    """The extension is linked again, and the static library says so, too."""

    def needs_openmp(wheel: Path) -> tuple[bool, bool]:
        with zipfile.ZipFile(wheel) as archive:
            [extension] = [name for name in archive.namelist() if "bridge" in name and name.endswith((".so", ".pyd"))]
            flags = archive.read("fastbn/lib/link-flags.txt")
            return b"GOMP_parallel" in archive.read(extension), b"-fopenmp" in flags

    assert needs_openmp(wheel_of(checkout, tools, FASTBN_OPENMP="1")) == (True, True)
    assert needs_openmp(wheel_of(checkout, tools, FASTBN_OPENMP="0")) == (False, False)
    assert needs_openmp(wheel_of(checkout, tools, FASTBN_OPENMP="1")) == (True, True)


def test_openmp_that_is_missing(checkout: Path, tools: Environment, tmp_path: Path) -> None:
    """Is an error where a wheel must have it."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    with pytest.raises(AssertionError, match="FASTBN_OPENMP is 1, but the compiler finds no OpenMP"):
        wheel_of(checkout, tools, FASTBN_OPENMP="1", CC=str(compiler))
    with pytest.raises(AssertionError, match="FASTBN_OPENMP: got 'yes'"):
        wheel_of(checkout, tools, FASTBN_OPENMP="yes")


def test_sdist(built: Path, tools: Environment) -> None:
    """It has every file of the repository, but those that only its host reads, and a description that is accepted."""
    git = ["git", "-C", str(cases.CHECKOUT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no Git repository")
    [sdist] = built.parent.glob("*.tar.gz")
    tools.run("-m", "twine", "check", "--strict", sdist)
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {name for name in listed.stdout.splitlines() if not re.match(r"\.(ci|github|git|pre-commit|clang)", name)}
    assert wanted - found == set()
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in found - wanted - made if ".egg-info/" not in name} == set()


def test_wheel_of_the_sdist(built: Path, checkout: Path, tools: Environment) -> None:
    """It has what that of the checkout has."""
    assert names(built) == names(wheel_of(checkout, tools))
