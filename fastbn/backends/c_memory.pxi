# The express lane for memory that belongs to others, given by its addresses: that of tensors, whose own conversion to
# arrays takes longer than a small call. The caller vouches for the memory; any address may be 0 for what is absent, but
# those of x, y, dy and dx. As in the express lane, None, with nothing done, is the answer to a call that is not plain.


cdef bint set_memory_problem(
    c.fbn_problem *p, int number, object shape, int axis, object activation, object threads
) except -1:
    """Fills p for memory of a dtype, by its number, and a shape, with channels on axis 1 or -1."""
    cdef cnp.npy_intp sizes[MOST_AXES]
    cdef int i, ndim = <int> len(shape)
    if ndim > MOST_AXES or not set_dtype(p, number) or not set_activation(p, activation):
        return False
    for i in range(ndim):
        sizes[i] = shape[i]
    set_sizes(p, sizes, ndim, axis if axis == 1 else ndim - 1)
    p.machine = &machine
    return set_threads(p, threads) and values_of(p) > 0


cdef bint are_aligned(tuple addresses, size_t other, int count, c.fbn_dtype dtype) noexcept:
    """Whether the first `count` addresses, of data, and the others, of channels, are multiples of their elements."""
    cdef size_t data = other, channels = 0
    cdef int i
    for i in range(len(addresses)):
        if i < count:
            data |= <size_t> addresses[i]
        else:
            channels |= <size_t> addresses[i]
    return not (
        data % (8 if dtype == c.FBN_F64 else 4 if dtype == c.FBN_F32 else 2)
        or channels % (8 if dtype == c.FBN_F64 else 4)
    )


def forward_at(
    int number, object shape, int axis, tuple addresses, size_t y, double momentum, double eps, object activation,
    bint training, bint keeps, object threads,
):
    """What express_forward saves, or True without `keeps`; None, with nothing done, if the call is not plain.

    The addresses are those of x, residual, gamma, beta, mean and var. x and y have this dtype and shape; the others
    one value a channel in the statistics dtype. momentum is from 0 to 1. threads() tells how many may work.
    """
    cdef Call call
    cdef c.fbn_forward_args a
    cdef c.fbn_infer_args b
    cdef cnp.ndarray saved = None
    cdef int status
    if not set_memory_problem(&call.problem, number, shape, axis, activation, threads) or not (0 <= eps < 1e300):
        return None
    if not are_aligned(addresses, y, 2, call.problem.dtype):
        return None
    set_bytes(&call)
    call.x, call.residual = <void *> <size_t> addresses[0], <void *> <size_t> addresses[1]
    call.parameters.gamma, call.parameters.beta = <void *> <size_t> addresses[2], <void *> <size_t> addresses[3]
    call.mean, call.var = <void *> <size_t> addresses[4], <void *> <size_t> addresses[5]
    call.y, call.eps, call.statistics = <void *> y, eps, call.mean != NULL
    if call.statistics != (call.var != NULL) or not (training or call.statistics):
        return None
    if training and (call.problem.outer * call.problem.inner < 2 or not are_apart(&call)):
        return None
    if training or keeps:
        saved = empty(c.FBN_SAVED_ROWS, call.problem.channels, cnp.NPY_FLOAT64)
    if training:
        fill_forward(&a, &call, momentum, 1, <double *> cnp.PyArray_DATA(saved))
        with nogil:
            status = call_forward(&call.problem, &a)
    else:
        fill_infer(&b, &call)
        b.saved = NULL if saved is None else <double *> cnp.PyArray_DATA(saved)
        with nogil:
            status = call_infer(&call.problem, &b)
    expect(status)
    return True if saved is None else saved


def backward_at(
    int number, object shape, int axis, tuple addresses, size_t dx, object saved, bint frozen, object activation,
    bint has_gamma, bint has_beta, object threads,
):
    """(dgamma, dbeta, dresidual), or None as above; the addresses are those of dy, x and residual."""
    cdef c.fbn_problem p
    cdef c.fbn_backward_args a
    cdef cnp.npy_intp dims[8]
    cdef Py_ssize_t i
    cdef int status, statistics = statistics_of(number)
    if not set_memory_problem(&p, number, shape, axis, activation, threads) or not is_saved(saved, p.channels):
        return None
    if len(shape) > 8 or not frozen and p.outer * p.inner < 2 or not are_aligned(addresses, dx, 3, p.dtype):
        return None
    a.dy, a.x = <void *> <size_t> addresses[0], <void *> <size_t> addresses[1]
    a.residual, a.mask, a.dx = <void *> <size_t> addresses[2], NULL, <void *> dx
    dgamma = empty(0, p.channels, statistics) if has_gamma else None
    dbeta = empty(0, p.channels, statistics) if has_beta else None
    dresidual = None
    if a.residual != NULL and p.activation != c.FBN_IDENTITY:
        for i in range(len(shape)):
            dims[i] = shape[i]
        dresidual = cnp.PyArray_EMPTY(<int> len(shape), dims, number, 0)
    a.dgamma = NULL if dgamma is None else cnp.PyArray_DATA(<cnp.ndarray> dgamma)
    a.dbeta = NULL if dbeta is None else cnp.PyArray_DATA(<cnp.ndarray> dbeta)
    a.dresidual = NULL if dresidual is None else cnp.PyArray_DATA(<cnp.ndarray> dresidual)
    a.saved, a.sums, a.from_y = <double *> cnp.PyArray_DATA(<cnp.ndarray> saved), NULL, False
    a.count, a.frozen = <double> p.outer * <double> p.inner, frozen
    with nogil:
        status = call_backward(&p, &a)
    expect(status)
    return dgamma, dbeta, dresidual


def add_one_at(size_t address):
    """To the int64 there."""
    (<int64_t *> address)[0] += 1
