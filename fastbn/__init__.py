"""Batch normalization for CPUs: fast, exact at any offset, the same bits for any number of threads.

- Functions: `forward` and `backward` to train, `infer` with given statistics.
- A layer: `BatchNorm` keeps parameters and running statistics; `recalibrate` sets the latter to exact ones.
- Inference: `InferencePlan` computes its constants once, `fold` puts the norm into the layer before it.
- A batch in parts: `moments`, `backward_sums`, and the `Moments` and `Sums` that they return, add up.
- What runs: `backends`, `set_backend`, `use_backend`, `get_num_threads`, `set_num_threads`, `use_num_threads`;
  `show_config` prints what was chosen, `test` tries the installation, `tune` measures how this machine's memory is used
  best; `get_include`, `get_library` are for compilers.
- Modules that need a further package: fastbn.torch, fastbn.onnx, fastbn.numba, fastbn.mpi, fastbn.dask and
  fastbn.bench.

`help` of each name has its arguments, errors and an example. The environment variables FASTBN_BACKEND, FASTBN_ISA,
FASTBN_NUM_THREADS and FASTBN_CACHE_DIR choose the backend, the instruction set, the number of threads, and where
Numba's compiled code and the measurements of `tune` are kept; FASTBN_TUNING=off ignores the latter.

>>> import numpy as np, fastbn
>>> x = np.random.default_rng(0).standard_normal((32, 64, 28, 28), dtype=np.float32)
>>> gamma, beta = np.ones(64, np.float32), np.zeros(64, np.float32)
>>> y, cache = fastbn.forward(x, gamma, beta, activation="relu")
>>> dx, dgamma, dbeta = fastbn.backward(np.ones_like(y), cache)
>>> dx.shape, dgamma.shape
((32, 64, 28, 28), (64,))
"""

from ._backends import backends, get_backend, get_num_threads, set_backend, use_backend
from ._moments import Moments, Sums
from ._recalibrate import recalibrate
from .call.results import Cache, Forward, Gradients
from .config import built
from .config.embed import get_include, get_library
from .config.info import __version__, show_config
from .config.thread_count import set_num_threads, use_num_threads
from .inference import FoldWarning, InferencePlan, fold
from .layer import BatchNorm
from .ops import backward, backward_sums, forward, infer, moments

built.require()

__all__ = [
    "BatchNorm",
    "Cache",
    "FoldWarning",
    "Forward",
    "Gradients",
    "InferencePlan",
    "Moments",
    "Sums",
    "__version__",
    "backends",
    "backward",
    "backward_sums",
    "fold",
    "forward",
    "get_backend",
    "get_include",
    "get_library",
    "get_num_threads",
    "infer",
    "moments",
    "recalibrate",
    "set_backend",
    "set_num_threads",
    "show_config",
    "test",
    "tune",
    "use_backend",
    "use_num_threads",
]

for _public in (BatchNorm, Cache, FoldWarning, Forward, Gradients, InferencePlan, Moments, Sums):
    _public.__module__ = __name__  # the module that pickles name, wherever the class is defined


def test() -> bool:
    """Tests the installed fastbn on this machine, with NumPy alone, and prints what it finds.

    Takes a few seconds, and about ten more the first time if Numba is installed, since it compiles.

    For each backend: are y, the gradients and the running statistics within what fastbn promises of the formulas in
    long double, and do the bits not depend on the number of threads? For the C backend: do the instruction sets that
    run here give the same bits, except for the baseline, and are the header and the library for compilers there? Then
    parts of batches, layers, plans and the refusal of bad input. While the instruction sets take turns, calls in other
    threads use them, too.

    Returns
    -------
    bool
        Whether all is well. A check that fails prints FAILED and why; the others go on.

    >>> import fastbn
    >>> fastbn.test()  # doctest: +ELLIPSIS
    fastbn ...
      ...
    all ... checks passed in ... s
    True
    """
    from . import _smoke

    return _smoke.run()


def tune(*, quick: bool = False, keep: bool = True) -> dict[str, int]:
    """Measures how this machine's memory is used best by the C backend, and keeps it for other processes of this user.

    Habits are how many streams are read in turns, the bytes of a turn, how far ahead rows are fetched, from what size
    on results are written around the cache, and the bytes that stay in a core's cache: see `fbn_habits` in fastbn.h.
    fastbn knows those of some processors. A habit is only changed where that gains more than 3 % in medians of calls
    that take turns, on arrays that are larger than the caches and on smaller ones. No bit of any result depends on it.

    It takes less than a minute and 0.3 to 0.7 GB, shows a progress bar if rich is installed (pip install
    "fastbn[bench]"), and prints what is gained. Run it while the machine is otherwise idle, with the number of threads
    that you use (see `use_num_threads`). The measurements are for this processor, instruction set and version of
    fastbn, in the folder "habits" of FASTBN_CACHE_DIR or of the user's cache folder. This process uses them at once,
    and others from their start, unless FASTBN_TUNING is "off".

    Parameters
    ----------
    quick : bool
        For tests: two seconds on small arrays, which tells little.
    keep : bool
        Whether the measurements are kept. If not, only this process uses them.

    Returns
    -------
    dict[str, int]
        The habits that were found. 0 stands for the default.

    Raises OSError, before anything is measured, if the folder cannot be written, and ImportError if the C backend is
    not built.

    >>> import fastbn
    >>> habits = fastbn.tune(quick=True, keep=False)  # doctest: +ELLIPSIS
    Habits of this machine...
      habit ...
    >>> sorted(habits)
    ['ahead', 'block', 'row_streams', 'stream_from', 'streams', 'turn']
    """
    from . import _tune

    return _tune.run(quick=quick, kept=keep)


def __dir__() -> list[str]:
    """The public names, without the modules that define them."""
    return sorted(__all__)
