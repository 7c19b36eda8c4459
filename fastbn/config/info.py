"""What is installed and chosen here? The version and show_config()."""

import os
import platform

import numpy as np

from .._backends import backends, get_backend, get_num_threads, select
from . import built, environment, habits, thread_count

__version__ = built.version_here()


def show_config() -> None:
    """Prints the version, the backends and the one in use, its instruction set and why, OpenMP, threads and caches.

    It also prints the habits of the machine that are in force (see `tune`), and why.

    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn ...
    """
    lines = {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "NumPy": np.__version__,
        "backends": ", ".join(backends()),
        "backend": f"{get_backend()} ({_why_backend()})",
        "threads": f"{get_num_threads()} ({_why_threads()})",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", _WAIT_POLICY),
    }
    for name in backends():
        lines.update({f"{name}: {key}": value for key, value in select(name).describe().items()})
        if name == "c":
            lines["c: habits"] = habits.shown(select(name))
    width = max(map(len, lines))
    print(f"fastbn {__version__}")
    for key, value in lines.items():
        print(f"  {key:<{width}}  {value}")


_WAIT_POLICY = "not set (passive, set before Python starts, is better where other programs keep the processors busy)"
"""GNU OpenMP's threads spin while they wait for each other. They keep the processor from another
program until the system takes it from them."""


def _why_threads() -> str:
    return "a forked child" if thread_count.in_forked_child() else thread_count.why()


def _why_backend() -> str:
    if environment.backend_name() is None:
        return "the best that is usable"
    return "FASTBN_BACKEND" if environment.backend_name() == environment.environment_backend() else "asked for"
