# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The bridge to the C core: arrays become pointers, the GIL is dropped, one C call is made."""

from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport isfinite
from libc.stddef cimport size_t
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as cnp

from fastbn cimport cfastbn as c

cdef extern from "Python.h":
    long PyLong_AsLongAndOverflow(object value, int *overflow)

cnp.import_array()

cdef c.fbn_machine machine = c.fbn_this_machine()

DTYPES = frozenset(("float16", "bfloat16", "float32", "float64"))
"""The names of the dtypes that data may have."""


# ---- calls: each verb with a workspace of its own ----

cdef enum:
    SMALL = 16384  # workspaces up to this size live on the stack
    NO_MEMORY = -1  # beside the statuses of fastbn.h


cdef inline void *workspace_for(const c.fbn_problem *p, char *small) noexcept nogil:
    """`small`, SMALL bytes on the stack, where that is enough; else memory that `release` frees, or NULL.

    An invalid problem needs none, and gets a pointer so that the verb can say what is wrong with it.
    """
    cdef size_t size = c.fbn_workspace_bytes(p)
    return small if size <= SMALL else malloc(size)


cdef inline void release(void *workspace, char *small) noexcept nogil:
    if workspace != small:
        free(workspace)


cdef int call_forward(const c.fbn_problem *p, c.fbn_forward_args *args) noexcept nogil:
    cdef char small[SMALL]
    cdef void *workspace = workspace_for(p, small)
    cdef int status = NO_MEMORY
    args.size = sizeof(c.fbn_forward_args)
    if workspace != NULL:
        status = c.fbn_forward(p, args, workspace)
        release(workspace, small)
    return status


cdef int call_infer(const c.fbn_problem *p, c.fbn_infer_args *args) noexcept nogil:
    cdef char small[SMALL]
    cdef void *workspace = workspace_for(p, small)
    cdef int status = NO_MEMORY
    args.size = sizeof(c.fbn_infer_args)
    if workspace != NULL:
        status = c.fbn_infer(p, args, workspace)
        release(workspace, small)
    return status


cdef int call_apply(const c.fbn_problem *p, c.fbn_apply_args *args) noexcept nogil:
    cdef char small[SMALL]
    cdef void *workspace = workspace_for(p, small)
    cdef int status = NO_MEMORY
    args.size = sizeof(c.fbn_apply_args)
    if workspace != NULL:
        status = c.fbn_apply(p, args, workspace)
        release(workspace, small)
    return status


cdef int call_moments(const c.fbn_problem *p, c.fbn_moments_args *args) noexcept nogil:
    cdef char small[SMALL]
    cdef void *workspace = workspace_for(p, small)
    cdef int status = NO_MEMORY
    args.size = sizeof(c.fbn_moments_args)
    if workspace != NULL:
        status = c.fbn_moments(p, args, workspace)
        release(workspace, small)
    return status


cdef int call_backward_sums(const c.fbn_problem *p, c.fbn_sums_args *args) noexcept nogil:
    cdef char small[SMALL]
    cdef void *workspace = workspace_for(p, small)
    cdef int status = NO_MEMORY
    args.size = sizeof(c.fbn_sums_args)
    if workspace != NULL:
        status = c.fbn_backward_sums(p, args, workspace)
        release(workspace, small)
    return status


cdef int call_backward(const c.fbn_problem *p, c.fbn_backward_args *args) noexcept nogil:
    cdef char small[SMALL]
    cdef void *workspace = workspace_for(p, small)
    cdef int status = NO_MEMORY
    args.size = sizeof(c.fbn_backward_args)
    if workspace != NULL:
        status = c.fbn_backward(p, args, workspace)
        release(workspace, small)
    return status


cdef inline int expect(int status) except -1:
    """The front desk lets nothing through that the C API would refuse: where this raises, one of them is wrong."""
    if status == NO_MEMORY:
        raise MemoryError("no memory for the workspace")
    if status != c.FBN_OK:
        raise RuntimeError(f"fastbn.h: {c.fbn_status_text(<c.fbn_status> status).decode()}")
    return 0


# ---- arrays: nothing is handed to C whose dtype, size and place in memory were not looked at ----

# NumPy numbers the dtypes of other packages as they come: that of bfloat16, once one has been seen.
cdef int bfloat16 = -1


cdef c.fbn_dtype dtype_of(cnp.ndarray array) except *:
    global bfloat16
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return c.FBN_F32
    if number == cnp.NPY_FLOAT64:
        return c.FBN_F64
    if number == cnp.NPY_FLOAT16:
        return c.FBN_F16
    if number != bfloat16:
        if array.dtype.name != "bfloat16":
            raise TypeError(f"dtype: got {array.dtype}; allowed: {', '.join(sorted(DTYPES))}")
        bfloat16 = number
    return c.FBN_BF16


cdef inline int statistics_of(int dtype) noexcept:
    return cnp.NPY_FLOAT64 if dtype == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef void *data_of(object value, int dtype, int64_t size) except? NULL:
    """The memory of a C-contiguous, aligned, native array of so many elements of a dtype; NULL for None."""
    cdef cnp.ndarray array
    if value is None:
        return NULL
    array = value
    if cnp.PyArray_TYPE(array) != dtype or not cnp.PyArray_ISCARRAY_RO(array) or cnp.PyArray_SIZE(array) != size:
        raise ValueError(
            f"array: got shape {value.shape}, dtype {value.dtype}, strides {value.strides}; allowed: "
            f"{size} elements of another dtype or memory order (or some of the arrays of this call do not fit together)"
        )
    return cnp.PyArray_DATA(array)


cdef struct Sizes:
    # What the arrays of a call must be: dtypes are NumPy's numbers.
    int data
    int statistics
    int64_t values
    int64_t positions
    int64_t channels


cdef Sizes set_problem_of(c.fbn_problem *p, cnp.ndarray x, int activation, double slope, int threads) except *:
    """Fills the problem from a three-dimensional x."""
    cdef Sizes sizes
    if cnp.PyArray_NDIM(x) != 3:
        raise ValueError(f"x: got shape {(<object> x).shape}; allowed: (outer, channels, inner)")
    p.machine = &machine
    p.dtype = dtype_of(x)
    p.activation, p.slope = <c.fbn_activation> activation, slope
    p.outer, p.channels, p.inner = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2)
    p.threads = threads
    sizes.data = cnp.PyArray_TYPE(x)
    sizes.statistics = statistics_of(sizes.data)
    sizes.values, sizes.positions, sizes.channels = cnp.PyArray_SIZE(x), p.outer * p.inner, p.channels
    return sizes


cdef c.fbn_dtype set_pair(cnp.ndarray first, cnp.ndarray second, Sizes sizes, void **a, void **b) except *:
    """The memory of two arrays of (channels,) in one dtype, which is returned; either may be None."""
    cdef int dtype
    if first is None and second is None:
        a[0] = b[0] = NULL
        return c.FBN_F32
    dtype = cnp.PyArray_TYPE(first if first is not None else second)
    a[0], b[0] = data_of(first, dtype, sizes.channels), data_of(second, dtype, sizes.channels)
    return dtype_of(first if first is not None else second)


cdef double *saved_of(cnp.ndarray saved, Sizes sizes) except? NULL:
    if saved is not None and (saved.ndim != 2 or cnp.PyArray_DIM(saved, 0) != c.FBN_SAVED_ROWS):
        raise ValueError(f"saved: got shape {(<object> saved).shape}; allowed: ({c.FBN_SAVED_ROWS}, channels)")
    return <double *> data_of(saved, cnp.NPY_FLOAT64, c.FBN_SAVED_ROWS * sizes.channels)


# ---- the protocol of fastbn.backends ----


def forward(
    cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray mask, cnp.ndarray gamma, cnp.ndarray beta,
    cnp.ndarray running_mean, cnp.ndarray running_var, double momentum, double correction, double eps, int activation,
    double slope, cnp.ndarray y not None, cnp.ndarray saved not None, int threads,
):
    cdef c.fbn_problem p
    cdef c.fbn_forward_args a
    cdef Sizes sizes = set_problem_of(&p, x, activation, slope, threads)
    cdef int status
    a.x, a.residual = data_of(x, sizes.data, sizes.values), data_of(residual, sizes.data, sizes.values)
    a.mask = <unsigned char *> data_of(mask, cnp.NPY_BOOL, sizes.positions)
    a.parameters.dtype = set_pair(gamma, beta, sizes, <void **> &a.parameters.gamma, <void **> &a.parameters.beta)
    a.running.dtype = set_pair(running_mean, running_var, sizes, &a.running.mean, &a.running.var)
    a.running.momentum, a.running.correction, a.eps = momentum, correction, eps
    a.y, a.saved = data_of(y, sizes.data, sizes.values), saved_of(saved, sizes)
    with nogil:
        status = call_forward(&p, &a)
    expect(status)


def infer(
    cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray mean,
    cnp.ndarray var, double eps, int activation, double slope, cnp.ndarray y not None, cnp.ndarray saved, int threads,
):
    cdef c.fbn_problem p
    cdef c.fbn_infer_args a
    cdef c.fbn_apply_args b
    cdef Sizes sizes = set_problem_of(&p, x, activation, slope, threads)
    cdef int status
    a.x, a.residual = data_of(x, sizes.data, sizes.values), data_of(residual, sizes.data, sizes.values)
    a.parameters.dtype = set_pair(gamma, beta, sizes, <void **> &a.parameters.gamma, <void **> &a.parameters.beta)
    a.statistics.dtype = set_pair(mean, var, sizes, <void **> &a.statistics.mean, <void **> &a.statistics.var)
    a.y, a.saved, a.eps = data_of(y, sizes.data, sizes.values), saved_of(saved, sizes), eps
    if mean is not None:
        with nogil:
            status = call_infer(&p, &a)
    else:
        b.x, b.residual, b.parameters, b.eps, b.y, b.saved = a.x, a.residual, a.parameters, a.eps, a.y, a.saved
        with nogil:
            status = call_apply(&p, &b)
    expect(status)


def moments(cnp.ndarray x not None, cnp.ndarray mask, cnp.ndarray into not None, int threads):
    cdef c.fbn_problem p
    cdef c.fbn_moments_args a
    cdef Sizes sizes = set_problem_of(&p, x, c.FBN_IDENTITY, 0, threads)
    cdef int status
    a.x = data_of(x, sizes.data, sizes.values)
    a.mask = <unsigned char *> data_of(mask, cnp.NPY_BOOL, sizes.positions)
    a.moments = <double *> data_of(into, cnp.NPY_FLOAT64, 3 * sizes.channels)
    with nogil:
        status = call_moments(&p, &a)
    expect(status)


def backward_sums(
    cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray mask,
    cnp.ndarray saved not None, int activation, double slope, bint from_y, cnp.ndarray sums not None, int threads,
):
    cdef c.fbn_problem p
    cdef c.fbn_sums_args a
    cdef Sizes sizes = set_problem_of(&p, x, activation, slope, threads)
    cdef int status
    a.dy, a.x = data_of(dy, sizes.data, sizes.values), data_of(x, sizes.data, sizes.values)
    a.residual = data_of(residual, sizes.data, sizes.values)
    a.mask = <unsigned char *> data_of(mask, cnp.NPY_BOOL, sizes.positions)
    a.saved, a.from_y = saved_of(saved, sizes), from_y
    a.sums = <double *> data_of(sums, cnp.NPY_FLOAT64, 2 * sizes.channels)
    with nogil:
        status = call_backward_sums(&p, &a)
    expect(status)


def backward(
    cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray mask,
    cnp.ndarray saved not None, double count, bint frozen, cnp.ndarray sums, int activation, double slope, bint from_y,
    cnp.ndarray dx not None, cnp.ndarray dresidual, cnp.ndarray dgamma, cnp.ndarray dbeta, int threads,
):
    cdef c.fbn_problem p
    cdef c.fbn_backward_args a
    cdef Sizes sizes = set_problem_of(&p, x, activation, slope, threads)
    cdef int status
    a.dy, a.x = data_of(dy, sizes.data, sizes.values), data_of(x, sizes.data, sizes.values)
    a.residual = data_of(residual, sizes.data, sizes.values)
    a.mask = <unsigned char *> data_of(mask, cnp.NPY_BOOL, sizes.positions)
    a.saved, a.count, a.frozen, a.from_y = saved_of(saved, sizes), count, frozen, from_y
    a.sums = <double *> data_of(sums, cnp.NPY_FLOAT64, 2 * sizes.channels)
    a.dx, a.dresidual = data_of(dx, sizes.data, sizes.values), data_of(dresidual, sizes.data, sizes.values)
    a.dgamma = data_of(dgamma, sizes.statistics, sizes.channels)
    a.dbeta = data_of(dbeta, sizes.statistics, sizes.channels)
    with nogil:
        status = call_backward(&p, &a)
    expect(status)


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
    """Use the kernels of this instruction set, in the whole process."""
    if name not in tables():
        raise ValueError(f"FASTBN_ISA: got {name!r}; allowed on this processor: {', '.join(tables())}")
    machine.kernels = c.fbn_kernels_at(tables().index(name))


def openmp():
    """The version of OpenMP that this build links to, or 0."""
    return c.fbn_openmp()


# How many threads OpenMP would use for a call that does not say, when this module was loaded.
cdef int threads_at_load = c.fbn_openmp_threads()


def most_threads():
    """How many threads OpenMP's own settings leave for a call from this thread."""
    cdef int now = c.fbn_openmp_threads()
    return now if now < threads_at_load or not c.fbn_openmp() else c.FBN_MOST_THREADS


def describe():
    """For show_config()."""
    return {
        "instruction set": f"{isa()} ({'the best that runs here' if isa() == isas()[0] else 'asked for'}; "
                           f"usable: {', '.join(isas())})",
        "OpenMP": f"yes ({openmp()})" if openmp() else "no: this build runs on one thread",
        "caches": ", ".join(f"L{level} {c.fbn_cache_bytes(level) >> 10} KiB" for level in (1, 2, 3)),
    }


include "c_express.pxi"
include "c_memory.pxi"
include "c_plan.pxi"
include "c_flat.pxi"
