# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The bridge to the C core: arrays become pointers, the GIL is released, and one C function is called."""

from cpython.contextvars cimport get_value
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.method cimport PyMethod_Check, PyMethod_GET_FUNCTION
from cpython.object cimport PyObject_GenericGetAttr
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, isfinite
from libc.stddef cimport size_t
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as cnp

from fastbn cimport cfastbn as c

import numpy as np

from fastbn.call.record import USUAL, Options

cdef extern from "values.h" nogil:
    size_t element "fbn_element"(c.fbn_dtype dtype)
    double value_at "fbn_get"(const void *array, int64_t i, c.fbn_dtype dtype)
    void put "fbn_put"(void *array, int64_t i, double value, c.fbn_dtype dtype)

cdef extern from "Python.h":
    long PyLong_AsLongAndOverflow(object value, int *overflow)

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void *dtype, int subok)

cnp.import_array()

# This machine as the library knows it, and the one on which calls that start now run. Others may be running, without
# the GIL, on one that was chosen before, so a machine that was in use is neither changed nor freed.
cdef c.fbn_machine this_machine = c.fbn_this_machine()
cdef const c.fbn_machine *machine = &this_machine

DTYPES = frozenset(("float16", "bfloat16", "float32", "float64"))
"""The names of the dtypes that data may have."""


# ---- calls: each verb, with a workspace that lasts for the call ----

# What a call starts from: every field is 0, which is absent in fastbn.h, so that only what is given need be set.
cdef c.fbn_problem NO_PROBLEM
cdef c.fbn_forward_args NO_FORWARD
cdef c.fbn_infer_args NO_INFER
cdef c.fbn_apply_args NO_APPLY
cdef c.fbn_moments_args NO_MOMENTS
cdef c.fbn_sums_args NO_SUMS
cdef c.fbn_backward_args NO_BACKWARD
cdef c.fbn_plan_args NO_PLAN
cdef c.fbn_run_args NO_RUN

cdef enum:
    SMALL = 16384  # workspaces up to this size live on the stack
    BRIEF = 2048  # the most values of a call that takes no longer than to release the GIL and to take it again
    NO_MEMORY = -1  # a status beside those of fastbn.h

ctypedef fused Map:
    c.fbn_forward_args
    c.fbn_infer_args
    c.fbn_apply_args

ctypedef fused Gradient:
    c.fbn_sums_args
    c.fbn_backward_args

ctypedef fused Arguments:
    c.fbn_forward_args
    c.fbn_infer_args
    c.fbn_apply_args
    c.fbn_moments_args
    c.fbn_sums_args
    c.fbn_backward_args


cdef int status_of(const c.fbn_problem *p, Arguments *args) noexcept nogil:
    """Runs the verb that takes these arguments. Returns its status, or NO_MEMORY.

    An invalid problem needs no bytes of workspace; the verb then says what is wrong.
    """
    cdef char small[SMALL]
    cdef size_t size = c.fbn_workspace_bytes(p)
    cdef void *workspace = small if size <= SMALL else malloc(size)
    cdef int status
    args.size = sizeof(args[0])
    if workspace == NULL:
        return NO_MEMORY
    if Arguments is c.fbn_forward_args:
        status = c.fbn_forward(p, args, workspace)
    elif Arguments is c.fbn_infer_args:
        status = c.fbn_infer(p, args, workspace)
    elif Arguments is c.fbn_apply_args:
        status = c.fbn_apply(p, args, workspace)
    elif Arguments is c.fbn_moments_args:
        status = c.fbn_moments(p, args, workspace)
    elif Arguments is c.fbn_sums_args:
        status = c.fbn_backward_sums(p, args, workspace)
    else:
        status = c.fbn_backward(p, args, workspace)
    if workspace != small:
        free(workspace)
    return status


cdef int run(const c.fbn_problem *p, Arguments *args) except -1:
    """Runs the verb that takes these arguments: without the GIL, unless the call is shorter than its release."""
    cdef int status
    if p.outer * p.channels * p.inner <= BRIEF:
        return expect(status_of(p, args))
    with nogil:
        status = status_of(p, args)
    return expect(status)


cdef inline int expect(int status) except -1:
    """Raises unless the status is FBN_OK. Arguments are checked in Python first, so a refusal here is a bug."""
    if status == NO_MEMORY:
        raise MemoryError("no memory for the workspace")
    if status != c.FBN_OK:
        raise RuntimeError(f"fastbn.h: {c.fbn_status_text(<c.fbn_status> status).decode()}")
    return 0


# ---- arrays: each array's dtype, size and memory order is checked before C gets its address ----

# NumPy's number of the dtype bfloat16, once an array of it has been seen. It is assigned when ml_dtypes is imported.
cdef int bfloat16 = -1


cdef bint set_dtype(c.fbn_problem *p, int number) noexcept:
    """Sets p.dtype from NumPy's number; False if data may not have that dtype, or `dtype_of` has not yet seen it."""
    if number == cnp.NPY_FLOAT32:
        p.dtype = c.FBN_F32
    elif number == cnp.NPY_FLOAT64:
        p.dtype = c.FBN_F64
    elif number == cnp.NPY_FLOAT16:
        p.dtype = c.FBN_F16
    elif number == bfloat16:
        p.dtype = c.FBN_BF16
    else:
        return False
    return True


cdef c.fbn_dtype dtype_of(cnp.ndarray array) except *:
    global bfloat16
    cdef c.fbn_problem p = NO_PROBLEM
    if not set_dtype(&p, cnp.PyArray_TYPE(array)):
        if array.dtype.name != "bfloat16":
            raise TypeError(f"dtype: got {array.dtype}; allowed: {', '.join(sorted(DTYPES))}")
        bfloat16 = cnp.PyArray_TYPE(array)
        return c.FBN_BF16
    return p.dtype


cdef inline int statistics_of(int dtype) noexcept:
    return cnp.NPY_FLOAT64 if dtype == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef inline bint is_ready(cnp.ndarray array, int dtype) noexcept:
    """Whether an array is C-contiguous, aligned and native, and of this dtype."""
    return cnp.PyArray_TYPE(array) == dtype and cnp.PyArray_ISCARRAY_RO(array)


cdef void *data_of(object value, int dtype, int64_t size) except? NULL:
    """The memory of an array, which must be ready and have `size` elements; NULL for None."""
    cdef cnp.ndarray array
    if value is None:
        return NULL
    array = value
    if not is_ready(array, dtype) or cnp.PyArray_SIZE(array) != size:
        raise ValueError(
            f"array: got shape {value.shape}, dtype {value.dtype}, strides {value.strides}; allowed: "
            f"{size} elements of another dtype or memory order (or some of the arrays of this call do not fit together)"
        )
    return cnp.PyArray_DATA(array)


cdef struct Sizes:
    # The dtypes (NumPy's numbers) and the numbers of elements that the arrays of a call must have.
    int data
    int statistics
    int64_t values
    int64_t positions
    int64_t channels


cdef int set_options(c.fbn_problem *p, object options) except -1:
    """Sets what the problem has of `Options` (fastbn/call/record.py) that were checked."""
    p.activation, p.slope = <c.fbn_activation> <int> options.activation, options.slope
    return 0


cdef Sizes set_problem_of(c.fbn_problem *p, object call) except *:
    """Fills the problem of a call, whose x must have three dimensions."""
    cdef Sizes sizes
    cdef cnp.ndarray x = call.x
    if x is None or cnp.PyArray_NDIM(x) != 3:
        given = "None" if x is None else f"shape {call.x.shape}"
        raise ValueError(f"x: got {given}; allowed: (outer, channels, inner)")
    p.machine = machine
    p.dtype = dtype_of(x)
    set_options(p, call.options)
    p.outer, p.channels, p.inner = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2)
    p.threads = call.threads
    sizes.data = cnp.PyArray_TYPE(x)
    sizes.statistics = statistics_of(sizes.data)
    sizes.values, sizes.positions, sizes.channels = cnp.PyArray_SIZE(x), p.outer * p.inner, p.channels
    return sizes


cdef c.fbn_dtype set_pair(cnp.ndarray first, cnp.ndarray second, Sizes sizes, void **a, void **b) except *:
    """Sets a and b to the memory of two (channels,) arrays of one dtype, or NULL for None, and returns that dtype."""
    cdef int dtype
    if first is None and second is None:
        a[0] = b[0] = NULL
        return c.FBN_F32
    dtype = cnp.PyArray_TYPE(first if first is not None else second)
    a[0], b[0] = data_of(first, dtype, sizes.channels), data_of(second, dtype, sizes.channels)
    return dtype_of(first if first is not None else second)


cdef double *rows_of(cnp.ndarray rows, int count, Sizes sizes) except? NULL:
    if rows is not None and (cnp.PyArray_NDIM(rows) != 2 or cnp.PyArray_DIM(rows, 0) != count):
        raise ValueError(f"rows: got shape {(<object> rows).shape}; allowed: ({count}, channels)")
    return <double *> data_of(rows, cnp.NPY_FLOAT64, count * sizes.channels)


# ---- the protocol of fastbn._backends ----


cdef Sizes take_map(c.fbn_problem *p, Map *a, object call) except *:
    """Fills what all verbs that fill y have in common."""
    cdef Sizes sizes = set_problem_of(p, call)
    a.x, a.residual = data_of(call.x, sizes.data, sizes.values), data_of(call.residual, sizes.data, sizes.values)
    a.parameters.dtype = set_pair(
        call.gamma, call.beta, sizes, <void **> &a.parameters.gamma, <void **> &a.parameters.beta
    )
    a.eps = call.eps
    a.y, a.saved = data_of(call.y, sizes.data, sizes.values), rows_of(call.saved, c.FBN_SAVED_ROWS, sizes)
    return sizes


cdef Sizes take_gradient(c.fbn_problem *p, Gradient *a, object call) except *:
    """Fills what a gradient and its sums have in common."""
    cdef Sizes sizes = set_problem_of(p, call)
    a.dy, a.x = data_of(call.dy, sizes.data, sizes.values), data_of(call.x, sizes.data, sizes.values)
    a.residual = data_of(call.residual, sizes.data, sizes.values)
    a.mask = <unsigned char *> data_of(call.mask, cnp.NPY_BOOL, sizes.positions)
    a.saved, a.sums = rows_of(call.saved, c.FBN_SAVED_ROWS, sizes), rows_of(call.sums, 2, sizes)
    a.from_y = call.from_y
    return sizes


def forward(call):
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_forward_args a = NO_FORWARD
    cdef Sizes sizes = take_map(&p, &a, call)
    a.mask = <unsigned char *> data_of(call.mask, cnp.NPY_BOOL, sizes.positions)
    a.running.dtype = set_pair(call.running_mean, call.running_var, sizes, &a.running.mean, &a.running.var)
    a.running.momentum, a.running.correction = call.momentum, call.correction
    run(&p, &a)


def infer(call):
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_infer_args a = NO_INFER
    cdef Sizes sizes = take_map(&p, &a, call)
    a.statistics.dtype = set_pair(
        call.running_mean, call.running_var, sizes, <void **> &a.statistics.mean, <void **> &a.statistics.var
    )
    run(&p, &a)


def apply(call):
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_apply_args a = NO_APPLY
    take_map(&p, &a, call)
    run(&p, &a)


def moments(call):
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_moments_args a = NO_MOMENTS
    cdef Sizes sizes = set_problem_of(&p, call)
    a.x = data_of(call.x, sizes.data, sizes.values)
    a.mask = <unsigned char *> data_of(call.mask, cnp.NPY_BOOL, sizes.positions)
    a.moments = rows_of(call.moments, 3, sizes)
    run(&p, &a)


def backward_sums(call):
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_sums_args a = NO_SUMS
    take_gradient(&p, &a, call)
    run(&p, &a)


def backward(call):
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_backward_args a = NO_BACKWARD
    cdef Sizes sizes = take_gradient(&p, &a, call)
    a.count, a.frozen = call.counted, call.frozen
    a.dx, a.dresidual = data_of(call.dx, sizes.data, sizes.values), data_of(call.dresidual, sizes.data, sizes.values)
    a.dgamma = data_of(call.dgamma, sizes.statistics, sizes.channels)
    a.dbeta = data_of(call.dbeta, sizes.statistics, sizes.channels)
    run(&p, &a)


# ---- this processor ----


cdef list tables():
    names = []
    while c.fbn_kernels_at(len(names)) != NULL:
        names.append(c.fbn_kernels_name(c.fbn_kernels_at(len(names))).decode())
    return names


def isas():
    """The instruction sets that run on this processor, best first."""
    return tuple(tables())


def isa():
    """The instruction set in use."""
    return c.fbn_kernels_name(machine.kernels).decode()


def select_isa(name):
    """Uses the kernels of this instruction set, in the whole process."""
    if name not in tables():
        raise ValueError(f"FASTBN_ISA: got {name!r}; allowed on this processor: {', '.join(tables())}")
    use(c.fbn_kernels_at(tables().index(name)), machine.habits)


# The addresses of the machines that have been in use, by what tells them apart.
cdef dict machines = {}


cdef int use(const c.fbn_kernels *kernels, c.fbn_habits habits) except -1:
    """Calls that start from now on run with these kernels and habits."""
    global machine
    cdef c.fbn_machine *new
    cdef tuple key = (
        <size_t> kernels, habits.streams, habits.row_streams, habits.turn, habits.ahead, habits.stream_from,
        habits.block,
    )
    if key not in machines:
        new = <c.fbn_machine *> malloc(sizeof(c.fbn_machine))
        if new == NULL:
            raise MemoryError("no memory for the habits")
        new[0] = this_machine
        new.kernels, new.habits = kernels, habits
        machines[key] = <size_t> new
    machine = <c.fbn_machine *> <size_t> machines[key]
    return 0


def usual_habits():
    """The habits of this processor in the table of the C core, by name; 0 is the default there."""
    return this_machine.habits


def habits():
    """The habits in use, by name, as in fastbn.h."""
    return machine.habits


def set_habits(given):
    """Uses habits, a dict with the names of `habits()`, in the whole process. No bit of a result depends on them."""
    cdef c.fbn_habits new
    if not isinstance(given, dict) or given.keys() != habits().keys():
        raise ValueError(f"habits: got {given!r}; allowed: a dict of {', '.join(habits())}")
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"habits: got {name}={value!r}; allowed: integers")
        if not -1 << 63 <= value < 1 << 63:
            raise ValueError(f"habits: got {name}={value!r}; allowed: integers of 64 bits")
    new.streams, new.row_streams, new.turn = given["streams"], given["row_streams"], given["turn"]
    new.ahead, new.stream_from, new.block = given["ahead"], given["stream_from"], given["block"]
    use(machine.kernels, new)


def caches():
    """The bytes of data cache of levels 1 to 3 that a core can use, as fbn_cache_bytes tells them; 0 is unknown."""
    return tuple(c.fbn_cache_bytes(level) for level in (1, 2, 3))


def openmp():
    """The version of OpenMP that this build links to, or 0 in a build without OpenMP."""
    return c.fbn_openmp()


# OpenMP's default number of threads when this module was loaded.
cdef int threads_at_load = c.fbn_openmp_threads()


def most_threads():
    """The largest number of threads that OpenMP's settings allow a call from this thread."""
    cdef int now = c.fbn_openmp_threads()
    return now if now < threads_at_load or not c.fbn_openmp() else c.FBN_MOST_THREADS


def describe():
    """What show_config() prints about this backend."""
    return {
        "instruction set": f"{isa()} ({'the best that runs here' if isa() == isas()[0] else 'asked for'}; "
                           f"usable: {', '.join(isas())})",
        "OpenMP": f"yes ({openmp()})" if openmp() else "no: this build runs on one thread",
        "caches": ", ".join(f"L{level} {size >> 10} KiB" for level, size in enumerate(caches(), start=1)),
    }


include "express.pxi"
include "memory.pxi"
include "tensors.pxi"
include "plan.pxi"
include "flat.pxi"
