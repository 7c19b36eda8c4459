# A plan for the bridge: inference whose constants are computed once. A call of a plain array is nothing but the map.
#
# As in the express lane, None, with nothing done, is the answer to any call that is not plain.


cdef bint is_like(object value, cnp.ndarray x) noexcept:
    """A behaved array, of no subclass, that lies in memory as x does: dtype, shape and strides."""
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


cdef bint is_channels_last(cnp.ndarray x, int axis) noexcept:
    """Whether the channels lie innermost, and the other axes around them in order."""
    cdef int i
    cdef int64_t step = cnp.PyArray_ITEMSIZE(x)
    if cnp.PyArray_STRIDE(x, axis) != step:
        return False
    step *= cnp.PyArray_DIM(x, axis)
    for i in range(cnp.PyArray_NDIM(x) - 1, -1, -1):
        if i == axis or cnp.PyArray_DIM(x, i) == 1:
            continue
        if cnp.PyArray_STRIDE(x, i) != step:
            return False
        step *= cnp.PyArray_DIM(x, i)
    return True


cdef class Plan:
    """Written by the constructor alone, so that calls may run in parallel."""

    cdef c.fbn_machine machine
    cdef c.fbn_problem problem
    cdef void *constants
    cdef int axis
    cdef object threads

    def __cinit__(
        self, cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray mean not None, cnp.ndarray var not None, double eps,
        int axis, int activation, double slope, object threads,
    ):
        """The parameters are as `infer` takes them; the axis may be negative; threads() tells how many may work."""
        cdef c.fbn_plan_args a
        cdef Sizes sizes
        memset(&sizes, 0, sizeof(sizes))
        sizes.channels = mean.shape[0]
        self.machine = machine
        self.axis, self.threads = axis, threads
        self.problem.machine = &self.machine
        self.problem.activation, self.problem.slope = <c.fbn_activation> activation, slope
        self.problem.channels = sizes.channels
        a.size, a.eps = sizeof(a), eps
        a.parameters.dtype = set_pair(gamma, beta, sizes, <void **> &a.parameters.gamma, <void **> &a.parameters.beta)
        a.statistics.dtype = set_pair(mean, var, sizes, <void **> &a.statistics.mean, <void **> &a.statistics.var)
        self.problem.dtype = a.statistics.dtype
        self.constants = malloc(c.fbn_plan_bytes(self.problem.channels))
        if self.constants == NULL:
            raise MemoryError(f"no {c.fbn_plan_bytes(self.problem.channels)} bytes for the plan")
        expect(c.fbn_plan_set(&self.problem, &a, self.constants))

    def __dealloc__(self):
        free(self.constants)

    cdef bint fit(self, c.fbn_problem *p, cnp.ndarray x) noexcept:
        """Fills p for a dense x with values, of these channels and this statistics dtype; False for any other."""
        cdef int i, ndim = cnp.PyArray_NDIM(x), axis = self.axis, dtype = cnp.PyArray_TYPE(x)
        cdef int64_t outer = 1, inner = 1
        axis += ndim if axis < 0 else 0
        if ndim < 2 or axis < 0 or axis >= ndim or cnp.PyArray_DIM(x, axis) != self.problem.channels:
            return False
        if machine.kernels != self.machine.kernels or not cnp.PyArray_ISBEHAVED_RO(x):
            return False
        p[0] = self.problem
        if p.dtype == c.FBN_F64:
            if dtype != cnp.NPY_FLOAT64:
                return False
        elif dtype == cnp.NPY_FLOAT16:
            p.dtype = c.FBN_F16
        elif dtype == bfloat16:
            p.dtype = c.FBN_BF16
        elif dtype != cnp.NPY_FLOAT32:
            return False
        for i in range(axis):
            outer *= cnp.PyArray_DIM(x, i)
        for i in range(axis + 1, ndim):
            inner *= cnp.PyArray_DIM(x, i)
        if cnp.PyArray_IS_C_CONTIGUOUS(x):
            p.outer, p.inner = outer, inner
        else:
            p.outer, p.inner = outer * inner, 1
            if not is_channels_last(x, axis):
                return False
        return p.channels > 0 and outer * inner > 0

    def run(self, object x, object out, object residual):
        """y, or None."""
        cdef c.fbn_problem p
        cdef c.fbn_run_args a
        cdef int64_t bytes
        cdef int status
        if type(x) is not cnp.ndarray or not self.fit(&p, x):
            return None
        a.size, a.residual = sizeof(a), NULL
        a.x, bytes = cnp.PyArray_DATA(<cnp.ndarray> x), cnp.PyArray_NBYTES(<cnp.ndarray> x)
        if residual is not None:
            if not is_like(residual, x):
                return None
            a.residual = cnp.PyArray_DATA(<cnp.ndarray> residual)
        if out is None:
            if not cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray> x):
                return None
            out = empty_like(x)
            a.y = cnp.PyArray_DATA(<cnp.ndarray> out)
        else:
            if not is_like(out, x) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out):
                return None
            a.y = cnp.PyArray_DATA(<cnp.ndarray> out)
            if not (a.y == a.x or apart(a.y, bytes, a.x, bytes)) or not apart(a.y, bytes, a.residual, bytes):
                return None
        p.threads = 1 if cnp.PyArray_SIZE(<cnp.ndarray> x) < 2 * c.FBN_WORK_PER_THREAD else self.threads()
        with nogil:
            status = c.fbn_plan_run(&p, &a, self.constants)
        expect(status)
        return out
