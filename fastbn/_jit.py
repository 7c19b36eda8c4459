"""How is fastbn's own jitted code compiled, and kept on disk? In the cache folder, never in the package.

Numba writes its files whole or not at all, but loads whatever it finds: a damaged file may end the process. So a list
of sizes and CRC32s lies beside them, and what does not agree with it is removed before Numba looks. Numba itself tells
apart processors, Python versions and signatures; the name of the folder tells apart versions of Numba and of fastbn.
"""

from __future__ import annotations

import atexit
import functools
import io
import os
import pickle
import sys
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from ._cache_dir import cache_dir

SOURCES = ("numba.py", "backends/numba_backend.py", "backends/numba_loops.py")
LIST = "checksums"

_lock = threading.Lock()
_dispatchers: list[Any] = []
_listed = 0
"""How many compiled functions there were when the list was written."""


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit with these options; with cache=True the code is kept on disk, where anything can be written."""
    njit: Any = numba.njit
    config: Any = numba.config

    def compiled(function: Callable[..., Any]) -> Any:
        folder = _folder() if options.get("cache") else None
        if folder is not None:
            with _lock:  # Numba reads the setting when it decorates
                before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
                try:
                    dispatcher = njit(**options)(function)
                    if folder in Path(dispatcher.stats.cache_path).parents:
                        _dispatchers.append(dispatcher)
                        return dispatcher
                except (OSError, RuntimeError):  # there is no place for it
                    pass
                finally:
                    config.CACHE_DIR = before
        return njit(**{**options, "cache": False})(function)

    return compiled


def list_files() -> None:
    """Writes the list, where something has been compiled or loaded since."""
    global _listed
    count = sum(len(dispatcher.overloads) for dispatcher in _dispatchers)
    if count == _listed:
        return
    with _lock:
        _listed, folder = count, _folder()
        if folder is None:
            return
        found = "".join(f"{_checksum(path.read_bytes())} {path.relative_to(folder)}\n" for path in _files(folder))
        try:
            if _read(folder / LIST) == found.encode():
                return
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(found.encode())
            os.replace(file.name, folder / LIST)
        except OSError:
            pass  # then the next process compiles anew


atexit.register(list_files)


@functools.cache
def _folder() -> Path | None:
    """That of this version's files, without damaged ones; None where nothing can be written."""
    base = cache_dir()
    if base is None:
        return None
    package = Path(__file__).parent
    version = zlib.crc32(b"".join((package / name).read_bytes() for name in SOURCES))
    folder = base / f"numba-{numba.__version__}-{sys.implementation.cache_tag}-{version:08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        _remove_damaged(folder)
    except OSError:
        return None
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.nb[ic]") if path.is_file())


def _checksum(content: bytes) -> str:
    return f"{len(content)} {zlib.crc32(content):08x}"


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _remove_damaged(folder: Path) -> None:
    """And what is not listed: another process may have died, or compile at this moment, which is no reason to warn.

    Data never changes where it is listed, while an index grows.
    """
    listed = set(_read(folder / LIST).decode(errors="replace").splitlines())
    names = {line.split(" ", 2)[-1] for line in listed}
    damaged = []
    for path in _files(folder):
        name, content = str(path.relative_to(folder)), _read(path)
        if f"{_checksum(content)} {name}" not in listed:
            path.unlink(missing_ok=True)
            if not _is_whole(content) or (name in names and path.suffix == ".nbc"):
                damaged.append(name)
    if damaged:
        what = ", ".join(damaged)
        warnings.warn(f"damaged files in {folder} are ignored and compiled anew: {what}", RuntimeWarning, stacklevel=2)


def _is_whole(content: bytes) -> bool:
    """Whether a file has what Numba writes: one pickle or two."""
    stream = io.BytesIO(content)
    try:
        while stream.tell() < len(content):
            pickle.load(stream)
    except Exception:  # whatever garbage makes it raise
        return False
    return bool(content)
