"""In which folder does fastbn keep what Numba compiled and `tune` measured?"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path | None:
    """$FASTBN_CACHE_DIR, else "fastbn" in the user's cache folder, which need not exist; None if there is no home."""
    given = os.environ.get("FASTBN_CACHE_DIR")
    if given:
        return Path(given).absolute()
    try:
        return _of_user() / "fastbn"
    except RuntimeError:  # there is no home
        return None


def _of_user() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"  # the specification ignores relative paths
