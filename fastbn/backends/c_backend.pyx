# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The bridge to the C core: arrays become pointers, the GIL is dropped, one C call is made."""

from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from libc.math cimport isfinite
from libc.stddef cimport size_t
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

cimport numpy as cnp

from fastbn cimport cfastbn as c

cdef extern from "Python.h":
    long PyLong_AsLongAndOverflow(object value, int *overflow)

cnp.import_array()

cdef c.fbn_machine machine = c.fbn_this_machine()

# Workspaces up to this size live on the stack.
cdef enum:
    SMALL = 16384


cdef inline void *pointer(cnp.ndarray array):
    return NULL if array is None else cnp.PyArray_DATA(array)


DTYPES = frozenset(("float16", "bfloat16", "float32", "float64"))
"""The names of the dtypes that data may have."""

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


cdef c.fbn_problem problem_of(cnp.ndarray x, int activation, double slope, int threads) except *:
    cdef c.fbn_problem p
    p.machine = &machine
    p.dtype = dtype_of(x)
    p.activation, p.slope = <c.fbn_activation> activation, slope
    p.outer, p.channels, p.inner = x.shape[0], x.shape[1], x.shape[2]
    p.threads = threads
    return p


cdef c.fbn_parameters parameters_of(cnp.ndarray gamma, cnp.ndarray beta) except *:
    cdef c.fbn_parameters p
    p.gamma, p.beta = pointer(gamma), pointer(beta)
    p.dtype = dtype_of(gamma if gamma is not None else beta) if gamma is not None or beta is not None else c.FBN_F32
    return p


cdef inline void *any_workspace(const c.fbn_problem *p, char *small) noexcept nogil:
    """`small`, SMALL bytes on the stack, where that is enough; else memory that `release` frees, or NULL."""
    cdef size_t size = c.fbn_workspace_bytes(p)
    return small if size <= SMALL else malloc(size)


cdef void *workspace_for(const c.fbn_problem *p, char *small) except NULL:
    """The same, or a MemoryError."""
    cdef void *memory = any_workspace(p, small)
    if memory == NULL:
        raise MemoryError(f"no {c.fbn_workspace_bytes(p)} bytes for the workspace")
    return memory


cdef inline void release(void *workspace, char *small) noexcept nogil:
    if workspace != small:
        free(workspace)


cdef inline int expect(c.fbn_status status) except -1:
    """The front desk lets nothing through that the C API would refuse: where this raises, one of them is wrong."""
    if status != c.FBN_OK:
        raise RuntimeError(f"fastbn.h: {c.fbn_status_text(status).decode()}")
    return 0


def forward(
    cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray mask, cnp.ndarray gamma, cnp.ndarray beta,
    cnp.ndarray running_mean, cnp.ndarray running_var, double momentum, int correction, double eps, int activation,
    double slope, cnp.ndarray y not None, cnp.ndarray saved not None, int threads,
):
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef c.fbn_problem p = problem_of(x, activation, slope, threads)
    cdef c.fbn_parameters parameters = parameters_of(gamma, beta)
    cdef c.fbn_running running
    running.mean, running.var = pointer(running_mean), pointer(running_var)
    running.momentum, running.correction = momentum, correction
    cdef void *x_ = pointer(x), *r_ = pointer(residual), *m_ = pointer(mask), *y_ = pointer(y)
    cdef void *saved_ = pointer(saved), *workspace = workspace_for(&p, small)
    with nogil:
        status = c.fbn_forward(&p, x_, r_, <unsigned char *> m_, &parameters, eps, &running, y_, <double *> saved_,
                               workspace)
        release(workspace, small)
    expect(status)


def infer(
    cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray mean,
    cnp.ndarray var, double eps, int activation, double slope, cnp.ndarray y not None, cnp.ndarray saved, int threads,
):
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef c.fbn_problem p = problem_of(x, activation, slope, threads)
    cdef c.fbn_parameters parameters = parameters_of(gamma, beta)
    cdef void *x_ = pointer(x), *r_ = pointer(residual), *y_ = pointer(y), *saved_ = pointer(saved)
    cdef void *mean_ = pointer(mean), *var_ = pointer(var)
    cdef void *workspace = workspace_for(&p, small)
    with nogil:
        status = c.fbn_infer(&p, x_, r_, &parameters, eps, mean_, var_, y_, <double *> saved_, workspace)
        release(workspace, small)
    expect(status)


def moments(cnp.ndarray x not None, cnp.ndarray mask, cnp.ndarray into not None, int threads):
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef c.fbn_problem p = problem_of(x, c.FBN_IDENTITY, 0, threads)
    cdef void *x_ = pointer(x), *m_ = pointer(mask), *into_ = pointer(into), *workspace = workspace_for(&p, small)
    with nogil:
        status = c.fbn_moments(&p, x_, <unsigned char *> m_, <double *> into_, workspace)
        release(workspace, small)
    expect(status)


def backward_sums(
    cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray saved not None, int activation,
    double slope, bint from_y, cnp.ndarray sums not None, int threads,
):
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef c.fbn_problem p = problem_of(x, activation, slope, threads)
    cdef void *dy_ = pointer(dy), *x_ = pointer(x), *r_ = pointer(residual), *saved_ = pointer(saved)
    cdef void *sums_ = pointer(sums), *workspace = workspace_for(&p, small)
    with nogil:
        status = c.fbn_backward_sums(&p, dy_, x_, r_, <double *> saved_, from_y, <double *> sums_, workspace)
        release(workspace, small)
    expect(status)


def backward(
    cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray residual, cnp.ndarray mask,
    cnp.ndarray saved not None, double count, bint frozen, cnp.ndarray sums, int activation, double slope, bint from_y,
    cnp.ndarray dx not None, cnp.ndarray dresidual, cnp.ndarray dgamma, cnp.ndarray dbeta, int threads,
):
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef c.fbn_problem p = problem_of(x, activation, slope, threads)
    cdef c.fbn_called called
    called.mask, called.sums = <unsigned char *> pointer(mask), <double *> pointer(sums)
    called.count, called.frozen, called.from_y = count, frozen, from_y
    cdef void *dy_ = pointer(dy), *x_ = pointer(x), *r_ = pointer(residual), *saved_ = pointer(saved)
    cdef void *dx_ = pointer(dx), *dr_ = pointer(dresidual), *dgamma_ = pointer(dgamma), *dbeta_ = pointer(dbeta)
    cdef void *workspace = workspace_for(&p, small)
    with nogil:
        status = c.fbn_backward(&p, dy_, x_, r_, <double *> saved_, &called, dx_, dr_, dgamma_, dbeta_, workspace)
        release(workspace, small)
    expect(status)


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


def describe():
    """For show_config()."""
    openmp = c.fbn_openmp()
    return {
        "instruction set": f"{isa()} ({'the best that runs here' if isa() == isas()[0] else 'asked for'}; "
                           f"usable: {', '.join(isas())})",
        "OpenMP": f"yes ({openmp})" if openmp else "no: this build runs on one thread",
        "caches": ", ".join(f"L{level} {c.fbn_cache_bytes(level) >> 10} KiB" for level in (1, 2, 3)),
    }


include "c_express.pxi"
include "c_memory.pxi"
include "c_plan.pxi"
include "c_flat.pxi"
