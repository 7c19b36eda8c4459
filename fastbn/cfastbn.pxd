# The declarations of fastbn.h, which documents them, for Cython: `from fastbn cimport cfastbn`. Compile with the
# include directory fastbn.get_include(), and link with fastbn.get_library().
from libc.stddef cimport size_t
from libc.stdint cimport int64_t


cdef extern from "fastbn.h" nogil:
    enum:
        FBN_ABI_VERSION

    ctypedef enum fbn_status:
        FBN_OK
        FBN_NULL_POINTER
        FBN_MISALIGNED
        FBN_OVERLAP
        FBN_BAD_DTYPE
        FBN_BAD_ACTIVATION
        FBN_BAD_SHAPE
        FBN_BAD_THREADS
        FBN_BAD_EPS
        FBN_BAD_MOMENTUM
        FBN_TOO_FEW_VALUES
        FBN_BAD_PLAN
        FBN_BAD_SIZE

    ctypedef enum fbn_dtype:
        FBN_F32
        FBN_F64
        FBN_F16
        FBN_BF16

    ctypedef enum fbn_activation:
        FBN_IDENTITY
        FBN_RELU
        FBN_RELU6
        FBN_LEAKY_RELU
        FBN_SILU
        FBN_HARDSWISH
        FBN_SIGMOID
        FBN_ACTIVATIONS

    ctypedef struct fbn_kernels:
        pass

    ctypedef struct fbn_habits:
        int64_t streams
        int64_t row_streams
        int64_t turn
        int64_t ahead
        int64_t stream_from
        int64_t block

    ctypedef struct fbn_machine:
        const fbn_kernels *kernels
        int64_t core_cache
        int64_t shared_cache
        fbn_habits habits

    enum:
        FBN_WORK_PER_THREAD

    enum:
        FBN_MOST_THREADS

    const int64_t FBN_MOST_VALUES

    ctypedef struct fbn_problem:
        const fbn_machine *machine
        fbn_dtype dtype
        fbn_activation activation
        double slope
        int64_t outer
        int64_t channels
        int64_t inner
        int threads

    ctypedef struct fbn_parameters:
        const void *gamma
        const void *beta
        fbn_dtype dtype

    ctypedef struct fbn_statistics:
        const void *mean
        const void *var
        fbn_dtype dtype

    ctypedef struct fbn_running:
        void *mean
        void *var
        fbn_dtype dtype
        double momentum
        double correction

    enum:
        FBN_MEAN
        FBN_MEAN_LOW
        FBN_VAR
        FBN_INV_STD
        FBN_GAMMA
        FBN_BETA
        FBN_SAVED_ROWS

    int fbn_abi_version()
    const char *fbn_status_text(fbn_status status)
    size_t fbn_workspace_bytes(const fbn_problem *problem)

    ctypedef struct fbn_forward_args:
        size_t size
        const void *x
        const void *residual
        const unsigned char *mask
        fbn_parameters parameters
        double eps
        fbn_running running
        void *y
        double *saved

    fbn_status fbn_forward(const fbn_problem *problem, const fbn_forward_args *args, void *workspace)

    ctypedef struct fbn_infer_args:
        size_t size
        const void *x
        const void *residual
        fbn_parameters parameters
        double eps
        fbn_statistics statistics
        void *y
        double *saved

    fbn_status fbn_infer(const fbn_problem *problem, const fbn_infer_args *args, void *workspace)

    ctypedef struct fbn_apply_args:
        size_t size
        const void *x
        const void *residual
        fbn_parameters parameters
        double eps
        void *y
        double *saved

    fbn_status fbn_apply(const fbn_problem *problem, const fbn_apply_args *args, void *workspace)
    size_t fbn_plan_bytes(int64_t channels)

    ctypedef struct fbn_plan_args:
        size_t size
        fbn_parameters parameters
        double eps
        fbn_statistics statistics

    fbn_status fbn_plan_set(const fbn_problem *problem, const fbn_plan_args *args, void *plan)

    ctypedef struct fbn_run_args:
        size_t size
        const void *x
        const void *residual
        void *y

    fbn_status fbn_plan_run(const fbn_problem *problem, const fbn_run_args *args, const void *plan)

    ctypedef struct fbn_moments_args:
        size_t size
        const void *x
        const unsigned char *mask
        double *moments

    fbn_status fbn_moments(const fbn_problem *problem, const fbn_moments_args *args, void *workspace)

    ctypedef struct fbn_sums_args:
        size_t size
        const void *dy
        const void *x
        const void *residual
        const unsigned char *mask
        const double *saved
        int from_y
        double *sums

    fbn_status fbn_backward_sums(const fbn_problem *problem, const fbn_sums_args *args, void *workspace)

    ctypedef struct fbn_backward_args:
        size_t size
        const void *dy
        const void *x
        const void *residual
        const unsigned char *mask
        const double *saved
        double count
        int frozen
        int from_y
        const double *sums
        void *dx
        void *dresidual
        void *dgamma
        void *dbeta

    fbn_status fbn_backward(const fbn_problem *problem, const fbn_backward_args *args, void *workspace)
    fbn_machine fbn_this_machine()
    const fbn_kernels *fbn_kernels_at(int index)
    const char *fbn_kernels_name(const fbn_kernels *kernels)
    int fbn_openmp()
    int fbn_openmp_threads()
    int64_t fbn_cache_bytes(int level)
