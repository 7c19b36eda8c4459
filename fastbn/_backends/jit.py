"""How is fastbn's own jitted code compiled, and kept on disk? In the cache folder, never in the package.

Numba keeps an index for each function and numbers its files, so processes that compile at the same time may give two
signatures the same number. It also loads any file that it finds, and a damaged file may end the process. fastbn
therefore keeps one file per function and signature, which begins with a digest and names its contents. Files are
replaced as a whole, so that processes that read and write at the same time find a whole file or none. If a file cannot
be read or written, the function is compiled again.

Numba's keys name processors, Python versions and signatures. The folder's name has the versions of Numba and fastbn.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from ..config.cache_dir import cache_dir

SOURCES = ("numba.py", "_backends/*.py", "call/*.py", "include/*.h")
"""Whatever compiled code may have been made of: its own text, and the numbers that it holds as constants."""

_lock = threading.Lock()


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit with these options; with cache=True the code is kept on disk if a folder for it can be written."""
    kept = options.pop("cache", False)
    njit: Any = numba.njit

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**options)(function)
        folder = _folder() if kept else None
        if folder is not None:
            with contextlib.suppress(OSError, RuntimeError):  # Numba found no place for the files
                cache = _cache_in(folder, function)
                if folder in Path(cache.cache_path).parents:
                    dispatcher._cache = cache
        return dispatcher

    return compiled


@functools.cache
def _folder() -> Path | None:
    """The folder of this version's files, or None if it cannot be written."""
    base = cache_dir()
    if base is None:
        return None
    version = _version(Path(__file__).parent.parent)
    folder = base / f"numba-{numba.__version__}-{sys.implementation.cache_tag}-{version:08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder


def _version(package: Path) -> int:
    """A number that changes with any of the sources."""
    return zlib.crc32(b"".join(path.read_bytes() for name in SOURCES for path in sorted(package.glob(name))))


def _cache_in(folder: Path, function: Callable[..., Any]) -> _Cache:
    config: Any = numba.config
    with _lock:
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)  # Numba reads it when a cache is made
        try:
            return _Cache(function)
        finally:
            config.CACHE_DIR = before


class _Cache(FunctionCache):
    """Numba's cache of one function, with fastbn's way to name, read and write its files."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code compiled for these types, or None if it is not on disk."""
        target_context.refresh()
        key = self._key(sig, target_context.codegen())
        content = _read(self._path(key))
        if content is None:
            return None
        found, reduced = pickle.loads(content)
        return self._impl.rebuild(target_context, reduced) if found == key else None

    def save_overload(self, sig: Any, data: Any) -> None:
        if self._impl.check_cachable(data):
            key = self._key(sig, data.codegen)
            _write(self._path(key), dumps((key, self._impl.reduce(data))))

    def _key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        """When the source was last changed, and everything else that the code depends on."""
        return (self._impl.locator.get_source_stamp(), *self._index_key(sig, codegen))

    def _path(self, key: tuple[Any, ...]) -> Path:
        """The file for a function, types and processor. The source's age is left out, so that new code replaces old."""
        digest = hashlib.sha256(repr(key[1:3]).encode()).hexdigest()[:16]
        return Path(self.cache_path) / f"{self._impl.filename_base}.{digest}.nbc"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _read(path: Path) -> bytes | None:
    """The content that `_write` was given, or None if there is no such file or it is damaged, which is a warning."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    size = len(_digest(b""))
    if whole[:size] == _digest(whole[size:]):
        return whole[size:]
    message = f"damaged file in {path.parent} is ignored, and its function compiled again: {path.name}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None


def _write(path: Path, content: bytes) -> None:
    """Replaces the file as a whole. If it cannot be written, as on a full disk, nothing is left behind."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = file.name
            file.write(_digest(content) + content)
        os.replace(temporary, path)
    except OSError:  # the next process compiles again
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
