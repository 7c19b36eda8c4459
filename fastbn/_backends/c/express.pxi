# The express lane: plain calls go to C at once, since checking them in Python would cost more than a small call itself.
#
# In a plain call all arguments are valid, the arrays are dense, of one native dtype and one memory order (any), with
# channels on any axis, and what is written overlaps no other array. Without `out`, arrays that are not dense, or of
# another memory order than x, may be copied here if they are small. For any other call, a function here returns None
# and has changed nothing. The call then goes through the front desk (fastbn/ops.py). The express lane therefore has no
# error messages, and its results are those of the front desk.


cdef enum:
    MOST_AXES = 64  # that a NumPy array may have
    PIECE = 524288  # the most values of an array that the front desk, too, copies as a whole (fastbn/call/blocks.py)

cdef object may_share_memory = np.may_share_memory

# What usual options are, and the codes of activations and their default slopes, or 0 where they have none, by name.
cdef object OPTIONS = Options
cdef dict KNOWN = USUAL
cdef dict ACTIVATIONS = {name: tuple(options.checked()) for name, options in USUAL.items()}


cdef int set_activation(c.fbn_problem *p, object activation) except -1:
    """Sets the activation of this name, with its default slope, or that of a (name, slope). False for anything else."""
    cdef tuple known
    cdef object slope = None
    if type(activation) is tuple and len(<tuple> activation) == 2:
        activation, slope = <tuple> activation
        if not is_number(slope, -INFINITY, INFINITY):
            return False
    known = ACTIVATIONS.get(activation) if activation is None or type(activation) is str else None
    if known is None or slope is not None and known[1] == 0:
        return False
    p.activation, p.slope = <c.fbn_activation> <int> known[0], <double> (known[1] if slope is None else slope)
    return True


cdef object usual_activation(object options):
    """The activation in options that are one of USUAL or, beside a (name, slope), have no other value; for others,
    something that `set_activation` refuses."""
    if type(options) is OPTIONS:
        activation = (<tuple> options)[0]
        if (activation is None or type(activation) is str) and KNOWN.get(activation) is options:
            return activation
        if type(activation) is tuple and len(<tuple> options) == 2 and is_number((<tuple> options)[1], 0, 0):
            return activation
    return NotImplemented


cdef void set_sizes(c.fbn_problem *p, const cnp.npy_intp *shape, int ndim, int axis) noexcept:
    """Sets (outer, channels, inner) from a shape in memory order without zeros, with channels on this axis.

    As in fastbn/call/shape.py, a single channel is one contiguous plane, whichever axis it is on.
    """
    cdef int i
    cdef int64_t outer = 1, inner = 1
    for i in range(axis):
        outer *= shape[i]
    for i in range(axis + 1, ndim):
        inner *= shape[i]
    p.outer, p.channels, p.inner = outer, shape[axis], inner
    if p.channels == 1:
        p.outer, p.inner = 1, outer * inner


cdef inline int64_t values_of(const c.fbn_problem *p) noexcept:
    return p.outer * p.channels * p.inner


cdef int order_in_memory(cnp.ndarray x, int axis, cnp.npy_intp *shape) noexcept:
    """Writes x's shape in memory order, axes of length 1 first. Returns the place of `axis`; -1 if x is not dense."""
    cdef int i, at = 0, left = cnp.PyArray_NDIM(x)
    cdef cnp.npy_intp step = cnp.PyArray_ITEMSIZE(x), size = cnp.PyArray_NBYTES(x)
    while step < size:
        for i in range(cnp.PyArray_NDIM(x) - 1, -1, -1):
            if cnp.PyArray_STRIDE(x, i) == step and cnp.PyArray_DIM(x, i) > 1:
                break
        else:
            return -1
        left -= 1
        shape[left] = cnp.PyArray_DIM(x, i)
        if i == axis:
            at = left
        step *= shape[left]
    for i in range(left):
        shape[i] = 1
    return at


cdef bint recognize(c.fbn_problem *p, object x, long axis) noexcept:
    """Sets the dtype and the sizes of a plain x, channels on this axis; False if it is empty or not plain."""
    cdef cnp.ndarray array
    cdef cnp.npy_intp turned[MOST_AXES]
    cdef const cnp.npy_intp *shape
    cdef int ndim
    if type(x) is not cnp.ndarray:
        return False
    array, ndim = x, cnp.PyArray_NDIM(<cnp.ndarray> x)
    axis += ndim if axis < 0 else 0
    if ndim < 2 or not 0 <= axis < ndim or not set_dtype(p, cnp.PyArray_TYPE(array)):
        return False
    if not cnp.PyArray_ISBEHAVED_RO(array):
        return False
    shape = cnp.PyArray_DIMS(array)
    if not cnp.PyArray_IS_C_CONTIGUOUS(array):  # arrays without values always are
        axis, shape = order_in_memory(array, <int> axis, turned), turned
        if axis < 0:
            return False
    set_sizes(p, shape, ndim, <int> axis)
    return values_of(p) > 0


cdef bint is_like(object value, cnp.ndarray x) noexcept:
    """Whether a value is a plain array of x's dtype, shape and strides."""
    cdef cnp.ndarray array
    cdef int i, ndim = cnp.PyArray_NDIM(x)
    if type(value) is not cnp.ndarray:
        return False
    array = value
    if (
        cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x)
        or cnp.PyArray_NDIM(array) != ndim
        or not cnp.PyArray_ISBEHAVED_RO(array)
    ):
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(array, i) != cnp.PyArray_DIM(x, i):
            return False
        if cnp.PyArray_STRIDE(array, i) != cnp.PyArray_STRIDE(x, i) and cnp.PyArray_DIM(x, i) > 1:
            return False
    return True


cdef bint is_data(object value) noexcept:
    """Whether a value is an array of a dtype that data may have, and not of a subclass."""
    cdef c.fbn_problem p
    return type(value) is cnp.ndarray and set_dtype(&p, cnp.PyArray_TYPE(<cnp.ndarray> value))


cdef object dense(object x):
    """A copy of x in x's memory order if x is not dense, not large, and has positive strides; else x itself."""
    cdef cnp.ndarray array
    cdef cnp.npy_intp shape[MOST_AXES]
    cdef int i
    if not is_data(x):
        return x
    array = x
    if cnp.PyArray_IS_C_CONTIGUOUS(array) or cnp.PyArray_SIZE(array) > PIECE or order_in_memory(array, 0, shape) >= 0:
        return x
    for i in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_STRIDE(array, i) <= 0 and cnp.PyArray_DIM(array, i) > 1:
            return x
    return cnp.PyArray_NewCopy(array, cnp.NPY_KEEPORDER) if cnp.PyArray_ISBEHAVED_RO(array) else x


cdef object alike(object value, object x):
    """A copy of an array of x's dtype and shape in x's memory order, if it has another; else the value."""
    cdef cnp.ndarray copy
    cdef int i
    if not is_data(value) or not is_data(x) or is_like(value, x):
        return value
    if cnp.PyArray_SIZE(x) > PIECE or cnp.PyArray_TYPE(value) != cnp.PyArray_TYPE(x):
        return value
    if cnp.PyArray_NDIM(value) != cnp.PyArray_NDIM(x) or not cnp.PyArray_ISBEHAVED_RO(value):
        return value
    for i in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_DIM(value, i) != cnp.PyArray_DIM(x, i):
            return value
    copy = empty_like(x)
    cnp.PyArray_CopyInto(copy, value)
    return copy


cdef bint may_share(object a, object b) except -1:
    """Whether the memory of two arrays, or None, may overlap: whether their first to last bytes do."""
    return a is not None and b is not None and <bint> may_share_memory(a, b)


cdef bint is_plain(object value, int dtype) noexcept:
    """Whether a value is a C-contiguous, aligned, native array of this dtype, and not of a subclass."""
    return type(value) is cnp.ndarray and is_ready(value, dtype)


cdef int set_problem(c.fbn_problem *p, object x, object axis, object activation, object threads) except -1:
    """Fills p for a plain x; False if it is not plain. threads() gives the number of threads to use."""
    cdef int overflow = 0
    cdef long channel_axis
    if type(axis) is not int:
        return False
    channel_axis = PyLong_AsLongAndOverflow(axis, &overflow)
    if overflow or not recognize(p, x, channel_axis) or not set_activation(p, activation):
        return False
    p.machine = machine
    return set_threads(p, threads)


cdef inline bint set_threads(c.fbn_problem *p, object threads) except False:
    """Sets p.threads to threads(), or to 1 without that call if the problem is too small for two threads."""
    p.threads = 1 if values_of(p) < 2 * c.FBN_WORK_PER_THREAD else threads()
    return True


cdef bint take_channels(object value, int dtype, int64_t channels, void **data) noexcept:
    """Sets data to a plain (channels,) array's of this dtype, or to NULL for None; False for others."""
    data[0] = NULL
    if value is None:
        return True
    if not is_plain(value, dtype):
        return False
    data[0] = cnp.PyArray_DATA(<cnp.ndarray> value)
    return cnp.PyArray_NDIM(<cnp.ndarray> value) == 1 and cnp.PyArray_DIM(<cnp.ndarray> value, 0) == channels


cdef bint take_pair(
    object first, object second, const c.fbn_problem *p, void **a, void **b, c.fbn_dtype *dtype
) noexcept:
    """Sets a, b and dtype to those of two plain (channels,) arrays, or NULL for None; False for others.

    Both have the statistics dtype, or both float64.
    """
    cdef object given = second if first is None else first
    cdef bint wide = type(given) is cnp.ndarray and cnp.PyArray_TYPE(<cnp.ndarray> given) == cnp.NPY_FLOAT64
    cdef int number = cnp.NPY_FLOAT64 if wide or p.dtype == c.FBN_F64 else cnp.NPY_FLOAT32
    dtype[0] = c.FBN_F64 if number == cnp.NPY_FLOAT64 else c.FBN_F32
    return take_channels(first, number, p.channels, a) and take_channels(second, number, p.channels, b)


cdef bint take_like(object value, cnp.ndarray x, void **data) noexcept:
    """Sets data to that of a plain array like x, or to NULL for None; False for others."""
    data[0] = NULL
    if value is None:
        return True
    if not is_like(value, x):
        return False
    data[0] = cnp.PyArray_DATA(<cnp.ndarray> value)
    return True


cdef inline bint apart(const void *a, int64_t a_bytes, const void *b, int64_t b_bytes) noexcept:
    return b == NULL or <char *> a + a_bytes <= <char *> b or <char *> b + b_bytes <= <char *> a


cdef inline bint is_number(object value, double low, double high) noexcept:
    return PyFloat_CheckExact(value) and low <= PyFloat_AS_DOUBLE(value) <= high and isfinite(PyFloat_AS_DOUBLE(value))


cdef inline cnp.ndarray empty_like(cnp.ndarray x):
    """A new array of x's shape and dtype, in x's memory order."""
    return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)


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
    c.fbn_dtype statistics_dtype
    void *y
    int64_t bytes
    int64_t parameter_bytes
    int64_t statistic_bytes
    double eps
    bint statistics


cdef Call NO_CALL


cdef inline c.fbn_dtype statistics_dtype(const c.fbn_problem *p) noexcept:
    return c.FBN_F64 if p.dtype == c.FBN_F64 else c.FBN_F32


cdef void set_bytes(Call *call) noexcept:
    """Sets the bytes of the arrays of a problem, whose dtypes are known."""
    cdef const c.fbn_problem *p = &call.problem
    call.bytes = values_of(p) * element(p.dtype)
    call.parameter_bytes = p.channels * element(call.parameters.dtype)
    call.statistic_bytes = p.channels * element(call.statistics_dtype)


cdef int take(
    Call *call, object x, object gamma, object beta, object mean, object var, object eps, object axis,
    object activation, object residual, object out, object threads,
) except -1:
    """Fills `call` for a plain call. False if it is not plain, or `out` shares memory with an array other than x."""
    if not set_problem(&call.problem, x, axis, activation, threads) or not is_number(eps, 0, 1e300):
        return False
    call.x = cnp.PyArray_DATA(<cnp.ndarray> x)
    if not (
        take_pair(
            gamma, beta, &call.problem, <void **> &call.parameters.gamma, <void **> &call.parameters.beta,
            &call.parameters.dtype,
        )
        and take_pair(mean, var, &call.problem, &call.mean, &call.var, &call.statistics_dtype)
        and take_like(residual, x, &call.residual)
        and take_like(out, x, &call.y)
    ):
        return False
    set_bytes(call)
    call.statistics = call.mean != NULL
    if call.statistics != (call.var != NULL):
        return False
    call.eps = PyFloat_AS_DOUBLE(eps)
    return call.y == NULL or (
        cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out)
        and apart_from_inputs(call, call.y, call.bytes)
        and apart(call.y, call.bytes, call.mean, call.statistic_bytes)
        and apart(call.y, call.bytes, call.var, call.statistic_bytes)
    )


cdef bint apart_from_inputs(const Call *call, const void *data, int64_t size) noexcept:
    """Whether `data` shares no memory with residual, gamma and beta."""
    return (
        apart(data, size, call.residual, call.bytes)
        and apart(data, size, call.parameters.gamma, call.parameter_bytes)
        and apart(data, size, call.parameters.beta, call.parameter_bytes)
    )


cdef bint may_update(const Call *call, object mean, object var) noexcept:
    """Whether the running statistics are absent, or writable and without memory shared as in `are_apart`."""
    return not call.statistics or (
        cnp.PyArray_ISWRITEABLE(<cnp.ndarray> mean)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> var)
        and are_apart(call)
    )


cdef bint are_apart(const Call *call) noexcept:
    """Whether the running statistics, if present, share no memory with each other or with an input."""
    return not call.statistics or (
        apart(call.mean, call.statistic_bytes, call.var, call.statistic_bytes)
        and apart(call.mean, call.statistic_bytes, call.x, call.bytes)
        and apart(call.var, call.statistic_bytes, call.x, call.bytes)
        and apart_from_inputs(call, call.mean, call.statistic_bytes)
        and apart_from_inputs(call, call.var, call.statistic_bytes)
    )


def express_infer(
    object x, object gamma, object beta, object mean, object var, object eps, object axis, object activation,
    object residual, object out, object threads,
):
    """Returns y, or None if the call is not plain."""
    cdef Call call = NO_CALL
    if out is None:
        x = dense(x)
        residual = alike(residual, x)
    if not take(&call, x, gamma, beta, mean, var, eps, axis, activation, residual, out, threads):
        return None
    if not call.statistics or not (call.y == call.x or call.y == NULL or apart(call.y, call.bytes, call.x, call.bytes)):
        return None
    if out is None:
        out = empty_like(x)
        call.y = cnp.PyArray_DATA(<cnp.ndarray> out)
    normalize(&call, False, 0, 0, None)
    return out


cdef int normalize(const Call *call, bint training, double momentum, double correction, cnp.ndarray saved) except -1:
    """Runs a call. saved may be None where training is False."""
    cdef c.fbn_forward_args a = NO_FORWARD
    cdef c.fbn_infer_args b = NO_INFER
    cdef double *rows = NULL if saved is None else <double *> cnp.PyArray_DATA(saved)
    if training:
        a.x, a.residual, a.parameters, a.eps = call.x, call.residual, call.parameters, call.eps
        a.running.mean, a.running.var, a.running.dtype = call.mean, call.var, call.statistics_dtype
        a.running.momentum, a.running.correction, a.y, a.saved = momentum, correction, call.y, rows
        return run(&call.problem, &a)
    b.x, b.residual, b.parameters, b.eps = call.x, call.residual, call.parameters, call.eps
    b.statistics.mean, b.statistics.var, b.statistics.dtype = call.mean, call.var, call.statistics_dtype
    b.y, b.saved = call.y, rows
    return run(&call.problem, &b)


def express_forward(
    object x, object gamma, object beta, object mean, object var, object momentum, object correction, object eps,
    object axis, object activation, object residual, object out, bint training, object threads,
):
    """Returns (y, saved), or None if the call is not plain."""
    cdef Call call = NO_CALL
    cdef cnp.ndarray saved
    given_x, given_residual = x, residual
    if out is None:
        x = dense(x)
        residual = alike(residual, x)
    if not take(&call, x, gamma, beta, mean, var, eps, axis, activation, residual, out, threads):
        return None
    if not is_number(momentum, 0, 1) or not (may_update(&call, mean, var) if training else call.statistics):
        return None
    if training and (
        x is not given_x and (may_share(given_x, mean) or may_share(given_x, var))
        or residual is not given_residual and (may_share(given_residual, mean) or may_share(given_residual, var))
    ):
        return None
    if not is_correction(correction, call.problem.outer * call.problem.inner if training else 1 << 62):
        return None
    if call.y != NULL and not apart(call.y, call.bytes, call.x, call.bytes):
        return None
    if out is None:
        out = empty_like(x)
        call.y = cnp.PyArray_DATA(<cnp.ndarray> out)
    saved = empty(c.FBN_SAVED_ROWS, call.problem.channels, cnp.NPY_FLOAT64)
    normalize(&call, training, PyFloat_AS_DOUBLE(momentum), <long> correction, saved)
    return out, saved


cdef bint is_correction(object value, int64_t count) noexcept:
    """Whether a value is an integer from 0 to count - 1, and count is at least 2."""
    cdef int overflow = 0
    cdef long number
    if type(value) is not int or count < 2:
        return False
    number = PyLong_AsLongAndOverflow(value, &overflow)
    return not overflow and 0 <= number < count


cdef bint is_saved(object value, int64_t channels) noexcept:
    """Whether a value is a plain array of the shape that a forward call on so many channels saves."""
    return (
        is_plain(value, cnp.NPY_FLOAT64) and cnp.PyArray_NDIM(<cnp.ndarray> value) == 2
        and cnp.PyArray_DIM(<cnp.ndarray> value, 0) == c.FBN_SAVED_ROWS
        and cnp.PyArray_DIM(<cnp.ndarray> value, 1) == channels
    )


def express_backward(
    object dy, object x, object residual, object saved, object axis, object frozen, object options,
    object has_gamma, object has_beta, object out, object threads,
):
    """Returns (dx, dgamma, dbeta, dresidual), or None if the call is not plain."""
    cdef c.fbn_problem p = NO_PROBLEM
    cdef c.fbn_backward_args a = NO_BACKWARD
    cdef void *dy_ = NULL
    cdef void *residual_ = NULL
    cdef int64_t bytes
    cdef int statistics
    given_dy = dy
    if out is None:
        x = dense(x)
        dy, residual = alike(dy, x), alike(residual, x)
    if not set_problem(&p, x, axis, usual_activation(options), threads) or dy is None:
        return None
    if not is_saved(saved, p.channels):
        return None
    if type(frozen) is not bool or type(has_gamma) is not bool or type(has_beta) is not bool:
        return None
    if not (take_like(dy, x, &dy_) and take_like(residual, x, &residual_) and take_like(out, x, &a.dx)):
        return None
    if not frozen and p.outer * p.inner < 2:
        return None
    a.x, a.dy, a.residual = cnp.PyArray_DATA(<cnp.ndarray> x), dy_, residual_
    bytes = cnp.PyArray_NBYTES(<cnp.ndarray> x)
    if a.dx != NULL and not (
        cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out) and apart(a.dx, bytes, a.x, bytes)
        and (a.dx == dy_ or apart(a.dx, bytes, dy_, bytes)) and apart(a.dx, bytes, residual_, bytes)
    ):
        return None
    dresidual = dgamma = dbeta = None
    if residual is not None:
        if p.activation != c.FBN_IDENTITY:
            dresidual = empty_like(x)
        else:
            dresidual = given_dy if a.dx != dy_ else cnp.PyArray_NewCopy(<cnp.ndarray> dy, cnp.NPY_KEEPORDER)
    a.dresidual = NULL if dresidual is None else cnp.PyArray_DATA(<cnp.ndarray> dresidual)
    if out is None:
        out = empty_like(x)
        a.dx = cnp.PyArray_DATA(<cnp.ndarray> out)
    statistics = statistics_of(cnp.PyArray_TYPE(<cnp.ndarray> x))
    if has_gamma:
        dgamma = empty(0, p.channels, statistics)
    if has_beta:
        dbeta = empty(0, p.channels, statistics)
    a.dgamma = NULL if dgamma is None else cnp.PyArray_DATA(<cnp.ndarray> dgamma)
    a.dbeta = NULL if dbeta is None else cnp.PyArray_DATA(<cnp.ndarray> dbeta)
    differentiate(&p, &a, saved, frozen)
    return out, dgamma, dbeta, dresidual


cdef int differentiate(const c.fbn_problem *p, c.fbn_backward_args *a, cnp.ndarray saved, bint frozen) except -1:
    """Runs a gradient without a mask."""
    a.saved, a.frozen = <double *> cnp.PyArray_DATA(saved), frozen
    a.count = <double> p.outer * <double> p.inner
    return run(p, a)
