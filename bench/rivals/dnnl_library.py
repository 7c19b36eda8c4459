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


def _found() -> tuple[Path, str]:
    named = os.environ.get("LIBDNNL")
    if named:
        return Path(named), "LIBDNNL"
    for package in PACKAGES:
        path = _in_package(package)
        if path is not None:
            return path, f"package {package}"
    raise ImportError(f"no package {' or '.join(PACKAGES)}, and LIBDNNL names no library")


def library() -> tuple[ctypes.CDLL, str]:
    """The library, and where it is from."""
    path, source = _found()
    driver = path.with_name(DRIVER)
    if driver.exists():  # SYCL finds no processor without a list of drivers, which the packages do not install
        os.environ.setdefault("OCL_ICD_FILENAMES", str(driver))
    return _opened(path), source


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
