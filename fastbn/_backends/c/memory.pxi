# The express lane for tensors, whose memory is given by addresses: to make arrays of them takes longer than a small
# call. The caller makes sure that the memory exists. The address 0 stands for an array that is absent; x, y, dy and dx
# must be present. As in the express lane, a call that is not plain returns None and has changed nothing.


cdef bint set_memory_problem(
    c.fbn_problem *p, int number, object shape, int axis, object activation, object threads
) except -1:
    """Fills p for a dtype, by NumPy's number, and a shape in memory order, with channels on axis 1 or -1."""
    cdef cnp.npy_intp sizes[MOST_AXES]
    cdef int i, ndim = <int> len(shape)
    if ndim > MOST_AXES or not set_dtype(p, number) or not set_activation(p, activation):
        return False
    for i in range(ndim):
        sizes[i] = shape[i]
    set_sizes(p, sizes, ndim, axis if axis == 1 else ndim - 1)
    p.machine = machine
    return set_threads(p, threads) and values_of(p) > 0


cdef bint are_aligned(tuple addresses, size_t other, int count, c.fbn_dtype dtype) noexcept:
    """Whether addresses are aligned: the first `count` and `other` to data, the rest to values per channel."""
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
    """Returns `saved`, or True in inference without `keeps`; None if the call is not plain.

    The addresses are those of x, residual, gamma, beta, mean and var. x, residual and y have this dtype and shape, the
    others one value per channel in the statistics dtype. momentum is from 0 to 1. threads() gives the threads to use.
    """
    cdef Call call = NO_CALL
    cdef cnp.ndarray saved = None
    if not set_memory_problem(&call.problem, number, shape, axis, activation, threads) or not (0 <= eps < 1e300):
        return None
    if not are_aligned(addresses, y, 2, call.problem.dtype):
        return None
    call.parameters.dtype = call.statistics_dtype = statistics_dtype(&call.problem)
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
    normalize(&call, training, momentum, 1, saved)
    return True if saved is None else saved


def backward_at(
    int number, object shape, int axis, tuple addresses, size_t dx, object saved, bint frozen, object activation,
    size_t dgamma, size_t dbeta, size_t dresidual, object threads,
):
    """Returns True, or None if the call is not plain. The addresses are those of dy, x and residual.

    dx and dresidual have this dtype and shape, dgamma and dbeta one value per channel. They share no memory.
    """
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_backward_args a = NO_BACKWARD
    if not set_memory_problem(&p, number, shape, axis, activation, threads) or not is_saved(saved, p.channels):
        return None
    if not frozen and p.outer * p.inner < 2 or not are_aligned(addresses, dx | dresidual, 3, p.dtype):
        return None
    a.dy, a.x = <void *> <size_t> addresses[0], <void *> <size_t> addresses[1]
    a.residual = <void *> <size_t> addresses[2]
    a.dx, a.dresidual, a.dgamma, a.dbeta = <void *> dx, <void *> dresidual, <void *> dgamma, <void *> dbeta
    differentiate(&p, &a, saved, frozen)
    return True


def add_one_at(size_t address):
    """Adds one to the int64 at this address."""
    (<int64_t *> address)[0] += 1
