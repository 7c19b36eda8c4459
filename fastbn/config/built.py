"""Is this fastbn built? If not, `import fastbn` raises an error instead of using a slower backend."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

EXTENSION = "fastbn._backends.c.bridge"
UNKNOWN = "0+unknown"
FOLDER = Path(__file__).resolve().parent.parent


@cache
def is_built() -> bool:
    """Whether the compiled extension exists."""
    return find_spec(EXTENSION) is not None


def version_here() -> str:
    """The installed version, or UNKNOWN if this folder is not built or fastbn is not installed."""
    try:
        return version("fastbn") if is_built() else UNKNOWN
    except PackageNotFoundError:
        return UNKNOWN


def require() -> None:
    """Raises ImportError unless the extension exists, or FASTBN_BACKEND names a backend that does not need it."""
    if is_built() or os.environ.get("FASTBN_BACKEND") in ("numba", "numpy"):
        return
    checkout = FOLDER.parent
    if not FOLDER.is_dir():
        why = (
            "Python loads no compiled extension from an archive. Install fastbn beside it, or make the archive with "
            "shiv, which unpacks it where it runs:"
        )
        command = "python -m pip install fastbn"
    elif (checkout / "setup.py").is_file():
        why = (
            "It is a source checkout that was not built. Python finds it before an installed fastbn if it was started "
            "in that folder. Start Python in another folder, or run"
        )
        command = f'python -m pip install -e "{checkout}"'
    else:
        why, command = "The installation is not complete. Run", "python -m pip install --force-reinstall fastbn"
    raise ImportError(
        f"fastbn was imported from {FOLDER}, where its compiled extension, {EXTENSION}, is missing. {why}:\n\n"
        f"    {command}\n\n"
        "FASTBN_BACKEND=numpy or FASTBN_BACKEND=numba uses that backend, which does not need the extension."
    )
