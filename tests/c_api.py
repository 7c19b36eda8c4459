"""How do tests meet the C API? The compilers, an installed fastbn's flags, and fastbn.h in ctypes."""

from __future__ import annotations

import ast
import ctypes as ct
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import pytest

OK, NULL_POINTER, MISALIGNED, OVERLAP, BAD_DTYPE, BAD_ACTIVATION, BAD_SHAPE, BAD_THREADS = range(8)
BAD_EPS, BAD_MOMENTUM, TOO_FEW_VALUES, BAD_PLAN, BAD_SIZE = range(8, 13)


def compiler(*names: str) -> str:
    """The first of these that is here; the test is skipped without any."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(names)}")
    return found


def flags(which: str) -> list[str]:
    """What `fastbn info` prints: --cflags or --libs."""
    command = [sys.executable, "-P", "-m", "fastbn", "info", which]
    return shlex.split(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def build(source: Path, program: Path) -> Path:
    """A program in C that needs the static library alone."""
    warnings = ["-Wall", "-Wextra", "-Werror"]
    run([compiler("cc", "gcc", "clang"), *warnings, source, *flags("--cflags"), *flags("--libs"), "-o", program])
    return program


def run(command: list[Any], folder: Path | None = None, **environment: str) -> str:
    """Its output; what it prints when it fails is the test's message."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def setup_lists(platform: str | None = None, bits: int = 64) -> dict[str, Any]:
    """The constants of setup.py: its imports of the standard library, assignments and conditions, and nothing else.

    They are those of this platform, or of another one, such as "linux-aarch64", whose Python is of so many bits.
    """
    tree = ast.parse((cases.CHECKOUT / "setup.py").read_text(encoding="utf-8"))
    standard = {"os", "sys", "sysconfig", "pathlib"}
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            kept += [node] if names <= standard else []
        elif isinstance(node, ast.If) or (isinstance(node, ast.Assign) and "Extension(" not in ast.unparse(node)):
            kept.append(node)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cases.CHECKOUT)
        if platform:
            patch.setattr("sysconfig.get_platform", lambda: platform)
            patch.setattr("sys.maxsize", 2 ** (bits - 1) - 1)
        exec(compile(ast.Module(kept, []), "setup.py", "exec"), found)
    return found


def build_core(
    compiler: list[Any], lists: dict[str, Any], flags: Callable[[str], list[str]], folder: Path
) -> list[Path]:
    """The objects of the core, compiled as in setup.py with these lists; `flags` adds to each source's."""
    own = {f"src_c/isa/{isa}.c": more for isa, more in lists["ISAS"].items()}

    def compiled(source: str) -> Path:
        return compile_source(
            compiler, cases.CHECKOUT / source, [*lists["FLAGS"], *own.get(source, []), *flags(source)], folder
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, (*own, *lists["CORE"])))


def compile_source(compiler: list[Any], source: Path, flags: list[str], folder: Path) -> Path:
    """One object. Clang does not know two of GCC's flags."""
    made = folder / f"{source.stem}.o"
    clang = Path(compiler[0]).name.startswith("clang") or "ziglang" in compiler
    known = [flag for flag in flags if not (clang and flag in ("-fno-tree-slp-vectorize", "-fno-unswitch-loops"))]
    run([*compiler, *known, "-I", cases.CHECKOUT / "src_c", "-c", source, "-o", made])
    return made


class Habits(ct.Structure):
    """fbn_habits."""

    _fields_ = tuple((name, ct.c_int64) for name in ("streams", "row_streams", "turn", "ahead", "stream_from", "block"))


class Machine(ct.Structure):
    _fields_ = (("kernels", ct.c_void_p), ("core_cache", ct.c_int64), ("shared_cache", ct.c_int64), ("habits", Habits))


class Problem(ct.Structure):
    _fields_ = (
        ("machine", ct.POINTER(Machine)), ("dtype", ct.c_int), ("activation", ct.c_int), ("slope", ct.c_double),
        ("outer", ct.c_int64), ("channels", ct.c_int64), ("inner", ct.c_int64), ("threads", ct.c_int),
    )  # fmt: skip


class Parameters(ct.Structure):
    _fields_ = (("gamma", ct.c_void_p), ("beta", ct.c_void_p), ("dtype", ct.c_int))


class Statistics(ct.Structure):
    _fields_ = (("mean", ct.c_void_p), ("var", ct.c_void_p), ("dtype", ct.c_int))


class Running(ct.Structure):
    _fields_ = (
        ("mean", ct.c_void_p), ("var", ct.c_void_p), ("dtype", ct.c_int), ("momentum", ct.c_double),
        ("correction", ct.c_double),
    )  # fmt: skip


_KINDS: dict[str, Any] = {
    "parameters": Parameters, "statistics": Statistics, "running": Running, "eps": ct.c_double, "count": ct.c_double,
    "frozen": ct.c_int, "from_y": ct.c_int,
}  # fmt: skip
FIELDS = {
    "forward": "x residual mask parameters eps running y saved",
    "infer": "x residual parameters eps statistics y saved",
    "apply": "x residual parameters eps y saved",
    "plan_set": "parameters eps statistics",
    "plan_run": "x residual y",
    "moments": "x mask moments",
    "backward_sums": "dy x residual mask saved from_y sums",
    "backward": "dy x residual mask saved count frozen from_y given_sums dx dresidual dgamma dbeta",
}
"""The structs of arguments, by verb, without their size. What is of no kind above is a pointer."""


def _struct(verb: str) -> type[ct.Structure]:
    fields = (("size", ct.c_size_t), *((name, _KINDS.get(name, ct.c_void_p)) for name in FIELDS[verb].split()))
    return type(f"Args_{verb}", (ct.Structure,), {"_fields_": fields})


ARGS = {verb: _struct(verb) for verb in FIELDS}

_POINTER, _PROBLEM = ct.c_void_p, ct.POINTER(Problem)
_VERBS = {verb: (ct.c_int, [_PROBLEM, ct.POINTER(struct), _POINTER]) for verb, struct in ARGS.items()}
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    **_VERBS,
    "abi_version": (ct.c_int, []),
    "status_text": (ct.c_char_p, [ct.c_int]),
    "workspace_bytes": (ct.c_size_t, [_PROBLEM]),
    "plan_bytes": (ct.c_size_t, [ct.c_int64]),
    "this_machine": (Machine, []),
    "kernels_at": (ct.c_void_p, [ct.c_int]),
    "kernels_name": (ct.c_char_p, [ct.c_void_p]),
    "openmp": (ct.c_int, []),
    "openmp_threads": (ct.c_int, []),
    "cache_bytes": (ct.c_int64, [ct.c_int]),
}


class Api:
    """The functions of fastbn.h, by their names without fbn_."""

    def __init__(self, library: Path) -> None:
        loaded = ct.CDLL(str(library))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, f"fbn_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def load(folder: Path) -> Api:
    """The static library's functions, out of a shared library that is linked from it."""
    library, *rest = flags("--libs")
    whole = ["-Wl,-all_load", library] if sys.platform == "darwin" else ["-Wl,--whole-archive", library]
    end = [] if sys.platform == "darwin" else ["-Wl,--no-whole-archive"]
    target = folder / "libwhole.so"
    run([compiler("cc", "gcc", "clang"), "-shared", *whole, *end, *rest, "-o", target])
    return Api(target)
