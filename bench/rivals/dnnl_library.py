"""Where is oneDNN's library? The one that LIBDNNL names, or that of a package: "onednn", else "onednn-cpu-gomp"."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUNTIMES = {1: "sequential", 2: "OpenMP", 4: "TBB", 8: "a thread pool", 512: "SYCL"}
"""What runs the threads of a library: dnnl_runtime_kind_t."""

PACKAGES = ("onednn", "onednn-cpu-gomp")
"""The first is the newer. It runs on SYCL, of whose 2 GB it depends on."""

DRIVER = "libintelocl.so"


def _in_package(package: str) -> Path | None:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = sorted(Path(str(file.locate())).resolve() for file in files if file.name.startswith("libdnnl.so"))
    return paths[-1] if paths else None


def _opened(path: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Opens a library, after those in its folder that it needs and the loader does not find."""
    while True:
        try:
            return ctypes.CDLL(str(path), mode)
        except OSError as error:
            needed = re.match(r"(\S+): cannot open shared object", str(error))
            beside = path.with_name(Path(needed[1]).name) if needed else path
            if beside == path or not beside.exists():
                raise
            _opened(beside, ctypes.RTLD_GLOBAL)


def library() -> tuple[ctypes.CDLL, str]:
    """The library, and where it is from."""
    named = os.environ.get("LIBDNNL")
    if named:
        return _opened(Path(named)), "LIBDNNL"
    for package in PACKAGES:
        path = _in_package(package)
        if path is not None:
            if (path.with_name(DRIVER)).exists():  # without a system-wide list of drivers, SYCL finds no processor
                os.environ.setdefault("OCL_ICD_FILENAMES", str(path.with_name(DRIVER)))
            return _opened(path), f"package {package}"
    raise ImportError(f"no package {' or '.join(PACKAGES)}, and LIBDNNL names no library")


@contextmanager
def few_processors(threads: int) -> Iterator[None]:
    """Runtimes that are started meanwhile have as many threads: they ask how many processors the process may use."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
