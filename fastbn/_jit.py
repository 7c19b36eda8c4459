"""How is fastbn's own jitted code compiled, and kept on disk? In the cache folder, never in the package.

Numba writes its files whole or not at all, but loads whatever it finds: a damaged file may end the process. So a list
of sizes and CRC32s lies beside them, and what does not agree with it is removed before Numba looks. Numba itself tells
apart processors, Python versions and signatures; the name of the folder tells apart versions of Numba and of fastbn.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import pickle
import re
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
    if count != _listed:
        with _lock:
            _listed, folder = count, _folder()
            if folder is not None:
                with contextlib.suppress(OSError):  # then the next process compiles anew
                    _write_list(folder)


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


def _line(folder: Path, path: Path) -> tuple[str, str]:
    """A file's name below the folder and when it was written; its size and CRC32."""
    content = path.read_bytes()
    named = f"{path.relative_to(folder)} {path.stat().st_mtime_ns}"
    return named, f"{len(content)} {zlib.crc32(content):08x}"


def _write_list(folder: Path) -> None:
    lines = "".join(f"{' '.join(_line(folder, path))}\n" for path in _files(folder)).encode()
    listed = folder / LIST
    if not listed.is_file() or listed.read_bytes() != lines:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(lines)
        os.replace(file.name, listed)


def _remove_damaged(folder: Path) -> None:
    """Removes functions of which one file, the index or data, is not as it is listed.

    A file that is whole but new is of another process, which died or is still at work: that is no reason to warn.
    """
    listed = (folder / LIST).read_text(errors="replace") if (folder / LIST).is_file() else ""
    parts = (line.rsplit(" ", 2) for line in listed.splitlines())
    known = {part[0]: " ".join(part[1:]) for part in parts}
    strange, damaged = set(), []
    for path in _files(folder):
        named, checksum = _line(folder, path)
        if known.get(named) != checksum:
            strange.add(_function(path))
            if named in known or not _is_whole(path.read_bytes()):
                damaged.append(path.name)
    for path in _files(folder):
        if _function(path) in strange:
            path.unlink(missing_ok=True)
    if strange:
        _write_list(folder)
    if damaged:
        what = ", ".join(damaged)
        warnings.warn(f"damaged files in {folder} are ignored and compiled anew: {what}", RuntimeWarning, stacklevel=2)


def _function(path: Path) -> str:
    """What the names of a function's index and data have in common."""
    return re.sub(r"(\.\d+)?\.nb[ic]$", "", str(path))


def _is_whole(content: bytes) -> bool:
    """Whether a file has what Numba writes: one pickle or two."""
    stream = io.BytesIO(content)
    try:
        while stream.tell() < len(content):
            pickle.load(stream)
    except Exception:  # whatever garbage makes it raise
        return False
    return bool(content)
