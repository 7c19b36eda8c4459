"""Do programs that embed fastbn build with an installed one, and get the same bits? C, C++, Cython, CMake."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import c_api
import cases
import numpy as np
import pytest

import fastbn
from fastbn import cli
from fastbn.call import checks, shape
from fastbn.config import embed

Array = np.ndarray[Any, Any]
SOURCES = cases.CHECKOUT / "src_c"
TABLE = cases.CHECKOUT / "docs" / "howto" / "examples.md"
in_checkout = pytest.mark.skipif(not SOURCES.is_dir(), reason="src_c is not beside the tests: no checkout")

# What fastbn tells a compiler ----------------------------------------------------------------------------------------


def test_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert Path(fastbn.get_include(), "fastbn.h").is_file()
    assert Path(fastbn.get_library()).is_file()
    assert cli.main(["info", "--cflags"]) == 0
    assert shlex.split(capsys.readouterr().out) == [f"-I{fastbn.get_include()}"]
    assert cli.main(["info", "--libs"]) == 0
    library, *flags = shlex.split(capsys.readouterr().out)
    assert library == fastbn.get_library()
    assert all(flag.startswith("-") for flag in flags)
    assert cli.main(["info", "--cflags", "--libs"]) == 0
    assert shlex.split(capsys.readouterr().out) == [f"-I{fastbn.get_include()}", library, *flags]


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "_HERE", tmp_path)
    for function, name in ((fastbn.get_include, "fastbn.h"), (fastbn.get_library, "fastbn.")):
        with pytest.raises(FileNotFoundError, match=re.escape(name)) as raised:
            function()
        assert "pip install" in str(raised.value)
    assert cli.main(["info", "--libs"]) == 2
    assert capsys.readouterr().err.startswith("fastbn: ")


def test_spaces_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "a folder" / "fastbn"
    shutil.copytree(Path(fastbn.get_include()), here / "include")
    shutil.copytree(Path(fastbn.get_library()).parent, here / "lib")
    monkeypatch.setattr(embed, "_HERE", here)
    assert shlex.split(embed.cflags()) == [f"-I{here / 'include'}"]
    assert shlex.split(embed.libs())[0] == fastbn.get_library()


# The same bits, without Python ---------------------------------------------------------------------------------------

SHAPES = {"channels-first": ((6, 5, 7, 9), 1), "channels-last": ((6, 7, 9, 5), -1), "rows": ((40, 17), 1)}
LARGE = {"channels-first": ((16, 12, 31, 33), 1), "channels-last": ((16, 31, 33, 12), -1)}
CASES = [
    *((dtype, *SHAPES[name], activation, 1) for dtype in (*cases.DTYPES, *cases.HALVES) for name in SHAPES
      for activation in (*cases.ACTIVATIONS[::2], "sigmoid")),
    *((dtype, *LARGE[name], activation, threads) for dtype in (*cases.DTYPES, *cases.HALVES) for name in LARGE
      for activation, threads in ((None, 2), ("relu", 5), ("silu", 1))),
]  # fmt: skip


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/replay.c, linked with the static library."""
    return c_api.build(Path(__file__).with_name("replay.c"), tmp_path_factory.mktemp("replay") / "replay")


def test_no_python_is_needed(replay: Path) -> None:
    needed = c_api.run([c_api.compiler("ldd", "otool"), *(["-L"] if sys.platform == "darwin" else []), replay])
    assert "python" not in needed


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("dtype", "shape", "axis", "activation", "threads"), CASES, ids=str)
def test_same_bits(
    replay: Path, dtype: str, shape: tuple[int, ...], axis: int, activation: Any, threads: int, residual: bool
) -> None:
    """Of fastbn.infer, forward, moments, backward_sums and backward, and of a plan."""
    c = cases.call(shape, dtype, axis)
    added = c.residual if residual else None
    found = replayed(replay, c, axis, activation, threads, residual)
    with fastbn.use_backend("c"), fastbn.use_num_threads(1):
        settings: dict[str, Any] = {"axis": axis, "activation": activation, "residual": added, "eps": 1e-3}
        y = fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var, **settings)
        mean, var = c.running_mean.copy(), c.running_var.copy()
        trained, cache = fastbn.forward(c.x, c.gamma, c.beta, mean, var, momentum=0.3, **settings)
        moments, sums = fastbn.moments(c.x, axis=axis), fastbn.backward_sums(c.dy, cache)
        gradients = fastbn.backward(c.dy, cache)
    wanted = [y, y, trained, mean, var, moments._rows, sums._rows, gradients.dx]
    wanted += [gradients.dresidual] if residual and activation else []
    wanted += [gradients.dgamma, gradients.dbeta]
    assert len(found) == sum(array.nbytes for array in wanted)
    for number, array in enumerate(wanted):
        assert found[: array.nbytes] == array.tobytes(), f"result {number}"
        found = found[array.nbytes :]


def replayed(program: Path, c: cases.Call, axis: int, activation: Any, threads: int, residual: bool) -> bytes:
    """What the program writes for a call."""
    code, slope = code_and_slope(activation)
    numbers = ("float32", "float64", "float16", "bfloat16").index(c.x.dtype.name), code
    header = struct.pack("7q3d", *numbers, *shape.three_of(c.x.shape, axis % c.x.ndim), threads, residual,
                         slope, 1e-3, 0.3)  # fmt: skip
    assert c.gamma is not None
    assert c.beta is not None
    arrays = (c.x, c.dy, c.residual, c.gamma, c.beta, c.running_mean, c.running_var)
    done = subprocess.run(
        [program], input=header + b"".join(array.tobytes() for array in arrays), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_and_slope(activation: Any) -> tuple[int, float]:
    """Its code and slope."""
    code, slope = checks.activation(activation)
    return int(code), slope


# The examples --------------------------------------------------------------------------------------------------------


def commands() -> dict[str, str]:
    """The commands in the table of examples, without what they install first, by the example that they run."""
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    found = {}
    for command in re.findall(r"^\| `(.*?)` \|", text, flags=re.MULTILINE):
        example = re.search(r"examples/[\w./]+", command)
        if example:
            found[Path(example[0]).name] = re.sub(r"^python -m pip install [^&]* && ", "", command)
    return found


def run_example(name: str, folder: Path) -> str:
    """The table's command, in a copy of the examples; what setuptools builds is not optimized, which takes long."""
    shutil.copytree(cases.CHECKOUT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return c_api.run(["sh", "-e", "-c", commands()[name]], folder, CFLAGS="-O0")


@in_checkout
def test_c_example(tmp_path: Path) -> None:
    """Its running statistics come near those of its data, which are uniform on 3 to 4; the plan uses them."""
    c_api.compiler("cc")
    printed = run_example("embed.c", tmp_path)
    mean, variance = map(float, re.findall(r"running mean (\S+), running variance (\S+)\n", printed)[0])
    assert mean == pytest.approx(3.5, abs=0.02)
    assert variance == pytest.approx(1 / 12, rel=0.02)
    trained, planned = re.findall(r"y \w+ \w+ ?\w*: channel 0 has mean (\S+) and standard deviation (\S+)\n", printed)
    assert list(map(float, planned)) == pytest.approx(list(map(float, trained)), abs=0.02)


@in_checkout
def test_cpp_example(tmp_path: Path) -> None:
    c_api.compiler("c++")
    printed = run_example("embed.cpp", tmp_path)
    mean, variance = map(float, re.findall(r"running mean (\S+) and variance (\S+)\n", printed)[0])
    assert mean == pytest.approx(-99.5, abs=0.02)
    assert variance == pytest.approx(1 / 12, rel=0.05)
    trained, planned = map(float, re.findall(r"y (\S+),", printed))
    assert planned == pytest.approx(trained, abs=0.02)
    assert trained > 0
    assert "another layer's plan: not a plan" in printed


@in_checkout
def test_cython_example(tmp_path: Path) -> None:
    """`from fastbn cimport cfastbn`, compiled against the installed header and library."""
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    c_api.compiler("cc", "gcc", "clang")
    printed = run_example("cython_layer", tmp_path)
    assert printed.count(": the bits of fastbn.BatchNorm") == 2


@in_checkout
def test_every_example_has_its_command() -> None:
    names = {path.name for path in (cases.CHECKOUT / "examples").iterdir() if path.name != "__pycache__"}
    assert names <= set(commands())


# Without Python ------------------------------------------------------------------------------------------------------


def configured(folder: Path, *options: str) -> list[Any]:
    """The argument list with which CMake would compile each source, by its path below src_c."""
    build = folder / "build"
    c_api.run([cmake(), "-S", SOURCES, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options], folder)
    return json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def cmake() -> str:
    return c_api.compiler("cmake")


@in_checkout
@pytest.mark.skipif(os.name == "nt", reason="Visual Studio's generators tell no commands")
@pytest.mark.parametrize("openmp", [True, False], ids=["OpenMP", "one thread"])
def test_cmake_compiles_as_setup_does(openmp: bool, tmp_path: Path) -> None:
    """The same sources, each with the same flags."""
    lists = c_api.setup_lists()
    wanted = dict.fromkeys(lists["CORE"], lists["FLAGS"])
    wanted |= {f"src_c/isa/{isa}.c": lists["FLAGS"] + flags for isa, flags in lists["ISAS"].items()}
    found = {}
    for entry in configured(tmp_path, f"-DFASTBN_OPENMP={'ON' if openmp else 'OFF'}"):
        path = Path(entry["file"]).relative_to(cases.CHECKOUT).as_posix()
        flags = [flag for flag in shlex.split(entry["command"])[1:] if flag.startswith("-")]
        found[path] = set(flags) - {"-o", "-c"}
        if path in lists["CORE"]:
            assert ("-fopenmp" in found[path]) <= openmp
            found[path] -= {"-fopenmp"}
    assert found == {path: set(flags) for path, flags in wanted.items()}


@in_checkout
def test_version_of_cmake_is_the_project_s() -> None:
    project = tomllib.loads((cases.CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (SOURCES / "CMakeLists.txt").read_text(encoding="utf-8")
    assert f"project(fastbn VERSION {project['version']} " in text


CONSUMER = """
cmake_minimum_required(VERSION 3.16)
project(consumer LANGUAGES C CXX)
find_package(fastbn 0.1 REQUIRED)
foreach(KIND fastbn static)
  add_executable(${KIND}_c embed.c)
  add_executable(${KIND}_cpp embed.cpp)
  target_link_libraries(${KIND}_c PRIVATE fastbn::${KIND} m)
  target_link_libraries(${KIND}_cpp PRIVATE fastbn::${KIND})
endforeach()
"""


@in_checkout
@pytest.mark.slow
def test_cmake_package(tmp_path: Path) -> None:
    """Built, installed, moved, and then found: by find_package and by pkg-config, shared and static."""
    prefix, moved = tmp_path / "prefix", tmp_path / "moved"
    build = tmp_path / "build"
    c_api.run([cmake(), "-S", SOURCES, "-B", build])
    c_api.run([cmake(), "--build", build, "--parallel", "2"])
    c_api.run([cmake(), "--install", build, "--prefix", prefix])
    prefix.rename(moved)
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    for name in ("embed.c", "embed.cpp"):
        shutil.copy(cases.CHECKOUT / "examples" / name, consumer)
    (consumer / "CMakeLists.txt").write_text(CONSUMER, encoding="utf-8")
    c_api.run([cmake(), "-S", consumer, "-B", consumer / "build", f"-DCMAKE_PREFIX_PATH={moved}"])
    c_api.run([cmake(), "--build", consumer / "build"])
    for kind in ("fastbn_c", "static_c", "fastbn_cpp", "static_cpp"):
        assert "running mean" in c_api.run([consumer / "build" / kind])
    folder = next(moved.rglob("fastbn.pc")).parent
    ask = f"PKG_CONFIG_PATH={shlex.quote(str(folder))} {c_api.compiler('pkg-config')}"
    for static in ("", " --static"):
        script = f"cc embed.c $({ask} --cflags --libs{static} fastbn) {'-static' if static else ''} -lm -o program"
        c_api.run(["sh", "-e", "-c", script], consumer)
        library = f"LD_LIBRARY_PATH={shlex.quote(str(folder.parent))} " if not static else ""
        assert "running mean" in c_api.run(["sh", "-e", "-c", f"{library}./program"], consumer)
    symbols = c_api.run([c_api.compiler("nm"), "-D", "--defined-only", next(moved.rglob("libfastbn.so"))])
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported - {"_init", "_fini"} == {f"fbn_{name}" for name in c_api._SIGNATURES}
