# A plan: the constants of inference are computed once, and a call on a plain array only maps x to y.
#
# As in the express lane, a call that is not plain returns None and has changed nothing.


cdef class Plan:
    """Only the constructor writes the attributes, so calls may run in parallel."""

    cdef c.fbn_machine machine
    cdef c.fbn_problem problem
    cdef void *constants
    cdef int axis
    cdef object threads

    def __cinit__(
        self, cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray mean not None, cnp.ndarray var not None, double eps,
        int axis, object options, object threads,
    ):
        """Takes the parameters of `infer`. The axis may be negative. threads() gives the number of threads to use."""
        cdef c.fbn_plan_args a = NO_PLAN
        cdef Sizes sizes
        memset(&sizes, 0, sizeof(sizes))
        sizes.channels = mean.shape[0]
        self.machine = machine[0]
        self.axis, self.threads = axis, threads
        self.problem.machine = &self.machine
        set_options(&self.problem, options)
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

    def run(self, object x, object out, object residual):
        """Returns y, or None if the call is not plain."""
        cdef c.fbn_problem p = NO_PROBLEM
        cdef c.fbn_run_args a = NO_RUN
        cdef int64_t bytes
        cdef int status
        if out is None:
            x = dense(x)
            residual = alike(residual, x)
        if not recognize(&p, x, self.axis) or p.channels != self.problem.channels:
            return None
        if machine.kernels != self.machine.kernels or (p.dtype == c.FBN_F64) != (self.problem.dtype == c.FBN_F64):
            return None
        if not take_like(residual, x, <void **> &a.residual) or not take_like(out, x, &a.y):
            return None
        a.size, a.x, bytes = sizeof(a), cnp.PyArray_DATA(<cnp.ndarray> x), cnp.PyArray_NBYTES(<cnp.ndarray> x)
        if out is None:
            out = empty_like(x)
            a.y = cnp.PyArray_DATA(<cnp.ndarray> out)
        elif not (
            cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out) and (a.y == a.x or apart(a.y, bytes, a.x, bytes))
            and apart(a.y, bytes, a.residual, bytes)
        ):
            return None
        p.machine, p.activation, p.slope = &self.machine, self.problem.activation, self.problem.slope
        set_threads(&p, self.threads)
        with nogil:
            status = c.fbn_plan_run(&p, &a, self.constants)
        expect(status)
        return out
