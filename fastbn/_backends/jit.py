"""How is fastbn's own jitted code compiled, and kept on disk? In the cache folder, never in the package.

Numba keeps an index of each function and numbers its files, so processes that compile at once may give two signatures
the same number; it loads whatever it finds, and a damaged file may end the process. fastbn therefore keeps a file per
function and signature, which begins with its digest and says what it holds. It is replaced as a whole, so any number
of processes may read and write: each finds a whole file or none. What cannot be read or written is only compiled anew.

Numba itself tells apart processors, Python versions and signatures; the name of the folder tells apart versions of
Numba and of fastbn.
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
    """numba.njit with these options; with cache=True the code is kept on disk, where anything can be written."""
    kept = options.pop("cache", False)
    njit: Any = numba.njit

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**options)(function)
        folder = _folder() if kept else None
        if folder is not None:
            with contextlib.suppress(OSError, RuntimeError):  # there is no place for it
                cache = _cache_in(folder, function)
                if folder in Path(cache.cache_path).parents:
                    dispatcher._cache = cache
        return dispatcher

    return compiled


@functools.cache
def _folder() -> Path | None:
    """That of this version's files; None where nothing can be written."""
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
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)  # which Numba reads when a cache is made
        try:
            return _Cache(function)
        finally:
            config.CACHE_DIR = before


class _Cache(FunctionCache):
    """Numba's cache of one function, but for how its files are named, read and written."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled for these types, None where it is not kept."""
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
        """When the source was written, and all that the code depends on."""
        return (self._impl.locator.get_source_stamp(), *self._index_key(sig, codegen))

    def _path(self, key: tuple[Any, ...]) -> Path:
        """A file per function, types and processor, whatever the source's age, so that old code is replaced."""
        digest = hashlib.sha256(repr(key[1:3]).encode()).hexdigest()[:16]
        return Path(self.cache_path) / f"{self._impl.filename_base}.{digest}.nbc"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _read(path: Path) -> bytes | None:
    """What _write was given; None, and a warning if the file is damaged."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    size = len(_digest(b""))
    if whole[:size] == _digest(whole[size:]):
        return whole[size:]
    message = f"damaged file in {path.parent} is ignored and compiled anew: {path.name}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None


def _write(path: Path, content: bytes) -> None:
    """Replaces the file as a whole; leaves nothing where it cannot be written, as on a full disk."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = file.name
            file.write(_digest(content) + content)
        os.replace(temporary, path)
    except OSError:  # the next process compiles anew
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
