"""How do tests meet the C API? The compilers, an installed fastbn's flags, and fastbn.h in ctypes."""

from __future__ import annotations

import ctypes as ct
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OK, NULL_POINTER, MISALIGNED, OVERLAP, BAD_DTYPE, BAD_ACTIVATION, BAD_SHAPE, BAD_THREADS = range(8)
BAD_EPS, BAD_MOMENTUM, TOO_FEW_VALUES, BAD_PLAN = range(8, 12)


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


def run(command: list[Any], folder: Path | None = None) -> str:
    """Its output; what it prints when it fails is the test's message."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Machine(ct.Structure):
    _fields_ = (("kernels", ct.c_void_p), ("core_cache", ct.c_int64), ("shared_cache", ct.c_int64))


class Problem(ct.Structure):
    _fields_ = (
        ("machine", ct.POINTER(Machine)), ("dtype", ct.c_int), ("activation", ct.c_int), ("slope", ct.c_double),
        ("outer", ct.c_int64), ("channels", ct.c_int64), ("inner", ct.c_int64), ("threads", ct.c_int),
    )  # fmt: skip


class Parameters(ct.Structure):
    _fields_ = (("gamma", ct.c_void_p), ("beta", ct.c_void_p), ("dtype", ct.c_int))


class Running(ct.Structure):
    _fields_ = (("mean", ct.c_void_p), ("var", ct.c_void_p), ("momentum", ct.c_double), ("correction", ct.c_double))


class Called(ct.Structure):
    _fields_ = (
        ("mask", ct.c_void_p), ("count", ct.c_double), ("frozen", ct.c_int), ("from_y", ct.c_int),
        ("sums", ct.c_void_p),
    )  # fmt: skip


_POINTER, _PROBLEM, _REAL = ct.c_void_p, ct.POINTER(Problem), ct.c_double
_PARAMETERS = ct.POINTER(Parameters)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "abi_version": (ct.c_int, []),
    "status_text": (ct.c_char_p, [ct.c_int]),
    "workspace_bytes": (ct.c_size_t, [_PROBLEM]),
    "forward": (
        ct.c_int,
        [_PROBLEM, *[_POINTER] * 3, _PARAMETERS, _REAL, ct.POINTER(Running), *[_POINTER] * 3],
    ),
    "infer": (ct.c_int, [_PROBLEM, *[_POINTER] * 2, _PARAMETERS, _REAL, *[_POINTER] * 5]),
    "plan_bytes": (ct.c_size_t, [ct.c_int64]),
    "plan_set": (ct.c_int, [_PROBLEM, _PARAMETERS, _REAL, *[_POINTER] * 3]),
    "plan_run": (ct.c_int, [_PROBLEM, *[_POINTER] * 4]),
    "moments": (ct.c_int, [_PROBLEM, *[_POINTER] * 4]),
    "backward_sums": (ct.c_int, [_PROBLEM, *[_POINTER] * 4, ct.c_int, *[_POINTER] * 2]),
    "backward": (ct.c_int, [_PROBLEM, *[_POINTER] * 4, ct.POINTER(Called), *[_POINTER] * 5]),
    "this_machine": (Machine, []),
    "kernels_at": (ct.c_void_p, [ct.c_int]),
    "kernels_name": (ct.c_char_p, [ct.c_void_p]),
    "openmp": (ct.c_int, []),
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
