"""Which backend does the work? The protocol that each fills, and the choice among them."""

import importlib
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, cast

from ..call import checks
from ..call.record import BackwardCall, Call
from ..config import environment, thread_count

SAVED_ROWS = ("mean", "mean_low", "var", "inv_std", "gamma", "beta")
"""The rows of `saved`, the float64 array (rows, channels) that carries a forward call to its backward.

The mean is mean + mean_low; inv_std is 1/sqrt(var + eps), or 0 where var + eps is 0.
"""


class Backend(Protocol):
    """Fills the arrays of a call; never decides. A module is a backend when it has these functions.

    A call arrives validated, with results allocated. x, residual, y, dy, dx and dresidual are C-contiguous
    (outer, channels, inner) of one dtype; y may be x, and dx may be dy. gamma and beta are (channels,), in one dtype,
    float64 or the statistics dtype. dgamma and dbeta are (channels,), contiguous, in the statistics dtype; so are
    running statistics, but in any float dtype, native. mask is bool (outer, inner), contiguous, and any byte but 0 is
    True: at least one, two for forward, any number for gradients. saved, moments and sums are float64 (rows, channels).
    What a `Call` or `BackwardCall` calls None may be absent. A backend reads no other fields than those named here,
    and the numbers: momentum, correction, eps, code, slope, counted, frozen, from_y and threads.
    """

    DTYPES: frozenset[str]
    """The names of the dtypes of data that it takes; the front desk converts others, block by block."""

    def forward(self, call: Call) -> None:
        """Normalizes with the statistics of x where mask is True, fills saved, and updates the running statistics.

        The running variance gets the sum of squares over their count - correction.
        """

    def infer(self, call: Call) -> None:
        """Normalizes with the running statistics; fills saved, if there is one."""

    def apply(self, call: Call) -> None:
        """Normalizes with the first three rows of saved, and fills the others."""

    def moments(self, call: Call) -> None:
        """Fills moments, of x where mask is True: mean, mean_low and the sum of squares around their sum."""

    def backward_sums(self, call: BackwardCall) -> None:
        """Fills sums: those of dz and of dz * xhat.

        They are over all positions, but for those where mask is False and dy is 0, which add nothing.
        """

    def backward(self, call: BackwardCall) -> None:
        """The gradient of forward (not frozen) or infer (frozen), with `sums` or else those of its own positions.

        `counted` values per channel made the statistics, and mask tells which of x's were among them. Where it is False
        and dy is 0, dx and dresidual are 0, whatever x, the residual and the statistics are.
        """

    def describe(self) -> dict[str, str]:
        """What show_config() prints of this backend."""


_MODULES = {"c": "c.bridge", "numba": "numba_backend", "numpy": "numpy_backend"}
_loaded: dict[str, Backend] = {}


@cache
def _is_usable(name: str) -> bool:
    if name == "c":
        return find_spec("fastbn._backends.c.bridge") is not None
    return name == "numpy" or find_spec("numba") is not None


def backends() -> tuple[str, ...]:
    """The backends that are usable here, best first.

    >>> import fastbn
    >>> "numpy" in fastbn.backends()
    True
    """
    return tuple(name for name in environment.BACKENDS if _is_usable(name))


def _load(name: str) -> Backend:
    if not _is_usable(name):
        how = 'pip install "fastbn[numba]"' if name == "numba" else "install a build with the compiled extension"
        raise ImportError(f"backend: {name!r} is not usable here; usable: {', '.join(backends())} ({how})")
    backend = cast(Backend, importlib.import_module(f".{_MODULES[name]}", __name__))
    if name == "c":
        isa = environment.environment_isa()
        if isa is not None:
            backend.select_isa(isa)  # type: ignore[attr-defined]
    return backend


@cache
def _best() -> str:
    return backends()[0]


def get_backend() -> str:
    """The name of the backend that a call from here uses when it names none.

    The block of `use_backend` counts first, then `set_backend`, then FASTBN_BACKEND, then the best that is usable.

    >>> import fastbn
    >>> with fastbn.use_backend("numpy"):
    ...     fastbn.get_backend()
    'numpy'
    """
    return environment.backend_name() or _best()


def _bridge() -> Any:
    """The extension, where it is built; one that cannot be loaded matters only to those who may use it."""
    if not _is_usable("c"):
        return None
    try:
        return importlib.import_module(f".{_MODULES['c']}", __name__)
    except ImportError:
        if environment.environment_backend() in ("numba", "numpy"):
            return None
        raise


_extension = _bridge()
"""Loaded with fastbn, so that it knows how many threads OpenMP had then."""


def threads_of(backend: Backend) -> int:
    """The most threads that a call made here and now may use on a backend."""
    if thread_count.in_forked_child():
        return 1
    asked = thread_count.asked()
    if _extension is None or (backend is not _extension and not _extension.openmp()):
        return asked
    return min(asked, int(_extension.most_threads()))


def get_num_threads() -> int:
    """The most threads that a call made here and now may use, with the backend that it uses when it names none.

    The block of `use_num_threads` counts first, then `set_num_threads`, then the environment (FASTBN_NUM_THREADS,
    else OMP_NUM_THREADS), then the processors that the process may use: its affinity, and its container's quota when
    fastbn was imported. An OpenMP limit (threadpoolctl, omp_set_num_threads), in the OpenMP that fastbn links to,
    counts where it is lower than OpenMP's own number was when fastbn was imported.

    It is 1 in a process that was forked after fastbn was imported, and with the C backend in a build without OpenMP.
    Small calls use fewer, and Numba has no more than its own NUMBA_NUM_THREADS. The bits of results depend on none of
    this.

    >>> import fastbn
    >>> with fastbn.use_num_threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    return threads_of(select(None))


def select(name: str | None) -> Backend:
    """The backend of that name, or the default for None."""
    chosen = get_backend() if name is None else name
    try:
        return _loaded[chosen]
    except (KeyError, TypeError):
        return _named(chosen)


def _named(name: str) -> Backend:
    name = checks.choice("backend", name, environment.BACKENDS)
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def set_backend(name: str) -> None:
    """Sets the backend for the process.

    Raises TypeError or ValueError if there is no such backend, ImportError if it is not usable here.

    >>> import fastbn
    >>> before = fastbn.get_backend()
    >>> fastbn.set_backend("numpy")
    >>> fastbn.get_backend()
    'numpy'
    >>> fastbn.set_backend(before)
    """
    _named(name)
    environment.set_backend_name(name)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Within the block, and in this thread or task only, calls that name no backend use this one.

    Raises as `set_backend` does.

    >>> import fastbn
    >>> with fastbn.use_backend("numpy"):
    ...     fastbn.get_backend()
    'numpy'
    """
    _named(name)
    return environment.backend_here(name)
