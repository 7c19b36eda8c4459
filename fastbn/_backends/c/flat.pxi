# The bridge for jitted code: functions that take only numbers and addresses, and are called by their own address.
#
# Each returns a status of fastbn.h, or NO_MEMORY. The address 0 stands for an array that is absent.

# Whether this process was forked from one in which OpenMP may have threads. Jitted code cannot find that out itself.
cdef bint one_thread = False


cdef c.fbn_problem flat_problem(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
) noexcept nogil:
    cdef c.fbn_problem p = NO_PROBLEM
    p.machine = machine
    p.dtype, p.activation, p.slope = <c.fbn_dtype> dtype, <c.fbn_activation> activation, slope
    p.outer, p.channels, p.inner = outer, channels, inner
    p.threads = <int> threads if 1 <= threads <= c.FBN_MOST_THREADS else 0  # the verb refuses 0
    if one_thread and p.threads:
        p.threads = 1
    return p


cdef c.fbn_parameters flat_parameters(const c.fbn_problem *p, size_t gamma, size_t beta) noexcept nogil:
    cdef c.fbn_parameters parameters = NO_INFER.parameters
    parameters.gamma, parameters.beta = <void *> gamma, <void *> beta
    parameters.dtype = c.FBN_F64 if p.dtype == c.FBN_F64 else c.FBN_F32
    return parameters


cdef int64_t flat_infer(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
    size_t x, size_t residual, size_t gamma, size_t beta, double eps, size_t mean, size_t var, size_t y, size_t saved,
) noexcept nogil:
    cdef c.fbn_problem p = flat_problem(dtype, activation, slope, outer, channels, inner, threads)
    cdef c.fbn_infer_args a = NO_INFER
    a.x, a.residual, a.parameters, a.eps = <void *> x, <void *> residual, flat_parameters(&p, gamma, beta), eps
    a.statistics.mean, a.statistics.var, a.statistics.dtype = <void *> mean, <void *> var, a.parameters.dtype
    a.y, a.saved = <void *> y, <double *> saved
    return status_of(&p, &a)


cdef int64_t flat_forward(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
    size_t x, size_t residual, size_t gamma, size_t beta, double eps, size_t mean, size_t var, double momentum,
    size_t y, size_t saved,
) noexcept nogil:
    cdef c.fbn_problem p = flat_problem(dtype, activation, slope, outer, channels, inner, threads)
    cdef c.fbn_forward_args a = NO_FORWARD
    a.x, a.residual = <void *> x, <void *> residual
    a.parameters, a.eps = flat_parameters(&p, gamma, beta), eps
    a.running.mean, a.running.var, a.running.dtype = <void *> mean, <void *> var, a.parameters.dtype
    a.running.momentum, a.running.correction = momentum, 1
    a.y, a.saved = <void *> y, <double *> saved
    return status_of(&p, &a)


cdef int64_t flat_backward(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
    size_t dy, size_t x, size_t residual, size_t saved, int64_t frozen, size_t dx, size_t dresidual, size_t dgamma,
    size_t dbeta,
) noexcept nogil:
    cdef c.fbn_problem p = flat_problem(dtype, activation, slope, outer, channels, inner, threads)
    cdef c.fbn_backward_args a = NO_BACKWARD
    a.dy, a.x, a.residual, a.saved = <void *> dy, <void *> x, <void *> residual, <double *> saved
    a.count, a.frozen = <double> outer * <double> inner, frozen != 0
    a.dx, a.dresidual, a.dgamma, a.dbeta = <void *> dx, <void *> dresidual, <void *> dgamma, <void *> dbeta
    return status_of(&p, &a)


def flat():
    """The address and the signature of each verb's function. In a signature, i is int64_t, d double, p an address."""
    problem = "iidiiii"
    return {
        "infer": (<size_t> &flat_infer, problem + "ppppdpppp"),
        "forward": (<size_t> &flat_forward, problem + "ppppdppdpp"),
        "backward": (<size_t> &flat_backward, problem + "ppppipppp"),
    }


def numbers():
    """The constants of fastbn.h that jitted code uses, by name, and NO_MEMORY."""
    return {
        "FBN_F32": c.FBN_F32, "FBN_F64": c.FBN_F64, "FBN_MOST_THREADS": c.FBN_MOST_THREADS,
        "FBN_MISALIGNED": c.FBN_MISALIGNED, "FBN_OVERLAP": c.FBN_OVERLAP, "FBN_BAD_ACTIVATION": c.FBN_BAD_ACTIVATION,
        "FBN_BAD_EPS": c.FBN_BAD_EPS, "FBN_BAD_MOMENTUM": c.FBN_BAD_MOMENTUM, "NO_MEMORY": NO_MEMORY,
    }


def use_one_thread():
    """Makes jitted code use one thread from now on, whatever its calls ask for."""
    global one_thread
    one_thread = True
