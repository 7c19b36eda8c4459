"""How is one batch normalized whose parts several MPI ranks have? Over an mpi4py communicator, as if by one process.

All ranks of the communicator must make the same calls in the same order, each with its share of the batch. Shares may
have any sizes, and some may be empty. Statistics and gradients are those of the whole batch within the bounds that
`fastbn.forward` documents, with the same bits on every rank and on every run, for one division into shares.

A call in training gathers one message from each rank, and so does a backward pass: 3 float64 values per channel
forward and 2 backward, and the message's size and header. An error on one rank, such as that of a bad argument, is its
message, and all ranks raise. Only a bad communicator cannot be told to the others, which would wait.
"""

import copy
from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np

from ._backends import select, threads_of
from ._ranks import Exchange
from .call import batch, check_parts, checks
from .call.record import Call, Options, check
from .call.results import Cache, Forward, Gradients, parts_of
from .layer import BatchNorm as _BatchNorm
from .ops import Activation
from .ops import forward as _local_forward

try:
    from mpi4py import MPI
    from mpi4py.MPI import Intracomm
except (ImportError, RuntimeError) as error:  # a RuntimeError if there is mpi4py but no MPI
    raise ImportError(
        'fastbn.mpi needs mpi4py and an MPI: pip install "fastbn[mpi]", and mpich if there is no MPI'
    ) from error

Array = np.ndarray
Given = ParamSpec("Given")
Result = TypeVar("Result")

__all__ = ["BatchNorm", "backward", "forward"]


def __dir__() -> list[str]:
    return sorted(__all__)


def _checked(comm: object) -> Intracomm:
    found = checks.instance("comm", comm, Intracomm, "an mpi4py.MPI.Intracomm, such as MPI.COMM_WORLD")
    if found == MPI.COMM_NULL:
        raise ValueError("comm: got MPI.COMM_NULL; allowed: a communicator that this process belongs to")
    return found


def _exchange(comm: Intracomm, call: str) -> Exchange:
    """An exchange of messages of any sizes: first the sizes, then the bytes."""

    def gather(message: Array) -> list[Array]:
        sizes = np.empty(comm.size, np.int64)
        comm.Allgather(np.array([message.size], np.int64), sizes)
        messages = np.empty(sizes.sum(), np.uint8)
        comm.Allgatherv(message, (messages, sizes))
        return np.split(messages, np.cumsum(sizes)[:-1])

    return Exchange(gather, call)


def _evaluates(training: object) -> bool:
    return isinstance(training, bool | np.bool_) and not training


def _tells(
    call: str, comm_of: Callable[[Any, Any], object]
) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Has a function tell the other ranks of arguments that it does not have, or lacks: Python raises before its body.

    comm_of(args, kwargs) is the communicator, or None if the call would communicate nothing.
    """

    def telling(function: Callable[Given, Result]) -> Callable[Given, Result]:
        arguments = signature(function)

        @wraps(function)
        def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            try:
                arguments.bind(*args, **kwargs)
            except TypeError as error:
                refused, comm = TypeError(f"{function.__qualname__}() {error}"), comm_of(args, kwargs)
                if comm is None:
                    raise refused from None
                with _exchange(_checked(comm), call):
                    raise refused from None
            return function(*args, **kwargs)

        return called

    return telling


@_tells("forward", lambda _, kwargs: None if _evaluates(kwargs.get("training")) else kwargs.get("comm"))
def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    comm: Intracomm,
    training: bool = True,
    momentum: float = 0.1,
    correction: int = 1,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Array | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Forward:
    """Batch normalization of this rank's share of a batch with the statistics of all shares: Ioffe & Szegedy 2015.

    The arguments are those of `fastbn.forward`, for this rank's share; a mask may leave nothing of it. With
    training=False nothing is communicated, so that a rank may call it alone.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        All its ranks make this call. gamma, beta and running statistics should have the same values on all of them;
        the running statistics are then updated to the same bits.

    Returns
    -------
    Forward
        (y, cache), for this rank's share. The cache is for `fastbn.mpi.backward`.

    Raises
    ------
    TypeError, ValueError, ...
        The errors of `fastbn.forward`, on all ranks; those of another rank say its number. ValueError or TypeError also
        if ranks differ in the number of channels, the statistics dtype, eps, momentum or correction, and RuntimeError
        if they are in different calls. Nothing has been changed then.

    >>> import numpy as np, fastbn.mpi
    >>> from mpi4py import MPI
    >>> x = np.array([[1.0], [3.0]]) + 4 * MPI.COMM_WORLD.rank
    >>> y, cache = fastbn.mpi.forward(x, comm=MPI.COMM_WORLD, eps=0.0)
    >>> cache.count == 2 * MPI.COMM_WORLD.size
    True
    """
    options: dict[str, Any] = {
        "training": training,
        "momentum": momentum,
        "correction": correction,
        "eps": eps,
        "axis": axis,
        "mask": mask,
        "activation": activation,
        "residual": residual,
        "out": out,
        "backend": backend,
    }
    ranks = _checked(comm)
    if _evaluates(training):
        return _local_forward(x, gamma, beta, running_mean, running_var, **options)
    with _exchange(ranks, "forward") as exchange:
        return _train(exchange, x, gamma, beta, running_mean, running_var, **options)


def _train(
    exchange: Exchange,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    *,
    training: bool,
    backend: str | None,
    virtual_batch_size: None = None,
    **options: Any,
) -> Forward:
    """A call in training, in a block of the exchange. Only layers pass virtual_batch_size, as None."""
    checks.flag("training", training)
    chosen = select(backend)
    asked = Options(options.pop("activation"))
    call = Call(x, gamma, beta, running_mean, running_var, **options, options=asked, threads=threads_of(chosen))
    call = check(call, updates=True, keeps=True)
    own = batch.moments(Call(call.x, axis=call.axis, mask=call.mask, threads=call.threads), chosen)
    agreed = {"eps": call.eps, "momentum": call.momentum, "correction": call.correction}
    moments = exchange.total(own, agreed)
    check_parts.enough_together("x", moments.count)
    parts = batch.train(call, moments, chosen)
    call.put_running_back()
    return Forward(call.out, Cache(parts))


@_tells("backward", lambda _, kwargs: kwargs.get("comm"))
def backward(
    dy: Array, cache: Cache, *, comm: Intracomm, out: Array | None = None, backend: str | None = None
) -> Gradients:
    """The exact gradient of the `fastbn.mpi.forward` call that made `cache`, with respect to the sum of all losses.

    dx and dresidual are for this rank's share, and include the effect of x on the results of other ranks. dgamma and
    dbeta are those of the whole batch, on every rank. All ranks communicate, also with a cache of frozen statistics.

    Parameters
    ----------
    dy, cache, out, backend
        As in `fastbn.backward`, for this rank's share.
    comm : mpi4py.MPI.Intracomm
        That of the forward call.

    Raises
    ------
    TypeError, ValueError, ...
        The errors of `fastbn.backward`, on all ranks; ValueError also if the caches are not those of one forward call.

    >>> import numpy as np, fastbn.mpi
    >>> from mpi4py import MPI
    >>> x, beta = np.array([[1.0], [3.0]]), np.zeros(1)
    >>> y, cache = fastbn.mpi.forward(x, None, beta, comm=MPI.COMM_WORLD)
    >>> dx, dgamma, dbeta = fastbn.mpi.backward(np.ones((2, 1)), cache, comm=MPI.COMM_WORLD)
    >>> bool(dbeta[0] == 2 * MPI.COMM_WORLD.size)
    True
    """
    with _exchange(_checked(comm), "backward") as exchange:
        return _differentiate(exchange, dy, cache, out=out, backend=backend)


def _differentiate(exchange: Exchange, dy: Array, cache: Cache, *, out: Array | None, backend: str | None) -> Gradients:
    chosen = select(backend)
    parts = parts_of(cache)
    check_parts.whole("cache", parts.virtual)
    call = batch.check_backward(dy, parts, out, threads_of(chosen))
    own = batch.backward_sums(dy, parts, chosen, call.threads)
    count = 0 if parts.frozen else parts.total
    sums = exchange.total(own, {"the cache's training": not parts.frozen, "the cache's count": count})
    check_parts.all_of(sums, count)
    dgamma, dbeta = batch.backward(call, parts, chosen, sums)
    return Gradients(call.out, dgamma, dbeta, call.residual_gradient)


class BatchNorm(_BatchNorm):
    """fastbn.BatchNorm whose batch statistics are those of all ranks of a communicator.

    Each rank has a layer and calls it with its share of the batch. The layers should start with the same parameters;
    then all have the same running statistics, `gradients()` and, after equal steps of an optimizer, parameters. The
    gradients of weight and bias are those of the whole batch: they must not be added up over the ranks once more.

    After `eval()`, a call communicates nothing, unless the layer has no running statistics; `backward` always does.
    Copies share the communicator; mpi4py says which communicators can be pickled.

    Parameters
    ----------
    num_features, eps, momentum, correction, affine, track_running_stats, axis, activation, dtype, backend
        As fastbn.BatchNorm's.
    comm : mpi4py.MPI.Intracomm
    virtual_batch_size : None
        There are no virtual batches, since all ranks share their statistics.

    Raises
    ------
    TypeError, ValueError, ...
        The errors of fastbn.BatchNorm, `fastbn.mpi.forward` and `fastbn.mpi.backward`, on all ranks.

    >>> import numpy as np, fastbn.mpi
    >>> from mpi4py import MPI
    >>> bn = fastbn.mpi.BatchNorm(3, comm=MPI.COMM_WORLD)
    >>> y = bn(np.random.default_rng(MPI.COMM_WORLD.rank).standard_normal((8, 3), np.float32))
    >>> dx = bn.backward(np.ones_like(y))
    >>> bool(bn.gradients()["bias"][0] == 8 * MPI.COMM_WORLD.size)
    True
    """

    comm: Intracomm

    def __init__(
        self,
        num_features: int,
        *,
        comm: Intracomm,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        correction: int = 1,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int = 1,
        activation: Activation = None,
        dtype: str | type | np.dtype = "float32",
        backend: str | None = None,
        virtual_batch_size: None = None,
    ) -> None:
        self.comm = comm
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            correction=correction,
            affine=affine,
            track_running_stats=track_running_stats,
            axis=axis,
            activation=activation,
            dtype=dtype,
            backend=backend,
            virtual_batch_size=virtual_batch_size,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "comm":
            value = _checked(value)
        elif name == "virtual_batch_size" and value is not None:
            raise ValueError(
                f"virtual_batch_size: got {checks.shown(value)}; allowed: None, since all ranks share their statistics"
            )
        super().__setattr__(name, value)

    def _is_alone(self) -> bool:
        """Whether a call communicates nothing."""
        return not self.training and self.track_running_stats

    @_tells("forward", lambda args, _: args[0].comm if args and not args[0]._is_alone() else None)
    def __call__(
        self, x: Array, *, residual: Array | None = None, out: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Normalizes this rank's share x; the arguments are as in fastbn.BatchNorm's call."""
        if self._is_alone():
            return super().__call__(x, residual=residual, out=out, mask=mask)
        with _exchange(self.comm, "forward") as exchange:
            return self._normalize(partial(_train, exchange), x, residual, out, mask)

    @_tells("backward", lambda args, _: args[0].comm if args else None)
    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """Returns dx of the last call and sets `gradients()`, as in fastbn.BatchNorm, on all ranks together."""
        with _exchange(self.comm, "backward") as exchange:
            return self._differentiate(partial(_differentiate, exchange), dy, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with arrays of its own and the same communicator, of which mpi4py copies only some."""
        memo[id(self.comm)] = self.comm
        copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __repr__(self) -> str:
        return f"fastbn.mpi.{super().__repr__()}"
