"""Which backend does the work? The protocol that each backend implements, and the choice among them."""

import importlib
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, cast

from ..call import checks
from ..call.record import BackwardCall, Call
from ..config import environment, habits, thread_count

SAVED_ROWS = ("mean", "mean_low", "var", "inv_std", "gamma", "beta")
"""The rows of `saved`, the float64 array (rows, channels) that a forward call keeps for its backward call.

The mean is mean + mean_low; inv_std is 1/sqrt(var + eps), or 0 where var + eps is 0.
"""


class Backend(Protocol):
    """Fills the arrays of a call and decides nothing else. A module is a backend when it has these functions.

    A call has been checked, and its results are allocated. x, residual, y, dy, dx and dresidual are C-contiguous
    (outer, channels, inner) of one dtype; y may be x, and dx may be dy. gamma and beta are (channels,), in one dtype,
    float64 or the statistics dtype. dgamma and dbeta are (channels,), contiguous, in the statistics dtype. Running
    statistics are (channels,), contiguous, in any native float dtype. mask is bool (outer, inner), contiguous, and any
    byte but 0 is True; at least one position is True, two for forward, any number for gradients. saved, moments and
    sums are float64 (rows, channels). Fields that may be None in `Call` or `BackwardCall` may be None here. A backend
    also reads the numbers momentum, correction, eps, options, counted, frozen, from_y and threads, and no others.
    """

    DTYPES: frozenset[str]
    """The names of the dtypes that data may have. Data of other dtypes is converted before the call, block by block."""

    def forward(self, call: Call) -> None:
        """Normalizes with the statistics of x where mask is True, fills saved, and updates the running statistics.

        The running variance is updated with the sum of squares divided by (number of values - correction).
        """

    def infer(self, call: Call) -> None:
        """Normalizes with the running statistics, and fills saved unless it is None."""

    def apply(self, call: Call) -> None:
        """Normalizes with the first three rows of saved, and fills its other rows."""

    def moments(self, call: Call) -> None:
        """Fills moments from x where mask is True: mean, mean_low and the sum of squares about mean + mean_low."""

    def backward_sums(self, call: BackwardCall) -> None:
        """Fills sums: the sum of dz and the sum of dz * xhat.

        Both are taken over all positions except those where mask is False and dy is 0.
        """

    def backward(self, call: BackwardCall) -> None:
        """Computes the gradient of forward (not frozen) or infer (frozen), with `sums` or, if it is None, its own sums.

        The statistics were taken of `counted` values per channel; mask says which values of x were among them. Where
        it is False and dy is 0, dx and dresidual are 0, whatever x, the residual and the statistics are.
        """

    def describe(self) -> dict[str, str]:
        """What show_config() prints about this backend."""


_MODULES = {"c": "c.bridge", "numba": "numba_backend", "numpy": "numpy_backend"}
_loaded: dict[str, Backend] = {}


@cache
def _is_usable(name: str) -> bool:
    if name == "c":
        return find_spec("fastbn._backends.c.bridge") is not None
    return name == "numpy" or find_spec("numba") is not None


def backends() -> tuple[str, ...]:
    """The names of the backends that are usable here, the fastest first.

    "c" has the kernels in C and is in every wheel, "numba" needs Numba (pip install "fastbn[numba]"), and "numpy" is a
    reference in NumPy. All give what `help(fastbn.forward)` promises; their bits may differ.

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
        habits.load(backend)
    return backend


@cache
def _best() -> str:
    return backends()[0]


def get_backend() -> str:
    """The name of the backend that a call made here uses if it has no `backend` argument.

    A `use_backend` block counts first, then `set_backend`, then FASTBN_BACKEND, then the first of `backends()`.

    >>> import fastbn
    >>> with fastbn.use_backend("numpy"):
    ...     fastbn.get_backend()
    'numpy'
    """
    return environment.backend_name() or _best()


def _bridge() -> Any:
    """The compiled extension, or None if it is not built, or cannot be loaded and the environment chose another."""
    if not _is_usable("c"):
        return None
    try:
        return importlib.import_module(f".{_MODULES['c']}", __name__)
    except ImportError:
        if environment.environment_backend() in ("numba", "numpy"):
            return None
        raise


_extension = _bridge()
"""Loaded when fastbn is imported, so that it knows how many threads OpenMP had at that time."""


def threads_of(backend: Backend) -> int:
    """The largest number of threads that a call made here and now may use with this backend."""
    if thread_count.in_forked_child():
        return 1
    asked = thread_count.asked()
    if _extension is None or (backend is not _extension and not _extension.openmp()):
        return asked
    return min(asked, int(_extension.most_threads()))


def get_num_threads() -> int:
    """The largest number of threads that a call made here and now may use, with the backend of `get_backend`.

    A `use_num_threads` block counts first, then `set_num_threads`, then the environment (FASTBN_NUM_THREADS, else
    OMP_NUM_THREADS), then the number of processors that the process may use: its affinity, and its container's quota
    at the time when fastbn was imported. A limit set in the OpenMP library that fastbn links to (by threadpoolctl or
    omp_set_num_threads) also applies if it is lower than OpenMP's number of threads when fastbn was imported.

    The number is 1 in a process that was forked after fastbn was imported, and with the C backend in a build without
    OpenMP. Small calls use fewer threads, and Numba never uses more than NUMBA_NUM_THREADS. The results are the same,
    bit for bit, for any number of threads.

    >>> import fastbn
    >>> with fastbn.use_num_threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    return threads_of(select(None))


def select(name: str | None) -> Backend:
    """The backend of this name, or the default if it is None."""
    try:
        return _loaded[(environment.backend_name() or _best()) if name is None else name]
    except (KeyError, TypeError):
        pass  # what follows may raise, and users should see that alone
    return _named(get_backend() if name is None else name)


def _named(name: str) -> Backend:
    name = checks.choice("backend", name, environment.BACKENDS)
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def set_backend(name: str) -> None:
    """Sets the backend for the process.

    Raises TypeError or ValueError if there is no backend of this name, and ImportError if it is not usable here.

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
    """Within the block, in this thread or task only, calls without a `backend` argument use the backend `name`.

    Raises the same errors as `set_backend`.

    >>> import fastbn
    >>> with fastbn.use_backend("numpy"):
    ...     fastbn.get_backend()
    'numpy'
    """
    _named(name)
    return environment.backend_here(name)
