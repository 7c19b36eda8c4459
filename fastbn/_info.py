"""What is installed and chosen here? The version and show_config()."""

from __future__ import annotations

import platform

import numpy as np

from . import _built, _config
from .backends import backends, get_backend, select

__version__ = _built.version_here()


def show_config() -> None:
    """Prints the version, the backends and the one in use, its instruction set and why, OpenMP, threads and caches.

    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn ...
    """
    lines = {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "NumPy": np.__version__,
        "backends": ", ".join(backends()),
        "backend": f"{get_backend()} ({_why_backend()})",
        "threads": f"{_config.get_num_threads()}{' (forked child)' if _config.in_forked_child() else ''}",
    }
    for name in backends():
        lines.update({f"{name}: {key}": value for key, value in select(name).describe().items()})
    width = max(map(len, lines))
    print(f"fastbn {__version__}")
    for key, value in lines.items():
        print(f"  {key:<{width}}  {value}")


def _why_backend() -> str:
    if _config.backend_name() is None:
        return "the best that is usable"
    return "FASTBN_BACKEND" if _config.backend_name() == _config.environment_backend() else "asked for"
