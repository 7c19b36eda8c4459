# The express lane for memory that belongs to others, given by its addresses: that of tensors, whose own conversion to
# arrays takes longer than a small call. Any address may be 0, for what is absent, but those of x, y, dy and dx.


cdef object array_at(object address, int number, object shape):
    """The C-contiguous array of a dtype, by its number, at an address; None for 0."""
    cdef cnp.npy_intp dims[8]
    cdef int i
    if not address:
        return None
    for i in range(len(shape)):
        dims[i] = shape[i]
    return cnp.PyArray_SimpleNewFromData(len(shape), dims, number, <void *> <size_t> address)


def forward_at(
    int number, object shape, int axis, tuple addresses, object y, object momentum, object eps, object activation,
    bint training, bint keeps, object threads,
):
    """What express_forward saves, or True without `keeps`; None, with nothing done, if the call is not plain.

    The addresses are those of x, residual, gamma, beta, mean and var. The caller vouches for the memory: that of x and
    y has this dtype and shape, of at most 8 axes, with channels on axis 1 or -1; that of the others one value a channel
    in the statistics dtype. threads() tells how many may work.
    """
    cdef int statistics = statistics_of(number)
    cdef tuple channels = (shape[1 if axis == 1 else len(shape) - 1],)
    x, residual, gamma, beta, mean, var = addresses
    x, residual, y = array_at(x, number, shape), array_at(residual, number, shape), array_at(y, number, shape)
    gamma, beta = array_at(gamma, statistics, channels), array_at(beta, statistics, channels)
    mean, var = array_at(mean, statistics, channels), array_at(var, statistics, channels)
    if not training and not keeps:
        done = express_infer(x, gamma, beta, mean, var, eps, axis, activation, residual, y, threads)
        return None if done is None else True
    done = express_forward(
        x, gamma, beta, mean, var, momentum, 1, eps, axis, activation, residual, y, training, threads
    )
    return None if done is None else done[1]


def backward_at(
    int number, object shape, int axis, tuple addresses, object dx, cnp.ndarray saved not None, bint frozen,
    object activation, bint has_gamma, bint has_beta, object threads,
):
    """(dgamma, dbeta, dresidual), or None as above; the addresses are those of dy, x and residual."""
    dy, x, residual = addresses
    dy, x, dx = array_at(dy, number, shape), array_at(x, number, shape), array_at(dx, number, shape)
    residual = array_at(residual, number, shape)
    done = express_backward(
        dy, x, residual, saved, axis, frozen, activation, has_gamma, has_beta, dx, threads
    )
    return None if done is None else done[1:]


def add_one_at(size_t address):
    """To the int64 there."""
    (<int64_t *> address)[0] += 1
