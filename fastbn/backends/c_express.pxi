# The express lane of the bridge, for calls so small that checking in Python would cost more than computing.
#
# Each function recognizes the plain call: C-contiguous arrays of one native dtype, channels on axis 1 or the last,
# everything valid and nothing overlapping. It returns None, with nothing done, for any other, which then goes through
# the front desk; so it holds no error message and decides nothing that the front desk would decide otherwise.


# Every activation but identity and relu, which are looked for first.
cdef dict ACTIVATIONS = {
    "relu6": c.FBN_RELU6, "leaky_relu": c.FBN_LEAKY_RELU, "silu": c.FBN_SILU, "hardswish": c.FBN_HARDSWISH,
    "sigmoid": c.FBN_SIGMOID,
}


cdef bint is_plain(object value, int dtype) noexcept:
    """A C-contiguous, aligned, native array of this dtype, and of no subclass."""
    return (
        type(value) is cnp.ndarray
        and cnp.PyArray_TYPE(<cnp.ndarray> value) == dtype
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> value)
    )


cdef bint set_problem(c.fbn_problem *p, object x, object axis, object activation, int threads) noexcept:
    """Fills p for a plain x with values; False if it is not plain."""
    cdef cnp.ndarray array
    cdef long channel_axis
    cdef int i, dtype, ndim, overflow = 0
    if type(x) is not cnp.ndarray or type(axis) is not int:
        return False
    array = x
    dtype, ndim = cnp.PyArray_TYPE(array), cnp.PyArray_NDIM(array)
    channel_axis = PyLong_AsLongAndOverflow(axis, &overflow)
    if overflow or not is_plain(x, dtype) or ndim < 2:
        return False
    if dtype == cnp.NPY_FLOAT32:
        p.dtype = c.FBN_F32
    elif dtype == cnp.NPY_FLOAT64:
        p.dtype = c.FBN_F64
    elif dtype == cnp.NPY_FLOAT16:
        p.dtype = c.FBN_F16
    elif dtype == bfloat16:
        p.dtype = c.FBN_BF16
    else:
        return False
    p.machine, p.threads = &machine, threads
    p.outer = p.inner = 1
    if channel_axis == 1:
        p.outer = cnp.PyArray_DIM(array, 0)
        for i in range(2, ndim):
            p.inner *= cnp.PyArray_DIM(array, i)
        p.channels = cnp.PyArray_DIM(array, 1)
    elif channel_axis == -1 or channel_axis == ndim - 1:
        for i in range(ndim - 1):
            p.outer *= cnp.PyArray_DIM(array, i)
        p.channels = cnp.PyArray_DIM(array, ndim - 1)
    else:
        return False
    p.slope = 0.01
    if activation is None:
        p.activation = c.FBN_IDENTITY
    elif type(activation) is not str:
        return False
    elif activation == "relu":
        p.activation = c.FBN_RELU
    elif activation in ACTIVATIONS:
        p.activation = <c.fbn_activation> <int> ACTIVATIONS[activation]
    else:
        return False
    return p.channels > 1 and p.outer * p.inner > 0


cdef inline int statistics_of(int dtype) noexcept:
    return cnp.NPY_FLOAT64 if dtype == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef bint take_channels(object value, cnp.ndarray x, int64_t channels, void **data) noexcept:
    """The data of a plain (channels,) array of x's statistics dtype, or of None."""
    if value is None:
        data[0] = NULL
        return True
    if not is_plain(value, statistics_of(cnp.PyArray_TYPE(x))):
        return False
    data[0] = cnp.PyArray_DATA(<cnp.ndarray> value)
    return cnp.PyArray_NDIM(<cnp.ndarray> value) == 1 and cnp.PyArray_DIM(<cnp.ndarray> value, 0) == channels


cdef bint take_like(object value, cnp.ndarray x, void **data) noexcept:
    """The data of a plain array of x's dtype and shape, or of None."""
    if value is None:
        data[0] = NULL
        return True
    data[0] = cnp.PyArray_DATA(<cnp.ndarray> value) if is_plain(value, cnp.PyArray_TYPE(x)) else NULL
    return data[0] != NULL and cnp.PyArray_SAMESHAPE(<cnp.ndarray> value, x)


cdef inline bint apart(const void *a, int64_t a_bytes, const void *b, int64_t b_bytes) noexcept:
    return b == NULL or <char *> a + a_bytes <= <char *> b or <char *> b + b_bytes <= <char *> a


cdef inline bint is_number(object value, double low, double high) noexcept:
    return PyFloat_CheckExact(value) and low <= PyFloat_AS_DOUBLE(value) <= high and isfinite(PyFloat_AS_DOUBLE(value))


cdef inline cnp.ndarray empty_like(cnp.ndarray x):
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)


cdef inline cnp.ndarray empty(int64_t rows, int64_t channels, int dtype):
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = rows, channels
    return cnp.PyArray_EMPTY(2, shape, dtype, 0) if rows else cnp.PyArray_EMPTY(1, shape + 1, dtype, 0)


cdef struct Call:
    c.fbn_problem problem
    c.fbn_parameters parameters
    void *x
    void *residual
    void *mean
    void *var
    void *y
    int64_t bytes
    int64_t channel_bytes
    double eps
    bint statistics


cdef bint take(
    Call *call, object x, object gamma, object beta, object mean, object var, object eps, object axis,
    object activation, object residual, object out, int threads,
) noexcept:
    """Fills `call` for a plain call whose out shares no memory with an input; False if it is not plain."""
    cdef int64_t channels
    if not set_problem(&call.problem, x, axis, activation, threads) or not is_number(eps, 0, 1e300):
        return False
    channels = call.problem.channels
    call.parameters.dtype = c.FBN_F64 if call.problem.dtype == c.FBN_F64 else c.FBN_F32
    call.x = cnp.PyArray_DATA(<cnp.ndarray> x)
    call.bytes = cnp.PyArray_NBYTES(<cnp.ndarray> x)
    call.channel_bytes = channels * (8 if call.problem.dtype == c.FBN_F64 else 4)
    if not (
        take_channels(gamma, x, channels, <void **> &call.parameters.gamma)
        and take_channels(beta, x, channels, <void **> &call.parameters.beta)
        and take_channels(mean, x, channels, &call.mean)
        and take_channels(var, x, channels, &call.var)
        and take_like(residual, x, &call.residual)
        and take_like(out, x, &call.y)
    ):
        return False
    call.statistics = call.mean != NULL
    if call.statistics != (call.var != NULL):
        return False
    call.eps = PyFloat_AS_DOUBLE(eps)
    return call.y == NULL or (
        cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out)
        and apart_from_inputs(call, call.y, call.bytes)
        and apart(call.y, call.bytes, call.mean, call.channel_bytes)
        and apart(call.y, call.bytes, call.var, call.channel_bytes)
    )


cdef bint apart_from_inputs(const Call *call, const void *data, int64_t size) noexcept:
    """Whether `data` shares no memory with residual, gamma and beta."""
    return (
        apart(data, size, call.residual, call.bytes)
        and apart(data, size, call.parameters.gamma, call.channel_bytes)
        and apart(data, size, call.parameters.beta, call.channel_bytes)
    )


cdef bint may_update(const Call *call, object mean, object var) noexcept:
    """Whether the running statistics are absent, or writable and apart from each other and the inputs."""
    return not call.statistics or (
        cnp.PyArray_ISWRITEABLE(<cnp.ndarray> mean)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> var)
        and apart(call.mean, call.channel_bytes, call.var, call.channel_bytes)
        and apart(call.mean, call.channel_bytes, call.x, call.bytes)
        and apart(call.var, call.channel_bytes, call.x, call.bytes)
        and apart_from_inputs(call, call.mean, call.channel_bytes)
        and apart_from_inputs(call, call.var, call.channel_bytes)
    )


def express_infer(
    object x, object gamma, object beta, object mean, object var, object eps, object axis, object activation,
    object residual, object out, int threads,
):
    """y, or None."""
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef Call call
    cdef void *workspace
    if not take(&call, x, gamma, beta, mean, var, eps, axis, activation, residual, out, threads):
        return None
    if not call.statistics or not (call.y == call.x or call.y == NULL or apart(call.y, call.bytes, call.x, call.bytes)):
        return None
    if out is None:
        out = empty_like(x)
        call.y = cnp.PyArray_DATA(<cnp.ndarray> out)
    workspace = workspace_for(&call.problem, small)
    with nogil:
        status = c.fbn_infer(&call.problem, call.x, call.residual, &call.parameters, call.eps, call.mean, call.var,
                             call.y, NULL, workspace)
        release(workspace, small)
    expect(status)
    return out


def express_forward(
    object x, object gamma, object beta, object mean, object var, object momentum, int correction, object eps,
    object axis, object activation, object residual, object out, bint training, int threads,
):
    """(y, saved), or None."""
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef Call call
    cdef c.fbn_running running
    cdef cnp.ndarray saved
    cdef void *workspace
    cdef double *rows
    if not take(&call, x, gamma, beta, mean, var, eps, axis, activation, residual, out, threads):
        return None
    if not is_number(momentum, 0, 1) or not (may_update(&call, mean, var) if training else call.statistics):
        return None
    if training and call.problem.outer * call.problem.inner < 2:
        return None
    if call.y != NULL and not apart(call.y, call.bytes, call.x, call.bytes):
        return None
    if out is None:
        out = empty_like(x)
        call.y = cnp.PyArray_DATA(<cnp.ndarray> out)
    saved = empty(c.FBN_SAVED_ROWS, call.problem.channels, cnp.NPY_FLOAT64)
    rows = <double *> cnp.PyArray_DATA(saved)
    running.mean, running.var = call.mean, call.var
    running.momentum, running.correction = PyFloat_AS_DOUBLE(momentum), correction
    workspace = workspace_for(&call.problem, small)
    with nogil:
        if training:
            status = c.fbn_forward(&call.problem, call.x, call.residual, NULL, &call.parameters, call.eps, &running,
                                   call.y, rows, workspace)
        else:
            status = c.fbn_infer(&call.problem, call.x, call.residual, &call.parameters, call.eps, call.mean, call.var,
                                 call.y, rows, workspace)
        release(workspace, small)
    expect(status)
    return out, saved


def express_backward(
    object dy, object x, object residual, cnp.ndarray saved, object axis, bint frozen, object activation,
    bint has_gamma, bint has_beta, object out, int threads,
):
    """(dx, dgamma, dbeta, dresidual), or None."""
    cdef c.fbn_status status
    cdef char small[SMALL]
    cdef c.fbn_problem p
    cdef void *x_, *dy_, *residual_, *dx_, *workspace
    cdef void *dresidual_ = NULL, *dgamma_ = NULL, *dbeta_ = NULL
    cdef double *rows = <double *> cnp.PyArray_DATA(saved)
    cdef c.fbn_called called
    cdef int64_t bytes
    cdef int statistics
    if not set_problem(&p, x, axis, activation, threads) or dy is None:
        return None
    if not (take_like(dy, x, &dy_) and take_like(residual, x, &residual_) and take_like(out, x, &dx_)):
        return None
    x_, bytes = cnp.PyArray_DATA(<cnp.ndarray> x), cnp.PyArray_NBYTES(<cnp.ndarray> x)
    if dx_ != NULL and not (
        cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out) and apart(dx_, bytes, x_, bytes)
        and apart(dx_, bytes, dy_, bytes) and apart(dx_, bytes, residual_, bytes)
    ):
        return None
    if out is None:
        out = empty_like(x)
        dx_ = cnp.PyArray_DATA(<cnp.ndarray> out)
    dresidual = dgamma = dbeta = None
    statistics = statistics_of(cnp.PyArray_TYPE(<cnp.ndarray> x))
    if has_gamma:
        dgamma = empty(0, p.channels, statistics)
        dgamma_ = cnp.PyArray_DATA(<cnp.ndarray> dgamma)
    if has_beta:
        dbeta = empty(0, p.channels, statistics)
        dbeta_ = cnp.PyArray_DATA(<cnp.ndarray> dbeta)
    if residual is not None:
        dresidual = dy if p.activation == c.FBN_IDENTITY else empty_like(x)
        dresidual_ = NULL if p.activation == c.FBN_IDENTITY else cnp.PyArray_DATA(<cnp.ndarray> dresidual)
    called.mask, called.sums, called.from_y = NULL, NULL, False
    called.count, called.frozen = <double> p.outer * <double> p.inner, frozen
    workspace = workspace_for(&p, small)
    with nogil:
        status = c.fbn_backward(&p, dy_, x_, residual_, rows, &called, dx_, dresidual_, dgamma_, dbeta_, workspace)
        release(workspace, small)
    expect(status)
    return out, dgamma, dbeta, dresidual
