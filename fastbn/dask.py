"""How are Dask arrays, larger than memory, normalized? Moments by a tree of blocks, and inference block by block.

One thread computes a block, since Dask computes several blocks at a time; each block is in memory only while it is
computed. The backend is that of the moment at which a function here is called (fastbn.get_backend()), whichever thread,
process or machine then computes.
"""

import math
from typing import Any

import numpy as np

from . import ops
from ._backends import get_backend
from ._moments import Moments
from .call import checks
from .call.checks import _refuse
from .call.dtypes import DType, native
from .call.shape import positions_of
from .config.thread_count import use_num_threads
from .ops import Activation

try:
    import dask.array as da
    from dask.delayed import Delayed, delayed
except ImportError as error:
    raise ImportError('fastbn.dask needs dask: pip install "fastbn[dask]"') from error

Array = np.ndarray

__all__ = ["infer", "moments"]


def __dir__() -> list[str]:
    return sorted(__all__)


def moments(array: da.Array, *, axis: int = 1, mask: da.Array | np.ndarray | None = None) -> Delayed:
    """The Moments of all values of a Dask array, per channel: an object that computes to what fastbn.moments gives.

    The moments of the blocks are merged by a tree (Chan, Golub & LeVeque 1983), whose shape depends only on how many
    blocks there are along each axis. One division into blocks therefore gives the same bits on every call, with every
    scheduler and any number of workers; another division gives results within the bounds of fastbn.moments.

    Parameters
    ----------
    array : dask array of float16, bfloat16, float32 or float64, at least 2-D
        It may be cut along any axis, that of the channels as well. Chunks may be empty, and their sizes unknown.
    axis : int
        The channel axis.
    mask : array of bool, of Dask or NumPy, that broadcasts to array's shape without the channel axis, or None
        Only positions where it is True count. Its chunks may differ from array's. Where chunk sizes are unknown, the
        mask must have as many chunks as array along that axis, and of the same sizes.

    Returns
    -------
    dask.delayed.Delayed
        Its compute() gives fastbn.Moments in the statistics dtype: float64 for float64, else float32. The count is 0 if
        no value counts.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed. What is only known of a block once it is
        computed raises in compute(): a mask of another size, or another dtype than the array claims to have.

    >>> import dask.array, numpy as np, fastbn.dask
    >>> x = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 30.0]])
    >>> x = dask.array.from_array(x, chunks=(2, 1))
    >>> fastbn.dask.moments(x).compute()
    Moments(count=3, mean=[ 3., 20.], m2=[ 14., 200.])
    """
    at = _channel_axis(array, axis)
    masked, exact = _mask_and_axes(mask, array, at)
    parts = _by_block(
        _moments_of,
        array,
        [masked],
        np.dtype(np.object_),
        token="fastbn-moments",
        adjust_chunks=dict.fromkeys(range(array.ndim), 1),
        channel_axis=at,
        exact=exact,
    )
    others = positions_of(tuple(range(array.ndim)), at)
    merged = da.reduction(
        parts,
        chunk=_merged,
        aggregate=_merged,
        axis=others,
        keepdims=True,
        dtype=object,
        split_every=dict.fromkeys(others, FAN_IN),
        meta=np.empty((0,) * array.ndim, object),
    )
    return delayed(_side_by_side, pure=True)(merged.to_delayed().ravel().tolist())


def infer(
    array: da.Array,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: Activation = None,
    residual: da.Array | np.ndarray | None = None,
) -> da.Array:
    """Batch normalization of a Dask array with given statistics, block by block, when the result is computed.

    y = activation((array - running_mean) / sqrt(running_var + eps) * gamma + beta + residual): Ioffe & Szegedy 2015,
    algorithm 2. To normalize with the statistics of the array itself, compute its `moments` first, and pass
    m.mean + m.mean_low, which is in float64 and exact at any offset, and m.var(). They are not taken unless they are
    computed: Dask would otherwise keep every block in memory until the last is counted.

    Parameters
    ----------
    array : dask array of float16, bfloat16, float32 or float64, at least 2-D
        It may be cut along any axis; chunk sizes may be unknown, though along the channel axis only if it is not cut.
    gamma, beta : NumPy arrays of shape (C,), any float dtype, or None
        Scale and shift; None means ones and zeros.
    running_mean, running_var : NumPy arrays of shape (C,), each float16, bfloat16, float32 or float64
        These four are copied.
    eps : float, finite and >= 0
    axis : int
        The channel axis.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
    residual : array of Dask or NumPy, of array's shape and dtype, or None
        Its chunks may differ from array's; where chunk sizes are unknown, as for the mask of `moments`.

    Returns
    -------
    dask array
        Of array's shape, dtype (in native byte order) and chunks.

    Raises
    ------
    TypeError, ValueError
        As `moments` does.

    >>> import dask.array, numpy as np, fastbn.dask
    >>> x = dask.array.from_array(np.array([[1.0, 10.0], [3.0, 30.0]]), chunks=1)
    >>> m = fastbn.dask.moments(x).compute()
    >>> fastbn.dask.infer(x, None, None, m.mean + m.mean_low, m.var(), eps=0.0).compute()
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    at = _channel_axis(array, axis)
    chunks = _channel_chunks(array, at, running_mean, running_var)
    given = [checks.parameter(name, p, sum(chunks)) for name, p in (("gamma", gamma), ("beta", beta))]
    given += checks.running(running_mean, running_var, sum(chunks), written=False)
    parameters = [None if p is None else da.from_array(np.array(p), chunks=(chunks,)) for p in given]
    added = None if residual is None else _residual(residual, array)
    checks.activation(activation)
    return _by_block(
        _inferred,
        array,
        [(added, tuple(range(array.ndim))), *((p, (at,)) for p in parameters)],
        native(array.dtype),
        token="fastbn-infer",
        channel_axis=at,
        eps=checks.eps(eps),
        activation=activation,
    )


# What is asked, before anything is computed ---------------------------------------------------------------------------

Operand = tuple[Any, tuple[int, ...]]
"""A Dask array, or None, and the axes of `array` that its own axes are."""


def _by_block(function: Any, array: da.Array, others: list[Operand], result: DType, **options: Any) -> da.Array:
    """Applies a function to each block of an array, with the blocks of the others that are at the same place."""
    operands = [(array, tuple(range(array.ndim))), *others]
    return da.blockwise(
        function,
        tuple(range(array.ndim)),
        *(part for other, axes in operands for part in (other, None if other is None else axes)),
        declared=array.dtype.name,
        backend=get_backend(),
        align_arrays=False,
        dtype=result,
        meta=np.empty((0,) * array.ndim, result),
        **options,
    )


def _channel_axis(array: object, axis: object) -> int:
    """Checks the array; returns its channel axis, counted from 0."""
    if not isinstance(array, da.Array):
        allowed = "a Dask array, such as dask.array.from_array makes of an array of NumPy, zarr or h5py"
        _refuse(TypeError, "array", checks.qualified(type(array)), allowed)
    checks.dtype("array", array.dtype)
    return checks.axis(axis, array, "array")


def _is_unknown(sizes: tuple[float, ...]) -> bool:
    return any(map(math.isnan, sizes))


def _lazy(name: str, value: object) -> da.Array:
    """A Dask array of a Dask or NumPy array."""
    return value if isinstance(value, da.Array) else da.from_array(checks._array(name, value), chunks=-1)


def _cut_alike(name: str, other: da.Array, array: da.Array, axes: dict[int, int]) -> da.Array:
    """Cuts `other` as `array` is cut, along the axes of `other` that are keys; the values are the axes of `array`."""
    chunks = {}
    for own, axis in axes.items():
        found, wanted = other.chunks[own], array.chunks[axis]
        if not _is_unknown(found + wanted):
            chunks[own] = wanted
        elif len(found) != len(wanted):
            given = f"{len(found)} chunks along axis {own}, where sizes are unknown"
            allowed = (
                f"{len(wanted)} chunks, as array has along its axis {axis} (or see compute_chunk_sizes of dask.array)"
            )
            _refuse(ValueError, name, given, allowed)
    return other.rechunk(chunks)


def _differs(size: float, wanted: float) -> bool:
    """Whether two sizes, which may be unknown, differ for certain."""
    return size != wanted and not _is_unknown((size, wanted))


def _mask_and_axes(value: object, array: da.Array, at: int) -> tuple[Operand, tuple[int, ...]]:
    """The mask and its axes; and those of its axes, counted from the end, that are not there to be broadcast."""
    if value is None:
        return (None, ()), ()
    mask = _lazy("mask", value)
    if mask.dtype != np.bool_:
        _refuse(TypeError, "mask", f"dtype {mask.dtype}", "bool, or None")
    positions = positions_of(array.shape, at)
    axes = positions_of(tuple(range(array.ndim)), at)[len(positions) - mask.ndim :]
    exact = [i for i, size in enumerate(mask.shape) if size != 1]
    if mask.ndim > len(positions) or any(_differs(mask.shape[i], array.shape[axes[i]]) for i in exact):
        allowed = f"one that broadcasts to {positions}, array's shape {array.shape} without its channel axis"
        _refuse(ValueError, "mask", f"shape {mask.shape}", allowed)
    mask = mask.rechunk({i: -1 for i in range(mask.ndim) if i not in exact})
    mask = _cut_alike("mask", mask, array, {i: axes[i] for i in exact})
    return (mask, axes), tuple(i - mask.ndim for i in exact)


def _residual(value: object, array: da.Array) -> da.Array:
    """The residual, cut as the array is."""
    residual = _lazy("residual", value)
    if native(residual.dtype) != native(array.dtype):
        _refuse(TypeError, "residual", f"dtype {residual.dtype}", f"array's dtype {array.dtype}")
    if residual.ndim != array.ndim or any(map(_differs, residual.shape, array.shape)):
        _refuse(ValueError, "residual", f"shape {residual.shape}", f"array's shape {array.shape}")
    return _cut_alike("residual", residual, array, {i: i for i in range(array.ndim)})


def _channel_chunks(array: da.Array, at: int, mean: object, var: object) -> tuple[int, ...]:
    """How the channels are cut; the statistics say how many there are where the array does not."""
    checks.both_statistics(mean, var)
    chunks: tuple[int, ...] = array.chunks[at]
    if not _is_unknown(chunks):
        return chunks
    if len(chunks) > 1:
        given = f"{len(chunks)} chunks along the channel axis, where sizes are unknown"
        _refuse(ValueError, "array", given, "1 chunk along it, or known sizes (see compute_chunk_sizes of dask.array)")
    return (checks.given_statistics(mean, var)[0].size,)


# What a task computes -------------------------------------------------------------------------------------------------

FAN_IN = 8
"""How many neighbours along each axis a task merges at a time."""


def _check_block(block: Array, declared: str) -> None:
    """Checks that a block is what its array claims to consist of, of which nobody has made sure."""
    if not isinstance(block, np.ndarray) or isinstance(block, np.ma.MaskedArray) or block.dtype.name != declared:
        dtype = getattr(block, "dtype", "none")
        given = f"a block that is a {checks.qualified(type(block))} of dtype {dtype}"
        _refuse(TypeError, "array", given, f"blocks that are NumPy arrays of array's dtype, {declared}")


def _moments_of(
    block: Array, mask: Array | None, *, channel_axis: int, exact: tuple[int, ...], declared: str, backend: str
) -> Array:
    """The moments of a block, as an array of one element for each axis."""
    _check_block(block, declared)
    if mask is not None:
        positions = positions_of(block.shape, channel_axis)
        if any(mask.shape[i] != positions[i] for i in exact):
            given = f"a block of shape {mask.shape} beside array's of shape {block.shape}"
            _refuse(ValueError, "mask", given, f"one of shape {positions}")
    found = np.empty((1,) * block.ndim, object)
    with use_num_threads(1):
        found[...] = ops.moments(block, axis=channel_axis, mask=mask, backend=backend)
    return found


def _merged(parts: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """An array of moments, merged in C order along all axes but one; the others keep a length of 1."""
    (kept,) = set(range(parts.ndim)).difference(axis)
    rows = np.moveaxis(parts, kept, 0).reshape(parts.shape[kept], -1)
    merged = np.empty(len(rows), object)
    merged[:] = [sum(row) for row in rows]
    return merged.reshape([-1 if i == kept else 1 for i in range(parts.ndim)])


def _side_by_side(ranges: list[Array]) -> Moments:
    """The moments of all channels, from arrays of one element that have those of a range of channels."""
    parts: list[Moments] = [moments.item() for moments in ranges]
    counts = [part.count for part in parts]
    if len(set(counts)) > 1:
        given = f"blocks with {counts} values per channel, for one range of channels after the other"
        _refuse(ValueError, "array", given, "blocks of the sizes that its chunks say")
    return Moments._of(counts[0], np.concatenate([part._rows for part in parts], axis=1), parts[0].dtype)


def _inferred(
    block: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    *,
    channel_axis: int,
    eps: float,
    activation: Activation,
    declared: str,
    backend: str,
) -> Array:
    """A block, normalized."""
    _check_block(block, declared)
    with use_num_threads(1):
        return ops.infer(
            block,
            gamma,
            beta,
            mean,
            var,
            eps=eps,
            axis=channel_axis,
            activation=activation,
            residual=residual,
            backend=backend,
        )
