# cython: language_level=3, boundscheck=False, wraparound=False
"""How does Cython code normalize, on fastbn's C kernels and without the GIL? A layer for rows of float32."""

from libc.stdlib cimport free, malloc
from libc.string cimport memset

import numpy as np

from fastbn cimport cfastbn as c


cdef int expect(c.fbn_status status) except -1 nogil:
    if status != c.FBN_OK:
        with gil:
            raise ValueError(c.fbn_status_text(status).decode())
    return 0


cdef class Layer:
    """Batch norm and ReLU over rows of values, (rows, channels)."""

    cdef c.fbn_machine machine
    cdef c.fbn_problem problem
    cdef double[:, ::1] saved
    cdef readonly object gamma, beta, running_mean, running_var, dgamma, dbeta

    def __init__(self, int channels, int threads=1):
        self.machine = c.fbn_this_machine()
        self.problem.machine, self.problem.dtype = &self.machine, c.FBN_F32
        self.problem.activation = c.FBN_RELU
        self.problem.channels, self.problem.inner, self.problem.threads = channels, 1, threads
        self.gamma, self.running_var = np.ones((2, channels), np.float32)
        self.beta, self.running_mean, self.dgamma, self.dbeta = np.zeros((4, channels), np.float32)
        self.saved = np.empty((c.FBN_SAVED_ROWS, channels))

    cdef c.fbn_problem problem_of(self, const float[:, ::1] x) except *:
        cdef c.fbn_problem problem = self.problem
        if x.shape[1] != problem.channels:
            raise ValueError(f"x: got {x.shape[1]} channels; allowed: {problem.channels}")
        problem.outer = x.shape[0]
        return problem

    def forward(self, const float[:, ::1] x):
        """A training step's first half: y."""
        cdef c.fbn_problem problem = self.problem_of(x)
        cdef float[::1] gamma = self.gamma, beta = self.beta
        cdef float[::1] mean = self.running_mean, var = self.running_var
        cdef float[:, ::1] y = np.empty_like(x)
        cdef void *workspace = malloc(c.fbn_workspace_bytes(&problem))
        cdef c.fbn_forward_args args
        cdef c.fbn_status status
        if workspace == NULL:
            raise MemoryError
        memset(&args, 0, sizeof(args))
        args.size, args.x, args.eps = sizeof(args), &x[0, 0], 1e-5
        args.parameters = c.fbn_parameters(&gamma[0], &beta[0], c.FBN_F32)
        args.running = c.fbn_running(&mean[0], &var[0], c.FBN_F32, 0.1, 1)
        args.y, args.saved = &y[0, 0], &self.saved[0, 0]
        with nogil:
            status = c.fbn_forward(&problem, &args, workspace)
            free(workspace)
        expect(status)
        return np.asarray(y)

    def backward(self, const float[:, ::1] dy, const float[:, ::1] x):
        """Its second half: dx, and dgamma and dbeta in the layer."""
        cdef c.fbn_problem problem = self.problem_of(x)
        cdef float[::1] dgamma = self.dgamma, dbeta = self.dbeta
        cdef float[:, ::1] dx = np.empty_like(x)
        cdef void *workspace = malloc(c.fbn_workspace_bytes(&problem))
        cdef c.fbn_backward_args args
        cdef c.fbn_status status
        if workspace == NULL:
            raise MemoryError
        memset(&args, 0, sizeof(args))
        args.size, args.dy, args.x, args.saved = sizeof(args), &dy[0, 0], &x[0, 0], &self.saved[0, 0]
        args.count, args.dx, args.dgamma, args.dbeta = problem.outer, &dx[0, 0], &dgamma[0], &dbeta[0]
        with nogil:
            status = c.fbn_backward(&problem, &args, workspace)
            free(workspace)
        expect(status)
        return np.asarray(dx)

    def infer(self, float[:, :, ::1] batches):
        """Normalizes one batch after another with the running statistics, in place, by one plan and without the GIL."""
        cdef c.fbn_problem problem = self.problem_of(batches[0])
        cdef float[::1] gamma = self.gamma, beta = self.beta
        cdef float[::1] mean = self.running_mean, var = self.running_var
        cdef void *plan = malloc(c.fbn_plan_bytes(problem.channels))
        cdef c.fbn_plan_args args
        cdef c.fbn_run_args run
        cdef Py_ssize_t i
        if plan == NULL:
            raise MemoryError
        args.size, args.eps = sizeof(args), 1e-5
        args.parameters = c.fbn_parameters(&gamma[0], &beta[0], c.FBN_F32)
        args.statistics = c.fbn_statistics(&mean[0], &var[0], c.FBN_F32)
        run.size, run.residual = sizeof(run), NULL
        try:
            expect(c.fbn_plan_set(&problem, &args, plan))
            with nogil:
                for i in range(batches.shape[0]):
                    run.x, run.y = &batches[i, 0, 0], &batches[i, 0, 0]
                    expect(c.fbn_plan_run(&problem, &run, plan))
        finally:
            free(plan)
