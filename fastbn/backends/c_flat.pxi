# The bridge for jitted code, which has numbers and addresses: flat functions, called by their own address.
#
# Each finds its workspace and returns a status of fastbn.h, or NO_MEMORY. An array that is absent has the address 0.
# fastbn/numba.py declares them once more, and gives them names that change where these signatures do.

cdef enum:
    NO_MEMORY = -1

# The most threads that a call may have, whatever it asks for.
cdef int most_threads = 2147483647


cdef c.fbn_problem flat_problem(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
) noexcept nogil:
    cdef c.fbn_problem p
    p.machine = &machine
    p.dtype, p.activation, p.slope = <c.fbn_dtype> dtype, <c.fbn_activation> activation, slope
    p.outer, p.channels, p.inner = outer, channels, inner
    p.threads = <int> max(0, min(threads, most_threads))
    return p


cdef c.fbn_parameters flat_parameters(const c.fbn_problem *p, size_t gamma, size_t beta) noexcept nogil:
    cdef c.fbn_parameters parameters
    parameters.gamma, parameters.beta = <void *> gamma, <void *> beta
    parameters.dtype = c.FBN_F64 if p.dtype == c.FBN_F64 else c.FBN_F32
    return parameters


cdef int64_t flat_infer(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
    size_t x, size_t residual, size_t gamma, size_t beta, double eps, size_t mean, size_t var, size_t y, size_t saved,
) noexcept nogil:
    cdef char small[SMALL]
    cdef c.fbn_problem p = flat_problem(dtype, activation, slope, outer, channels, inner, threads)
    cdef c.fbn_parameters parameters = flat_parameters(&p, gamma, beta)
    cdef void *workspace = any_workspace(&p, small)
    cdef c.fbn_status status
    if workspace == NULL:
        return NO_MEMORY
    status = c.fbn_infer(&p, <void *> x, <void *> residual, &parameters, eps, <void *> mean, <void *> var, <void *> y,
                         <double *> saved, workspace)
    release(workspace, small)
    return status


cdef int64_t flat_forward(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
    size_t x, size_t residual, size_t gamma, size_t beta, double eps, size_t mean, size_t var, double momentum,
    size_t y, size_t saved,
) noexcept nogil:
    cdef char small[SMALL]
    cdef c.fbn_problem p = flat_problem(dtype, activation, slope, outer, channels, inner, threads)
    cdef c.fbn_parameters parameters = flat_parameters(&p, gamma, beta)
    cdef c.fbn_running running
    cdef void *workspace = any_workspace(&p, small)
    cdef c.fbn_status status
    if workspace == NULL:
        return NO_MEMORY
    running.mean, running.var, running.momentum, running.correction = <void *> mean, <void *> var, momentum, 1
    status = c.fbn_forward(&p, <void *> x, <void *> residual, NULL, &parameters, eps, &running, <void *> y,
                           <double *> saved, workspace)
    release(workspace, small)
    return status


cdef int64_t flat_backward(
    int64_t dtype, int64_t activation, double slope, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
    size_t dy, size_t x, size_t residual, size_t saved, int64_t frozen, size_t dx, size_t dresidual, size_t dgamma,
    size_t dbeta,
) noexcept nogil:
    cdef char small[SMALL]
    cdef c.fbn_problem p = flat_problem(dtype, activation, slope, outer, channels, inner, threads)
    cdef c.fbn_called called
    cdef void *workspace = any_workspace(&p, small)
    cdef c.fbn_status status
    if workspace == NULL:
        return NO_MEMORY
    called.mask, called.sums, called.from_y = NULL, NULL, False
    called.count, called.frozen = <double> outer * <double> inner, frozen != 0
    status = c.fbn_backward(&p, <void *> dy, <void *> x, <void *> residual, <double *> saved, &called, <void *> dx,
                            <void *> dresidual, <void *> dgamma, <void *> dbeta, workspace)
    release(workspace, small)
    return status


def flat():
    """The addresses of the functions for jitted code, by verb."""
    return {
        "infer": <size_t> &flat_infer, "forward": <size_t> &flat_forward, "backward": <size_t> &flat_backward,
    }


def limit_threads(int most):
    """Jitted code uses no more, whatever it asks for: it cannot see whether this process was forked."""
    global most_threads
    most_threads = most
