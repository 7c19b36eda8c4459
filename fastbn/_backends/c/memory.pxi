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


# Plain tensors are examined through DLPack's exchange API: a tensor's methods would take longer than a small call.

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

# The bounds _LOW (an address), _HUGE (bytes) and _SMALL (values) of fastbn/torch/tensors.py, which explains them.
cdef size_t LOW = 4294967296
cdef int64_t HUGE = 4194304
cdef int64_t LITTLE = 16384

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


cdef int64_t elements_of(const fbn_tensor *t) noexcept nogil:
    """The number of values of a contiguous tensor; -1 if it is not contiguous."""
    cdef int64_t values = 1
    cdef int i
    for i in range(t.ndim - 1, -1, -1):
        if t.shape[i] != 1 and t.strides[i] != values:
            return -1
        values *= t.shape[i]
    return values


cdef int number_of(const fbn_tensor *t) noexcept:
    """NumPy's number of a tensor's dtype; -1 if data may not have that dtype."""
    if t.kind == FLOAT and t.bits == 32:
        return cnp.NPY_FLOAT32
    if t.kind == FLOAT and t.bits == 64:
        return cnp.NPY_FLOAT64
    if t.kind == FLOAT and t.bits == 16:
        return cnp.NPY_FLOAT16
    return bfloat16 if t.kind == BFLOAT and t.bits == 16 else -1


cdef class Tensors:
    """Calls on plain tensors: of these classes, contiguous, in the CPU's memory and not negated lazily.

    `exchange` is the classes' __dlpack_c_exchange_api__; empty_like(tensor) makes a tensor like the given one.
    """

    cdef object classes, empty_like, threads
    cdef const fbn_exchange *exchange

    def __init__(self, classes, exchange, empty_like, threads):
        self.classes, self.empty_like, self.threads = classes, empty_like, threads
        self.exchange = <const fbn_exchange *> PyCapsule_GetPointer(exchange, "dlpack_exchange_api")
        if self.exchange.major != 1 or self.exchange.look == NULL:  # another layout of the struct
            self.exchange = NULL

    cdef bint look(self, object value, fbn_tensor *t, bint is_new=False) except -1:
        """Fills t for a plain tensor, or sets t.data to NULL for None; False for others. A new one is not negated."""
        t.data = NULL
        if value is None:
            return True
        if self.exchange == NULL or type(value) not in self.classes or not is_new and value.is_neg():
            return False
        try:
            self.exchange.look(<void *> value, t)
        except RuntimeError:  # the tensor has no memory
            return False
        t.data += t.byte_offset
        return t.device == CPU and <size_t> t.data >= LOW and elements_of(t) >= 0

    cdef bint look_at_data(self, object value, fbn_tensor *t, const fbn_tensor *x, bint is_new=False) except -1:
        """Whether a value is None or a plain tensor of x's dtype and shape."""
        return self.look(value, t, is_new) and (t.data == NULL or are_alike(t, x))

    cdef bint look_at_channels(self, object value, fbn_tensor *t, const fbn_tensor *x, bint is_new=False) except -1:
        """Whether a value is None or a plain tensor of one value for each of x's channels, in the statistics dtype."""
        return self.look(value, t, is_new) and (t.data == NULL or (
            t.ndim == 1 and t.shape[0] == x.shape[1] and t.kind == FLOAT and t.bits == (64 if x.bits == 64 else 32)
        ))

    def place(self, x not None, residual, gamma, beta, mean, var, channels, bint batch):
        """Returns (addresses, shape, 1) for `normalize`, or None. Batch statistics need two values per channel."""
        cdef fbn_tensor t[6]
        if not self.look(x, &t[0]) or number_of(&t[0]) < 0 or t[0].ndim < 2 or type(channels) is not int:
            return None
        if not (
            self.look_at_data(residual, &t[1], &t[0])
            and self.look_at_channels(gamma, &t[2], &t[0])
            and self.look_at_channels(beta, &t[3], &t[0])
            and self.look_at_channels(mean, &t[4], &t[0])
            and self.look_at_channels(var, &t[5], &t[0])
        ):
            return None
        if t[0].shape[1] != channels or (batch and elements_of(&t[0]) <= t[0].shape[1]):
            return None
        addresses = (
            <size_t> t[0].data, <size_t> t[1].data, <size_t> t[2].data, <size_t> t[3].data, <size_t> t[4].data,
            <size_t> t[5].data,
        )
        return addresses, x.shape, 1

    def normalize(
        self, tuple where, x not None, double momentum, double eps, activation, bint training, bint keeps
    ):
        """Returns (y, saved) by `forward_at`, for an x of less than HUGE bytes that `place` has accepted, or None."""
        cdef fbn_tensor t[2]
        addresses, shape, axis = where
        if shape is None or axis != 1 or not 0 <= momentum <= 1 or not self.look(x, &t[0], True):
            return None
        if number_of(&t[0]) < 0 or elements_of(&t[0]) * t[0].bits >= 8 * HUGE:
            return None
        y = self.empty_like(x)
        if not self.look_at_data(y, &t[1], &t[0], True):
            return None
        saved = forward_at(
            number_of(&t[0]), shape, 1, addresses, <size_t> t[1].data, momentum, eps, activation, training, keeps,
            self.threads,
        )
        return None if saved is None else (y, saved)

    def differentiate(
        self, dy not None, x not None, residual, gamma, beta, saved, bint training, activation, tuple wanted
    ):
        """Returns the gradients of x, residual, gamma and beta by `backward_at`, and a None, or None for other calls.

        A gradient that is not wanted is None. The gradients of gamma and beta have the dtypes of gamma and beta.
        """
        cdef fbn_tensor t[7]
        cdef bint for_x = wanted[0], for_residual = wanted[1], activates = activation is not None
        if not (
            self.look(dy, &t[0]) and self.look_at_data(x, &t[1], &t[0]) and self.look_at_data(residual, &t[2], &t[0])
        ):
            return None
        if number_of(&t[0]) < 0 or t[0].ndim < 2 or elements_of(&t[0]) * t[0].bits >= 8 * HUGE:
            return None
        if not (for_x or for_residual and activates) and elements_of(&t[0]) > LITTLE:
            return None
        dx = self.empty_like(x)
        dresidual = self.empty_like(x) if residual is not None and activates else None
        dgamma = self.empty_like(gamma) if wanted[2] else None
        dbeta = self.empty_like(beta) if wanted[3] else None
        if not (
            self.look_at_data(dx, &t[3], &t[0], True)
            and self.look_at_data(dresidual, &t[4], &t[0], True)
            and self.look_at_channels(dgamma, &t[5], &t[0], True)
            and self.look_at_channels(dbeta, &t[6], &t[0], True)
        ):
            return None
        addresses = <size_t> t[0].data, <size_t> t[1].data, <size_t> t[2].data
        if backward_at(
            number_of(&t[0]), dy.shape, 1, addresses, <size_t> t[3].data, saved, not training, activation,
            <size_t> t[5].data, <size_t> t[6].data, <size_t> t[4].data, self.threads,
        ) is None:
            return None
        return dx if for_x else None, (dresidual if activates else dy) if for_residual else None, dgamma, dbeta, None
