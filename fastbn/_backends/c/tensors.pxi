# The express lane for calls of torch's layers: plain tensors are recognized through DLPack's exchange API, since their
# methods would take longer than a small call. For any other call, a function here returns None and has changed nothing.

cdef extern from *:
    """
    typedef struct {  /* DLTensor */
        void *data;
        int32_t device, device_number, ndim;
        uint8_t kind, bits;
        uint16_t lanes;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } fbn_tensor;
    typedef struct {  /* DLPackExchangeAPI of major version 1 */
        uint32_t major, minor;
        void *earlier, *allocate, *own, *give;
        int (*look)(void *object, fbn_tensor *tensor);
    } fbn_exchange;
    """
    ctypedef struct fbn_tensor:
        char *data
        int device, ndim
        unsigned char kind, bits
        int64_t *shape
        int64_t *strides
        size_t byte_offset
    ctypedef struct fbn_exchange:
        unsigned int major
        int (*look)(void *object, fbn_tensor *tensor) except -1

# The bounds _LOW (an address) and _HUGE (bytes) of fastbn/torch/tensors.py, which explains them.
cdef size_t LOW = 4294967296
cdef int64_t HUGE = 4194304

cdef enum:  # DLPack's numbers
    CPU = 1
    FLOAT = 2
    BFLOAT = 4


cdef bint are_alike(const fbn_tensor *t, const fbn_tensor *other) noexcept nogil:
    """Whether two tensors have the same dtype and shape."""
    cdef int i
    if t.kind != other.kind or t.bits != other.bits or t.ndim != other.ndim:
        return False
    for i in range(t.ndim):
        if t.shape[i] != other.shape[i]:
            return False
    return True


cdef bint is_dense(const fbn_tensor *t, bint last) noexcept nogil:
    """Whether a tensor is contiguous, or, if `last`, would be with axis 1, the channels, after the others."""
    cdef int64_t values = 1
    cdef int i, axis
    for i in range(t.ndim - 1, -1, -1):
        axis = i if not last or i == 0 else 1 if i == t.ndim - 1 else i + 1
        if t.shape[axis] != 1 and t.strides[axis] != values:
            return False
        values *= t.shape[axis]
    return True


cdef int dtype_of_tensor(const fbn_tensor *t) noexcept nogil:
    """The dtype by its number in fastbn.h; -1 if data may not have that dtype."""
    if t.kind == BFLOAT:
        return c.FBN_BF16 if t.bits == 16 else -1
    if t.kind != FLOAT:
        return -1
    return c.FBN_F32 if t.bits == 32 else c.FBN_F64 if t.bits == 64 else c.FBN_F16 if t.bits == 16 else -1


cdef void set_problem_of_tensor(c.fbn_problem *p, const fbn_tensor *x, bint last) noexcept:
    """Sets the dtype and the sizes of x, which is dense; as in `set_sizes`, a single channel is one plane."""
    cdef int i
    p.dtype, p.outer, p.channels, p.inner = <c.fbn_dtype> dtype_of_tensor(x), x.shape[0], x.shape[1], 1
    for i in range(2, x.ndim):
        p.inner *= x.shape[i]
    if last:
        p.outer, p.inner = p.outer * p.inner, 1
    if p.channels == 1:
        p.outer, p.inner = 1, p.outer * p.inner


cdef bint is_per_channel(const fbn_tensor *t, int64_t channels, c.fbn_dtype dtype) noexcept nogil:
    """Whether a tensor is absent, or contiguous with one value of this dtype per channel."""
    return t.data == NULL or (
        t.ndim == 1 and t.shape[0] == channels and is_dense(t, False) and dtype_of_tensor(t) == dtype
    )


cdef class Place:
    """A call that `Tensors.place` has found to be plain: addresses, which keep no tensor alive, and sizes."""

    cdef Call call
    cdef bint last
    cdef int axes
    cdef cnp.ndarray saved


cdef class Tensors:
    """Calls on plain tensors: of these two classes, in the CPU's memory, aligned, and not negated lazily.

    Data is dense and in one memory order, which is contiguous or has the channels last. Values per channel are
    contiguous and may have any dtype. select(None) is `backend` where calls use this one; `environment` is what it
    depends on, a module's names. empty_like(tensor) makes a tensor like the given one, and large_like one of HUGE bytes
    or more. threads() gives the number of threads. count(tensor) adds one to it. `axes` are the numbers of axes that
    functions which check an input let pass. Calls are watched if one of watchers() is true, or a level of forward_ad,
    a module's names, is entered. has_modes(tensor) is whether functions of torch are overridden. `apply` calls the
    Function whose forward and backward are those of `node`.
    """

    cdef object tensor, parameter, is_negated, select, backend, is_usual, empty_like, large_like, threads, count
    cdef object has_modes, is_grad_enabled
    cdef public object apply
    cdef dict environment, forward_ad, axes
    cdef tuple watchers
    cdef const fbn_exchange *exchange

    def __init__(
        self, tensor, parameter, *, select, backend, dict environment, empty_like, large_like, threads, count,
        dict axes, tuple watchers, dict forward_ad, has_modes, is_grad_enabled,
    ):
        self.tensor, self.parameter, self.is_negated = tensor, parameter, tensor.is_neg
        self.select, self.backend, self.environment, self.is_usual = select, backend, environment, None
        self.empty_like, self.large_like, self.threads, self.count = empty_like, large_like, threads, count
        self.axes, self.watchers, self.forward_ad = axes, watchers, forward_ad
        self.has_modes, self.is_grad_enabled = has_modes, is_grad_enabled
        self.exchange = <const fbn_exchange *> PyCapsule_GetPointer(
            tensor.__dlpack_c_exchange_api__, "dlpack_exchange_api"
        )
        if self.exchange.major != 1 or self.exchange.look == NULL:  # another layout of the struct
            self.exchange = NULL

    cdef bint is_chosen(self) except -1:
        """Whether calls use this backend. If nobody has chosen one, that does not change once it is known."""
        name = get_value(self.environment["chosen_here"]) or self.environment["chosen"]
        if name is not None:
            return name == "c"
        if self.is_usual is None:
            self.is_usual = self.select(None) is self.backend
        return self.is_usual

    cdef bint is_watched(self) except -1:
        for watches in self.watchers:
            if watches():
                return True
        return <int> self.forward_ad["_current_level"] >= 0

    cdef bint look(self, object value, fbn_tensor *t, bint is_new=False) except -1:
        """Fills t for a plain tensor of any strides, or sets t.data to NULL for None; False for others.

        A new tensor is not negated.
        """
        t.data = NULL
        if value is None:
            return True
        if self.exchange == NULL or not (type(value) is self.tensor or type(value) is self.parameter):
            return False
        if not is_new and self.is_negated(value):
            return False
        try:
            self.exchange.look(<void *> value, t)
        except RuntimeError:  # the tensor has no memory
            return False
        t.data += t.byte_offset
        return (
            t.device == CPU and <size_t> t.data >= LOW and dtype_of_tensor(t) >= 0
            and not <size_t> t.data & ((t.bits >> 3) - 1)
        )

    cdef bint look_at_x(self, object x, fbn_tensor *t, c.fbn_problem *p, bint *last) except -1:
        """Sets a problem's dtype and sizes, and whether the channels are last; False if x is empty or not plain."""
        if not self.look(x, t) or t.data == NULL or t.ndim < 2:
            return False
        last[0] = not is_dense(t, False)
        if last[0] and not is_dense(t, True):
            return False
        set_problem_of_tensor(p, t, last[0])
        return values_of(p) > 0

    cdef bint take(self, object value, const fbn_tensor *x, bint last, void **data, bint is_new=False) except -1:
        """Sets data to that of a plain tensor of x's dtype, shape and order, or to NULL for None; False for others."""
        cdef fbn_tensor t
        if not self.look(value, &t, is_new):
            return False
        data[0] = t.data
        return t.data == NULL or (are_alike(&t, x) and is_dense(&t, last))

    cdef bint take_pair(
        self, object first, object second, int64_t channels, void **a, void **b, c.fbn_dtype *dtype
    ) except -1:
        """Sets the data and the dtype of two tensors of one value per channel, or NULL for None; False for others."""
        cdef fbn_tensor s, t
        if not (self.look(first, &s) and self.look(second, &t)):
            return False
        a[0], b[0] = s.data, t.data
        if s.data != NULL:
            dtype[0] = <c.fbn_dtype> dtype_of_tensor(&s)
        elif t.data != NULL:
            dtype[0] = <c.fbn_dtype> dtype_of_tensor(&t)
        return is_per_channel(&s, channels, dtype[0]) and is_per_channel(&t, channels, dtype[0])

    cpdef Place place(self, x, residual, gamma, beta, mean, var, channels, bint batch):
        """Returns a Place for `normalize`, or None. Batch statistics need two values per channel."""
        cdef fbn_tensor t
        cdef Place found = Place.__new__(Place)
        cdef Call *call = &found.call
        if type(channels) is not int or not self.look_at_x(x, &t, &call.problem, &found.last):
            return None
        if t.shape[1] != channels or (batch and call.problem.outer * call.problem.inner < 2):
            return None
        call.parameters.dtype = call.statistics_dtype = statistics_dtype(&call.problem)
        call.x, found.axes = t.data, t.ndim
        if not (
            self.take(residual, &t, found.last, &call.residual)
            and self.take_pair(
                gamma, beta, t.shape[1], <void **> &call.parameters.gamma, <void **> &call.parameters.beta,
                &call.parameters.dtype,
            )
            and self.take_pair(mean, var, t.shape[1], &call.mean, &call.var, &call.statistics_dtype)
        ):
            return None
        set_bytes(call)
        call.statistics = call.mean != NULL
        return found

    cdef object new(self, object x, const c.fbn_problem *p):
        """A new tensor like x, which is that of the problem."""
        return self.empty_like(x) if values_of(p) * <int64_t> element(p.dtype) < HUGE else self.large_like(x)

    def normalize(self, Place where, x, double momentum, double eps, activation, bint training, bint keeps):
        """Returns y and the rows `saved`, which are None in inference without `keeps`; or None for other calls.

        `where` is the place of x and of the other tensors, and `training` what `place` was told.
        """
        y = self.normalized(where, x, momentum, eps, activation, training, keeps)
        return None if y is None else (y, where.saved)

    cdef object normalized(
        self, Place where, object x, double momentum, double eps, object activation, bint training, bint keeps
    ):
        """The same, with the rows in where.saved."""
        cdef Call *call = &where.call
        cdef fbn_tensor t
        if not (0 <= momentum <= 1 and 0 <= eps < 1e300) or call.statistics != (call.var != NULL):
            return None
        if not (are_apart(call) if training else call.statistics) or not set_activation(&call.problem, activation):
            return None
        y = self.new(x, &call.problem)
        if not (self.look(x, &t, True) and self.take(y, &t, where.last, &call.y, True)):
            return None
        call.eps, call.problem.machine = eps, machine
        set_threads(&call.problem, self.threads)
        if training or keeps:
            where.saved = empty(c.FBN_SAVED_ROWS, call.problem.channels, cnp.NPY_FLOAT64)
        normalize(call, training, momentum, 1, where.saved)
        return y

    def call(self, layer, x, residual, activation):
        """What `forward` of a layer returns, for a plain call in eager code; or None, with nothing done, for others.

        Only what is usual is known here: parameters and buffers in their places, numbers that are floats.
        """
        cdef dict parameters = attribute(layer, "_parameters"), buffers = attribute(layer, "_buffers")
        cdef bint training = attribute(layer, "training") and attribute(layer, "_learns"), tracks, batch
        eps, momentum = attribute(layer, "eps"), attribute(layer, "momentum")
        try:
            gamma, beta, number = parameters["weight"], parameters["bias"], buffers["num_batches_tracked"]
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:
            return None
        tracks, batch = training and attribute(layer, "track_running_stats"), training or mean is None
        if not (is_number(eps, 5e-324, 1e300) and is_number(momentum, 0, 1)) or (mean is None) != (var is None):
            return None
        if training and not tracks and mean is not None or requires_gradient(mean) or requires_gradient(var):
            return None
        if activation is None:
            activation = attribute(layer, "activation")
        elif type(activation) is not str or activation not in ACTIVATIONS:
            return None
        if not self.is_chosen() or self.is_watched() or self.has_modes(x):
            return None
        where = self.place(x, residual, gamma, beta, mean, var, attribute(layer, "num_features"), batch)
        if where is None:
            return None
        check = attribute(layer, "_check_input_dim")
        if not PyMethod_Check(check) or where.axes not in self.axes.get(<object> PyMethod_GET_FUNCTION(check), ()):
            check(x)
        differentiable = self.is_grad_enabled() and (
            requires_gradient(x) or requires_gradient(gamma) or requires_gradient(beta) or requires_gradient(residual)
        )
        y = None if differentiable else self.normalized(where, x, momentum, eps, activation, batch, False)
        if y is None and not differentiable:
            return None
        if tracks and number is not None:  # before the call of `apply`, which checkpointing may leave early
            self.count(number)
        if differentiable:
            y = self.apply(x, residual, gamma, beta, (where, mean, var, batch, momentum, eps, activation))
        return y

    def node(self, forward, backward):
        """The forward and backward of a Function; these functions do their work in calls that are not plain."""
        def plain_forward(ctx, x, residual, gamma, beta, tuple rest):
            y = self.forward(ctx, x, residual, gamma, beta, rest)
            return forward(ctx, x, residual, gamma, beta, rest) if y is None else y

        def plain_backward(ctx, dy):
            found = self.backward(ctx, dy)
            return backward(ctx, dy) if found is None else found

        return plain_forward, plain_backward

    cdef object forward(self, object ctx, object x, object residual, object gamma, object beta, tuple rest):
        """Does the work of the Function's forward, and returns y; or does nothing, and returns None."""
        cdef Place where
        if type(rest[0]) is not Place:
            return None
        where, _, _, training, momentum, eps, activation = rest
        try:
            of_gamma, of_beta = 0 if gamma is None else gamma._version, 0 if beta is None else beta._version
        except RuntimeError:  # of inference tensors
            return None
        y = self.normalized(where, x, momentum, eps, activation, training, True)
        if y is not None:
            ctx.kept = where.saved, gamma, beta, training, activation, eps, of_gamma, of_beta
            ctx.to_save = (x,) if residual is None else (x, residual)
        return y

    cdef tuple backward(self, object ctx, object dy):
        """Does the work of the Function's backward for a gradient that nobody watches, or returns None."""
        cdef tuple tensors
        if self.is_grad_enabled() or self.is_watched() or not self.is_chosen():
            return None
        tensors = ctx.saved_tensors
        saved, gamma, beta, training, activation, _, _, _ = ctx.kept
        residual = tensors[1] if len(tensors) == 2 else None
        return self.differentiate(
            dy, tensors[0], residual, gamma, beta, saved, training, activation, ctx.needs_input_grad
        )

    cdef object new_per_channel(self, object like, int64_t channels, fbn_tensor *t):
        """A new tensor like one of a value per channel, and what it is; t.data is NULL if it is not plain."""
        made = self.empty_like(like)
        if not (self.look(made, t, True) and is_per_channel(t, channels, <c.fbn_dtype> dtype_of_tensor(t))):
            t.data = NULL
        return made

    cdef tuple differentiate(
        self, object dy, object x, object residual, object gamma, object beta, object saved, bint training,
        object activation, tuple wanted,
    ):
        """Returns the gradients of x, residual, gamma and beta, and a None; or None for other calls.

        A gradient that is not wanted is None. The gradients of gamma and beta have the dtypes of gamma and beta.
        """
        cdef c.fbn_problem p = NO_PROBLEM
        cdef c.fbn_backward_args a = NO_BACKWARD
        cdef fbn_tensor t, of_gamma, of_beta
        cdef bint last, for_x = wanted[0], for_residual = wanted[1], activates = activation is not None
        cdef bint maps = for_x or for_residual and activates
        if not (self.look_at_x(x, &t, &p, &last) and set_activation(&p, activation) and is_saved(saved, p.channels)):
            return None
        if training and p.outer * p.inner < 2 or not self.take(dy, &t, last, &a.dy) or a.dy == NULL:
            return None
        if not self.take(residual, &t, last, &a.residual):
            return None
        a.x = t.data
        dx = self.new(x, &p) if maps else None
        dresidual = self.new(x, &p) if maps and activates and residual is not None else None
        if not (self.take(dx, &t, last, &a.dx, True) and self.take(dresidual, &t, last, &a.dresidual, True)):
            return None
        dgamma = self.new_per_channel(gamma, p.channels, &of_gamma) if wanted[2] else None
        dbeta = self.new_per_channel(beta, p.channels, &of_beta) if wanted[3] else None
        if (wanted[2] and of_gamma.data == NULL) or (wanted[3] and of_beta.data == NULL):
            return None
        p.machine = machine
        set_threads(&p, self.threads)
        for_gamma = room_for(dgamma, &of_gamma, &p, &a.dgamma)
        for_beta = room_for(dbeta, &of_beta, &p, &a.dbeta)
        if maps:
            differentiate(&p, &a, saved, not training)
        else:
            sum_up(&p, &a, saved)
        if for_gamma is not None:
            put_all(&of_gamma, a.dgamma, &p)
        if for_beta is not None:
            put_all(&of_beta, a.dbeta, &p)
        return dx if for_x else None, (dresidual if activates else dy) if for_residual else None, dgamma, dbeta, None


cdef object attribute(object layer, object name):
    """An attribute of a module, without its slow __getattr__."""
    return PyObject_GenericGetAttr(layer, name)


cdef bint requires_gradient(object tensor) except -1:
    return tensor is not None and tensor.requires_grad


cdef int sum_up(const c.fbn_problem *p, const c.fbn_backward_args *a, cnp.ndarray saved) except -1:
    """Computes dgamma and dbeta alone."""
    cdef c.fbn_sums_args s = NO_SUMS
    cdef cnp.ndarray sums = empty(2, p.channels, cnp.NPY_FLOAT64)
    cdef const double *rows = <const double *> cnp.PyArray_DATA(sums)
    cdef int64_t i
    s.dy, s.x, s.residual, s.saved = a.dy, a.x, a.residual, <double *> cnp.PyArray_DATA(saved)
    s.sums = <double *> rows
    run(p, &s)
    for i in range(p.channels):
        if a.dgamma != NULL:
            put(a.dgamma, i, rows[p.channels + i], statistics_dtype(p))
        if a.dbeta != NULL:
            put(a.dbeta, i, rows[i], statistics_dtype(p))
    return 0


cdef object room_for(object tensor, const fbn_tensor *t, const c.fbn_problem *p, void **data):
    """Sets data to a tensor's, or to that of an array, which is returned, unless it has the statistics dtype."""
    cdef cnp.ndarray array
    if tensor is None:
        return None
    data[0] = t.data
    if dtype_of_tensor(t) == statistics_dtype(p):
        return None
    array = empty(0, p.channels, cnp.NPY_FLOAT64 if p.dtype == c.FBN_F64 else cnp.NPY_FLOAT32)
    data[0] = cnp.PyArray_DATA(array)
    return array


cdef void put_all(const fbn_tensor *t, const void *values, const c.fbn_problem *p) noexcept:
    """Fills a tensor with values of the statistics dtype."""
    cdef int64_t i
    for i in range(p.channels):
        put(t.data, i, value_at(values, i, statistics_dtype(p)), <c.fbn_dtype> dtype_of_tensor(t))
