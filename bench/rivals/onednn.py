"""oneDNN through its C library, in plain layouts and in the blocked layout that it prefers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

import fastbn
from fastbn._backends import select

from ..problem import EPS, Array, Contestant, Problem
from .dnnl_library import RUNTIMES, few_processors, library

# The constants of dnnl_types.h, version 3.
CPU, IN_ORDER = 1, 1
DATA_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT = 1, 2, 4
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT = 1, 17, 49, 50, 51, 52
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256
BLOCKED_TAGS = {
    16: {3: 56, 4: 78, 5: 121},  # nCw16c, nChw16c, nCdhw16c, by the number of dimensions
    8: {3: 69, 4: 102, 5: 142},  # nCw8c, nChw8c, nCdhw8c
}
MOST_DIMS = 12

ALIGNMENT = 64

Dims = ctypes.c_int64 * MOST_DIMS


class _Version(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("patch", ctypes.c_int),
        ("hash", ctypes.c_char_p),
        ("cpu_runtime", ctypes.c_uint),
    )


class _Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int), ("memory", ctypes.c_void_p))


def _aligned(size: int, dtype: np.dtype[Any]) -> Array:
    """Zeros with the alignment of oneDNN's own allocations."""
    raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


class _Plain:
    """The problem's arrays themselves, in their plain layout."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def describe(self, api: _Api) -> ctypes.c_void_p:
        seen = self._problem.channels_first(self._problem.x)
        strides = [stride // seen.itemsize for stride in seen.strides]
        kind = DATA_TYPES[self._problem.dtype]
        return api.create("dnnl_memory_desc_create_with_strides", seen.ndim, Dims(*seen.shape), kind, Dims(*strides))

    def source(self, array: Array) -> Array:
        return array

    def target(self) -> Array:
        return self._problem.out

    def read(self, array: Array) -> Array:
        return self._problem.channels_first(array)


def _block() -> int:
    """The channels of a block for which oneDNN has fast loops on this processor: one vector of AVX-512 or AVX2."""
    usable = getattr(select("c"), "isas", tuple)() if "c" in fastbn.backends() else ()
    return 16 if "avx512" in usable else 8


class _Blocked:
    """Copies of the arrays in blocks of adjacent channels, of which the last block is padded with zeros."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        n, c, *spatial = problem.shape
        block = _block()
        self._tags, self._blocks = BLOCKED_TAGS[block], -(-c // block)
        self._seen = (n, self._blocks, block, int(np.prod(spatial)))

    def describe(self, api: _Api) -> ctypes.c_void_p:
        shape, kind = self._problem.shape, DATA_TYPES[self._problem.dtype]
        return api.create("dnnl_memory_desc_create_with_tag", len(shape), Dims(*shape), kind, self._tags[len(shape)])

    def target(self) -> Array:
        return _aligned(int(np.prod(self._seen)), self._problem.x.dtype)

    def source(self, array: Array) -> Array:
        n, blocks, block, inner = self._seen
        padded = np.zeros((n, blocks * block, inner), array.dtype)
        padded[:, : self._problem.channels] = array.reshape(n, -1, inner)
        blocked = self.target()
        blocked.reshape(n, blocks, inner, block)[...] = padded.reshape(self._seen).swapaxes(2, 3)
        return blocked

    def read(self, array: Array) -> Array:
        n, blocks, block, inner = self._seen
        plain = array.reshape(n, blocks, inner, block).swapaxes(2, 3).reshape(n, blocks * block, inner)
        return plain[:, : self._problem.channels].reshape(self._problem.shape)


class _Api:
    """The C functions that create handles. A status other than 0 raises NotImplementedError.

    Handles are not freed before the process ends; that is a few kilobytes per race.
    """

    def __init__(self) -> None:
        self.library, source = library()
        self.library.dnnl_version.restype = ctypes.POINTER(_Version)
        v = self.library.dnnl_version().contents
        if v.major != 3:
            raise ImportError(f"libdnnl.so: got version {v.major}.{v.minor}.{v.patch}; allowed: 3")
        self.runtime = RUNTIMES.get(v.cpu_runtime, f"runtime {v.cpu_runtime}")
        self.version = f"{v.major}.{v.minor}.{v.patch} ({self.runtime}, {source})"
        self.threads = 0

    def start(self, threads: int) -> None:
        """Uses this number of threads from now on; where the runtime has its own, only the first number counts."""
        if self.runtime == "OpenMP":
            self.library.omp_set_num_threads(threads)  # found in the OpenMP runtime that the library depends on
        if self.threads == 0 or self.runtime == "OpenMP":
            self.threads = threads if self.runtime != "sequential" else 1
        if not hasattr(self, "engine"):
            with few_processors(self.threads):
                self.engine = self.create("dnnl_engine_create", CPU, ctypes.c_size_t(0))
                self.stream = self.create("dnnl_stream_create", self.engine, IN_ORDER)

    def create(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        status = getattr(self.library, function)(ctypes.byref(handle), *arguments)
        if status != 0:
            raise NotImplementedError(f"{function}: status {status}")
        return handle

    def vector(self, channels: int) -> ctypes.c_void_p:
        """The description of a float32 vector."""
        kind = DATA_TYPES["float32"]
        return self.create("dnnl_memory_desc_create_with_strides", 1, Dims(channels), kind, Dims(1))

    def memory(self, description: ctypes.c_void_p, array: Array) -> ctypes.c_void_p:
        return self.create("dnnl_memory_create", description, self.engine, ctypes.c_void_p(array.ctypes.data))


class Rival:
    """dnnl_batch_normalization_forward and _backward, on memory that is bound before the race."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._api = _Api()
        self.version = self._api.version
        self._threads = 1
        if self._api.runtime not in ("OpenMP", "sequential"):
            self.notes = (f"oneDNN: {self._api.runtime} keeps the first number of threads; others are not timed",)

    def set_threads(self, threads: int) -> None:
        self._threads = threads
        self._api.start(threads)

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        if problem.dtype not in DATA_TYPES or self._api.threads != self._threads:
            return []
        contestants = [self._contestant("oneDNN", _Plain(problem), problem, pass_)]
        if problem.layout == "nchw" and len(problem.shape) in BLOCKED_TAGS[16]:
            contestants.append(self._contestant("oneDNN blocked", _Blocked(problem), problem, pass_))
        return contestants

    def _primitive(self, description: ctypes.c_void_p, pass_: str) -> ctypes.c_void_p:
        create, eps, training = self._api.create, ctypes.c_float(EPS), pass_ != "infer"
        kind = FORWARD_TRAINING if training else FORWARD_INFERENCE
        flags = USE_SCALE | USE_SHIFT | (0 if training else USE_GLOBAL_STATS)
        forward_name = "dnnl_batch_normalization_forward_primitive_desc_create"
        chosen = create(forward_name, self._api.engine, kind, description, description, eps, flags, None)
        if pass_ == "backward":
            backward_name = "dnnl_batch_normalization_backward_primitive_desc_create"
            same = (description,) * 3
            chosen = create(backward_name, self._api.engine, BACKWARD, *same, eps, flags, chosen, None)
        return create("dnnl_primitive_create", chosen)

    def _contestant(self, name: str, layout: _Plain | _Blocked, problem: Problem, pass_: str) -> Contestant:
        mean, var = problem.batch if pass_ == "backward" else problem.running()
        vectors: dict[int, Array] = {MEAN: mean, VARIANCE: var, SCALE: problem.gamma}
        arrays: dict[int, Array] = {SRC: layout.source(problem.x)}
        if pass_ == "backward":
            arrays |= {DIFF_DST: layout.source(problem.dy), DIFF_SRC: layout.target()}
            vectors |= {DIFF_SCALE: np.empty_like(mean), DIFF_SHIFT: np.empty_like(mean)}
            answer, sums = DIFF_SRC, [DIFF_SCALE, DIFF_SHIFT]
        else:
            arrays[DST] = layout.target()
            vectors[SHIFT] = problem.beta
            answer, sums = DST, []
        description, vector = layout.describe(self._api), self._api.vector(problem.channels)
        bound = [(i, self._api.memory(description, a)) for i, a in arrays.items()]
        bound += [(i, self._api.memory(vector, a)) for i, a in vectors.items()]
        call = self._execution(self._primitive(description, pass_), bound)

        def results(_: Any) -> tuple[Array, ...]:  # it also keeps the arrays alive: oneDNN has only their addresses
            return layout.read(arrays[answer]), *(vectors[i] for i in sums)

        return Contestant(name=name, call=call, results=results)

    def _execution(self, primitive: ctypes.c_void_p, bound: Iterable[tuple[int, ctypes.c_void_p]]) -> Callable[[], Any]:
        pairs = [_Argument(i, memory) for i, memory in bound]
        arguments = (_Argument * len(pairs))(*pairs)
        api, count = self._api, ctypes.c_int(len(pairs))
        execute = partial(api.library.dnnl_primitive_execute, primitive, api.stream, count, arguments)
        wait = partial(api.library.dnnl_stream_wait, api.stream)
        status = execute() or wait()
        if status != 0:
            raise NotImplementedError(f"dnnl_primitive_execute: status {status}")
        return execute if api.runtime in ("OpenMP", "sequential") else lambda: execute() or wait()
