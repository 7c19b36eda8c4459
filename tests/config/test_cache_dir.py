"""Does what Numba compiles for fastbn lie in the cache folder, and is what was damaged there compiled anew?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import fastbn
from fastbn.config.cache_dir import cache_dir

pytest.importorskip("numba", reason='Numba is not installed: pip install "fastbn[numba]"')

from fastbn._backends import jit

MODULE = """
from fastbn._backends.jit import jit

@jit(cache=True, nogil=True)
def half(x):
    return x * 0.5
"""

RUN = """
import os, sys, warnings
import numba
from fastbn._backends import jit
before = numba.config.CACHE_DIR
for folder in os.environ["FASTBN_CACHE_DIR"].split(os.pathsep):
    os.environ["FASTBN_CACHE_DIR"] = folder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from jitted import half
        assert numba.config.CACHE_DIR == before
        assert half(3.0) == 1.5
    for warning in caught:
        print(warning.category.__name__, warning.message)
    print("hits", sum(half.stats.cache_hits.values()), half.stats.cache_path, flush=True)
    del sys.modules["jitted"]
    jit._folder.cache_clear()
"""


def run(folders: Path | list[Path], where: Path, script: str = RUN, **environment: str) -> list[str]:
    """What it prints, line by line, for each folder in turn: one process for several, since imports take long."""
    given = os.pathsep.join(map(str, folders if isinstance(folders, list) else [folders]))
    environment = {"FASTBN_CACHE_DIR": given, "PYTHONPATH": paths(SOURCES), **environment}
    done = cases.run_python(script, where, timeout=240, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def paths(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


SOURCES = Path(tempfile.mkdtemp())
"""Where a module of functions lies that are kept as the backend's are, but compiled in no time."""


@pytest.fixture(scope="module", autouse=True)
def sources() -> Iterator[None]:
    (SOURCES / "jitted.py").write_text(MODULE, encoding="utf-8")
    yield
    shutil.rmtree(SOURCES)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with what one call compiles; to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    assert run(folder / "cache", folder)[-1].startswith("hits 0")
    assert run(folder / "cache", folder)[-1].startswith("hits 1")
    return folder / "cache"


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def files(folder: Path, pattern: str) -> list[Path]:
    found = list(folder.rglob(pattern))
    assert found
    return found


DAMAGES: dict[str, Any] = {
    "truncated": lambda content: content[: len(content) // 2],
    "short of a byte": lambda content: content[:-1],
    "garbage": lambda content: np.random.default_rng(0).bytes(len(content)),
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
}
FLIP = {"one bit": lambda content: content[:600] + bytes([content[600] ^ 4]) + content[601:]}


def test_damaged_files(filled: Path, tmp_path: Path) -> None:
    """A warning that names the file, the right numbers, and a cache that is whole again."""
    damages = {**DAMAGES, **FLIP}
    folders = [Path(shutil.copytree(filled, tmp_path / damage)) for damage in damages]
    for folder, (name, damage) in zip(folders, damages.items(), strict=True):
        (path,) = files(folder, "*.nbc")
        written = path.stat()
        path.write_bytes(damage(path.read_bytes()))
        if name in FLIP:  # on the disk, where nobody wrote
            os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
    places = [path for folder in folders for path in files(folder, "*.nbc")]
    lines = run(folders, tmp_path)
    for path, warning, hits in zip(places, lines[::2], lines[1::2], strict=True):
        assert warning.startswith(f"RuntimeWarning damaged file in {path.parent}")
        assert path.name in warning
        assert hits == f"hits 0 {path.parent}"
    assert run(folders, tmp_path) == [f"hits 1 {path.parent}" for path in places]
    assert [path for folder in folders for path in files(folder, "*.nbc")] == places


def test_a_file_of_other_types(folder: Path, tmp_path: Path) -> None:
    """Whole, but under a name that is not its own: compiled anew, without a warning."""
    (path,) = files(folder, "*.nbc")
    of_int = RUN.replace("half(3.0)", "half(3)")
    run(folder, tmp_path, of_int)
    (other,) = set(files(folder, "*.nbc")) - {path}
    other.write_bytes(path.read_bytes())
    assert [line[:6] for line in run([folder, folder], tmp_path, of_int)] == ["hits 0", "hits 1"]


def test_a_file_of_older_source(folder: Path, tmp_path: Path) -> None:
    """Of which the bytecode is the same, but a constant is not: replaced, without a warning."""
    before = files(folder, "*.nbc")
    (SOURCES / "jitted.py").write_text(MODULE.replace("0.5", "0.25"), encoding="utf-8")
    try:
        lines = run([folder, folder], tmp_path, RUN.replace("1.5", "0.75"))
        assert [line[:6] for line in lines] == ["hits 0", "hits 1"]
    finally:
        (SOURCES / "jitted.py").write_text(MODULE, encoding="utf-8")
    assert files(folder, "*.nbc") == before


@pytest.mark.parametrize("name", ["call/activations.py", "_backends/__init__.py", "numba.py", "include/fastbn.h"])
def test_constants_of_older_sources(name: str, tmp_path: Path) -> None:
    """Compiled code holds the numbers of these files, so it is not used once one of them has changed."""
    package, copy = Path(fastbn.__file__).parent, tmp_path / "fastbn"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "*.pyd", "*.a", "__pycache__"))
    before = jit._version(copy)
    assert before == jit._version(package)
    with (copy / name).open("a", encoding="utf-8") as file:
        file.write("\n")
    assert jit._version(copy) != before


def test_a_file_that_is_missing(folder: Path, tmp_path: Path) -> None:
    for path in files(folder, "*.nbc"):
        path.unlink()
    assert [line[:6] for line in run([folder, folder], tmp_path)] == ["hits 0", "hits 1"]


TYPES = """
import sys, time, warnings
import numpy as np
warnings.simplefilter("error")
place, start = int(sys.argv[1]), float(sys.argv[2])
values = [3.0, 3, np.float32(3), np.int16(3)]
time.sleep(max(0.0, start - time.time()))
from jitted import half
for i in range(len(values)):
    found = half(values[(place + i) % len(values)])
    assert found == 1.5, (place, i, found)
print(sum(half.stats.cache_hits.values()), half.stats.cache_path)
"""


def test_processes_that_start_at_once(tmp_path: Path) -> None:
    """They compile the same signatures in another order each: no error, no warning, and afterwards all are kept."""
    environment = {**os.environ, "FASTBN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": paths(SOURCES)}

    def start(places: range, wait: float) -> list[str]:
        command = [sys.executable, "-c", TYPES]
        begun = [
            subprocess.Popen(
                [*command, str(place), str(time.time() + wait)], env=environment, cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for place in places
        ]  # fmt: skip
        done = [process.communicate(timeout=240) for process in begun]
        assert [process.returncode for process in begun] == [0] * len(begun), done
        return [out for out, _ in done]

    for out in start(range(4), 2.0):
        assert str(tmp_path / "cache") in out
    assert len(files(tmp_path / "cache", "*")) - len(files(tmp_path / "cache", "*.nbc")) == 2  # the rest are folders
    (out,) = start(range(1), 0.0)
    assert out.startswith("4 ")


FULL = """
import errno, os
def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
import jitted
os.replace = full
"""


def test_full_disk(tmp_path: Path) -> None:
    """What cannot be kept is compiled each time; nothing is left of the attempt."""
    lines = run([tmp_path / "cache"] * 2, tmp_path, FULL + RUN)
    assert [line[:6] for line in lines] == ["hits 0", "hits 0"]
    assert not [path for path in files(tmp_path / "cache", "*") if path.is_file()]


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    """Between the import and the first call: it is made again."""
    remove = f"import shutil, jitted\nshutil.rmtree({str(tmp_path / 'cache')!r})\n"
    assert run(tmp_path / "cache", tmp_path, remove + RUN)[0].startswith("hits 0")
    assert run(tmp_path / "cache", tmp_path)[0].startswith("hits 1")


def test_a_function_without_a_file(tmp_path: Path) -> None:
    """Numba finds no place for its code: compiled without a cache."""
    script = MODULE + "assert half(3.0) == 1.5\nprint(half.stats.cache_path)"
    assert run(tmp_path / "cache", tmp_path, script) == ["None"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A file in the folder's place, and a folder below a file: compiled without a cache."""
    (tmp_path / "file").write_text("")
    assert run([tmp_path / "file", tmp_path / "file" / "below"], tmp_path) == ["hits 0 None"] * 2
    home = {"HOME": str(tmp_path / "file"), "XDG_CACHE_HOME": "", "LOCALAPPDATA": str(tmp_path / "file")}
    assert run(Path(), tmp_path, FASTBN_CACHE_DIR="", **home) == ["hits 0 None"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not stop this user")
def test_read_only_folder(folder: Path, tmp_path: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert run(folder, tmp_path) == ["hits 0 None"]
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_a_folder_that_refuses(tmp_path: Path) -> None:
    """Whoever the user is: every attempt to write a file fails, as in a folder that may only be read."""
    refuse = "import tempfile\ndef refuse(*_, **__):\n    raise PermissionError\ntempfile.TemporaryFile = refuse\n"
    assert run(tmp_path / "cache", tmp_path, refuse + RUN) == ["hits 0 None"]


USERS = """
import numba
from jitted import half

@numba.njit(cache=True)
def layer(x):
    return half(x)

layer(3.0)
print(layer.stats.cache_path)
print(half.stats.cache_path)
"""


def test_users_functions_keep_their_place(tmp_path: Path) -> None:
    """Beside their source, or where NUMBA_CACHE_DIR says, even though they call one that is kept as fastbn's are."""
    kept = tmp_path / "cache"
    for name, source in (("layers.py", USERS), ("jitted.py", MODULE)):
        (tmp_path / name).write_text(source, encoding="utf-8")
    for given, wanted in (({}, tmp_path), ({"NUMBA_CACHE_DIR": str(tmp_path / "theirs")}, tmp_path / "theirs")):
        theirs, ours = run(kept, tmp_path, "import layers", PYTHONPATH=paths(tmp_path), **given)
        assert wanted in Path(theirs).parents
        assert kept in Path(ours).parents
        assert list(Path(theirs).glob("layers.layer*.nbi"))
        assert not list(kept.rglob("layers.*"))


WRITTEN = """
import pathlib
import fastbn, fastbn.small
from fastbn._backends import numba_backend, numba_loops

modules = [numba_backend, numba_loops]
if "c" in fastbn.backends():
    import fastbn.numba
    modules.append(fastbn.numba)
package = pathlib.Path(fastbn.__file__).parent
before = {path for path in package.rglob("*") if "__pycache__" not in path.parts}
places = {
    name: value.stats.cache_path
    for module in modules for name, value in vars(module).items() if hasattr(value, "stats")
}
kept = {name: place for name, place in places.items() if place is not None}
assert "_share" in kept, places
assert len(modules) == 2 or {"infer", "forward", "backward"} <= set(kept), places
assert fastbn.small.half(3.0) == 1.5
print({path for path in package.rglob("*") if "__pycache__" not in path.parts} == before)
print([place for place in kept.values() if package in pathlib.Path(place).parents])
"""


def test_nothing_is_written_into_the_package(tmp_path: Path) -> None:
    """A copy of the package, that earlier versions may not have written into; a small function of it is compiled."""
    import fastbn

    package = Path(fastbn.__file__).parent
    copy = tmp_path / "site" / "fastbn"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.nb[ic]"))
    (copy / "small.py").write_text(MODULE, encoding="utf-8")
    environment = {"PYTHONPATH": paths(tmp_path / "site"), "FASTBN_CACHE_DIR": str(tmp_path / "cache")}
    done = cases.run_python(WRITTEN, tmp_path, timeout=240, **environment)
    assert done.stdout.splitlines() == ["True", "[]"], done.stderr
    assert files(tmp_path / "cache", "*.nbc")
    assert not list(copy.rglob("*.nb[ic]"))


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("FASTBN_CACHE_DIR")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for platform, variable, inside in (
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", "", "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        if variable:
            monkeypatch.setenv(variable, str(tmp_path / "given"))
            assert cache_dir() == tmp_path / "given" / "fastbn"
            monkeypatch.setenv(variable, "relative" if platform == "linux" else "")
        assert cache_dir() == tmp_path / "home" / inside / "fastbn"

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_dir() is None
