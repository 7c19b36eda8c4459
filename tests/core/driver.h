/* driver.h: what is a random call made of? The arguments of any verb, each verb's way to be called, and guarded arrays.
 * Of driver.c, and of hashes.c in tests/platforms.
 */
#ifndef FASTBN_TESTS_DRIVER_H
#define FASTBN_TESTS_DRIVER_H

#include <fastbn.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum role {
    X,
    RESIDUAL,
    DY,
    Y,
    DX,
    DRESIDUAL,
    MASK,
    GAMMA,
    BETA,
    MEAN,
    VAR,
    RUNNING_MEAN,
    RUNNING_VAR,
    SAVED,
    MOMENTS,
    SUMS,
    GIVEN_SUMS,
    DGAMMA,
    DBETA,
    WORKSPACE,
    PLAN,
    ROLES
}; /* clang-format off */
static const char *const role_names[] = {
    "x", "residual", "dy", "y", "dx", "dresidual", "mask", "gamma", "beta", "mean", "var", "running mean",
    "running var", "saved", "moments", "sums", "given sums", "dgamma", "dbeta", "workspace", "plan",
}; /* clang-format on */
enum verb { FORWARD, INFER, APPLY, PLAN_SET, PLAN_RUN, GET_MOMENTS, BACKWARD_SUMS, BACKWARD, VERBS };

/* An allocation: guard bytes, the array, and perhaps guard bytes again; and a copy of all of it as it was. */
typedef struct {
    unsigned char *block, *before;
    size_t lead, bytes, room;
} memory;

typedef struct {
    enum verb verb;
    fbn_machine machine;
    fbn_problem problem;
    const fbn_problem *given_problem;
    fbn_dtype parameters, statistics, running;
    double eps, momentum, correction, count;
    int frozen, from_y, no_args;
    size_t wrong_size; /* added to the size of the struct of arguments */
    void *at[ROLES];   /* what is passed */
    memory memory[ROLES];
} call;

static unsigned long long seed, number; /* of the call that is made */

static void fail(const call *c, const char *what, const char *of) {
    const fbn_problem *p = &c->problem;
    fprintf(stderr, "call %llu of seed %llu: %s %s\n", number, seed, what, of);
    fprintf(stderr, "verb %d, %s, dtype %d, activation %d, shape %lld %lld %lld, threads %d\n", c->verb,
            p->machine && p->machine->kernels ? fbn_kernels_name(p->machine->kernels) : "no kernels", p->dtype,
            p->activation, (long long)p->outer, (long long)p->channels, (long long)p->inner, p->threads);
    exit(1);
}

/* ---- random numbers ---- */

static uint64_t state;

static uint64_t bits(void) { /* SplitMix64 */
    uint64_t z = state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static int64_t below(int64_t n) { return (int64_t)(bits() % (uint64_t)n); }
static int one_in(int64_t n) { return below(n) == 0; }

/* ---- the API: how each verb is called, what it must be given, and what it writes ---- */

static fbn_parameters parameters_of(const call *c) {
    return (fbn_parameters){c->at[GAMMA], c->at[BETA], c->parameters};
}
static fbn_statistics statistics_of(const call *c) { return (fbn_statistics){c->at[MEAN], c->at[VAR], c->statistics}; }

static fbn_status forward(const call *c) {
    const fbn_running running = {c->at[RUNNING_MEAN], c->at[RUNNING_VAR], c->running, c->momentum, c->correction};
    const fbn_forward_args a = {sizeof a + c->wrong_size,
                                c->at[X],
                                c->at[RESIDUAL],
                                c->at[MASK],
                                parameters_of(c),
                                c->eps,
                                running,
                                c->at[Y],
                                c->at[SAVED]};
    return fbn_forward(c->given_problem, c->no_args ? NULL : &a, c->at[WORKSPACE]);
}

static fbn_status infer(const call *c) {
    const fbn_infer_args a = {sizeof a + c->wrong_size, c->at[X], c->at[RESIDUAL], parameters_of(c), c->eps,
                              statistics_of(c),         c->at[Y], c->at[SAVED]};
    return fbn_infer(c->given_problem, c->no_args ? NULL : &a, c->at[WORKSPACE]);
}

static fbn_status apply(const call *c) {
    const fbn_apply_args a = {
        sizeof a + c->wrong_size, c->at[X], c->at[RESIDUAL], parameters_of(c), c->eps, c->at[Y], c->at[SAVED]};
    return fbn_apply(c->given_problem, c->no_args ? NULL : &a, c->at[WORKSPACE]);
}

static fbn_status plan_set(const call *c) {
    const fbn_plan_args a = {sizeof a + c->wrong_size, parameters_of(c), c->eps, statistics_of(c)};
    return fbn_plan_set(c->given_problem, c->no_args ? NULL : &a, c->at[PLAN]);
}

static fbn_status plan_run(const call *c) {
    const fbn_run_args a = {sizeof a + c->wrong_size, c->at[X], c->at[RESIDUAL], c->at[Y]};
    return fbn_plan_run(c->given_problem, c->no_args ? NULL : &a, c->at[PLAN]);
}

static fbn_status moments(const call *c) {
    const fbn_moments_args a = {sizeof a + c->wrong_size, c->at[X], c->at[MASK], c->at[MOMENTS]};
    return fbn_moments(c->given_problem, c->no_args ? NULL : &a, c->at[WORKSPACE]);
}

static fbn_status backward_sums(const call *c) {
    const fbn_sums_args a = {sizeof a + c->wrong_size,
                             c->at[DY],
                             c->at[X],
                             c->at[RESIDUAL],
                             c->at[MASK],
                             c->at[SAVED],
                             c->from_y,
                             c->at[SUMS]};
    return fbn_backward_sums(c->given_problem, c->no_args ? NULL : &a, c->at[WORKSPACE]);
}

static fbn_status backward(const call *c) {
    const fbn_backward_args a = {sizeof a + c->wrong_size,
                                 c->at[DY],
                                 c->at[X],
                                 c->at[RESIDUAL],
                                 c->at[MASK],
                                 c->at[SAVED],
                                 c->count,
                                 c->frozen,
                                 c->from_y,
                                 c->at[GIVEN_SUMS],
                                 c->at[DX],
                                 c->at[DRESIDUAL],
                                 c->at[DGAMMA],
                                 c->at[DBETA]};
    return fbn_backward(c->given_problem, c->no_args ? NULL : &a, c->at[WORKSPACE]);
}

#define IN(role) (1u << (role))
enum { NORMAL = IN(X) | IN(RESIDUAL) | IN(GAMMA) | IN(BETA) | IN(Y) | IN(SAVED) | IN(WORKSPACE) };
enum { GRADIENT = IN(DY) | IN(X) | IN(RESIDUAL) | IN(MASK) | IN(SAVED) | IN(WORKSPACE) };
static const struct {
    const char *name;
    fbn_status (*call)(const call *);
    unsigned uses, writes, optional;
} verbs[VERBS] = {
    {"forward", forward, NORMAL | IN(MASK) | IN(RUNNING_MEAN) | IN(RUNNING_VAR),
     IN(Y) | IN(SAVED) | IN(RUNNING_MEAN) | IN(RUNNING_VAR),
     IN(RESIDUAL) | IN(MASK) | IN(GAMMA) | IN(BETA) | IN(RUNNING_MEAN) | IN(RUNNING_VAR)},
    {"infer", infer, NORMAL | IN(MEAN) | IN(VAR), IN(Y) | IN(SAVED), IN(RESIDUAL) | IN(GAMMA) | IN(BETA) | IN(SAVED)},
    {"apply", apply, NORMAL, IN(Y) | IN(SAVED), IN(RESIDUAL) | IN(GAMMA) | IN(BETA)},
    {"plan_set", plan_set, IN(GAMMA) | IN(BETA) | IN(MEAN) | IN(VAR) | IN(PLAN), IN(PLAN), IN(GAMMA) | IN(BETA)},
    {"plan_run", plan_run, IN(X) | IN(RESIDUAL) | IN(Y) | IN(PLAN), IN(Y), IN(RESIDUAL)},
    {"moments", moments, IN(X) | IN(MASK) | IN(MOMENTS) | IN(WORKSPACE), IN(MOMENTS), IN(MASK)},
    {"backward_sums", backward_sums, GRADIENT | IN(SUMS), IN(SUMS), IN(RESIDUAL) | IN(MASK)},
    {"backward", backward, GRADIENT | IN(GIVEN_SUMS) | IN(DX) | IN(DRESIDUAL) | IN(DGAMMA) | IN(DBETA),
     IN(DX) | IN(DRESIDUAL) | IN(DGAMMA) | IN(DBETA),
     IN(RESIDUAL) | IN(MASK) | IN(GIVEN_SUMS) | IN(DGAMMA) | IN(DBETA)},
};

static int uses(const call *c, enum role role) { return verbs[c->verb].uses >> role & 1; }

/* dresidual is written, and must be given, where there are a residual and an activation. */
static int writes(const call *c, enum role role) {
    if (role == DRESIDUAL && (!c->at[RESIDUAL] || !c->problem.activation)) return 0;
    return verbs[c->verb].writes >> role & 1;
}

static int needs(const call *c, enum role role) {
    if (role == DRESIDUAL) return uses(c, role) && writes(c, role);
    return uses(c, role) && !(verbs[c->verb].optional >> role & 1);
}

/* ---- arrays ---- */

static size_t bytes_of_dtype(fbn_dtype dtype) { return dtype == FBN_F64 ? 8 : dtype == FBN_F32 ? 4 : 2; }

/* Bytes of an element, and how many elements. */
static size_t element(const call *c, enum role role) {
    if (role <= DRESIDUAL) return bytes_of_dtype(c->problem.dtype);
    if (role == GAMMA || role == BETA) return bytes_of_dtype(c->parameters);
    if (role == MEAN || role == VAR) return bytes_of_dtype(c->statistics);
    if (role == RUNNING_MEAN || role == RUNNING_VAR) return bytes_of_dtype(c->running);
    if (role == DGAMMA || role == DBETA) return c->problem.dtype == FBN_F64 ? 8 : 4;
    return role == MASK || role == WORKSPACE || role == PLAN ? 1 : 8;
}

static size_t elements(const call *c, enum role role) {
    const fbn_problem *p = &c->problem;
    if (role <= DRESIDUAL) return (size_t)(p->outer * p->channels * p->inner);
    if (role == MASK) return (size_t)(p->outer * p->inner);
    if (role == WORKSPACE) return fbn_workspace_bytes(p);
    if (role == PLAN) return fbn_plan_bytes(p->channels);
    const size_t rows = role == SAVED                        ? FBN_SAVED_ROWS
                        : role == MOMENTS                    ? 3
                        : role == SUMS || role == GIVEN_SUMS ? 2
                                                             : 1;
    return rows * (size_t)p->channels;
}

/* The bits of an element of so many bytes, in the lowest bits of a number, whatever the order of bytes. */
static uint64_t bits_at(const void *at, size_t size) {
    uint16_t half;
    uint32_t single;
    uint64_t value;
    if (size == 2) return memcpy(&half, at, size), half;
    if (size == 4) return memcpy(&single, at, size), single;
    return memcpy(&value, at, size), value;
}

static void set_bits(void *at, size_t size, uint64_t value) {
    const uint16_t half = (uint16_t)value;
    const uint32_t single = (uint32_t)value;
    memcpy(at, size == 2 ? (const void *)&half : size == 4 ? (const void *)&single : (const void *)&value, size);
}

/* A NaN is one whatever its other bits are; they may depend on the instruction that made it. */
static int is_nan(uint64_t value, fbn_dtype dtype) {
    static const uint64_t infinity[] = {0x7F800000, UINT64_C(0x7FF0000000000000), 0x7C00, 0x7F80};
    return (value & (UINT64_MAX >> (65 - 8 * (int)bytes_of_dtype(dtype)))) > infinity[dtype];
}

/* Moderate values, with a negative one for none that must not be; or, where `wild`, any bits at all. */
static void fill(unsigned char *to, size_t n, size_t size, fbn_dtype dtype, int wild, int positive) {
    for (size_t i = 0; i < n; i++, to += size) {
        uint64_t value = bits();
        const double moderate = ((double)(value >> 40) / 0x1p23 - 1) * (positive ? 0.5 : 1) + (positive ? 1 : 0);
        const float narrow = (float)moderate;
        if (!wild && size == 8) value = bits_at(&moderate, 8);
        else if (!wild && size == 4) value = bits_at(&narrow, 4);
        else if (!wild && size == 2) {
            const uint32_t word = (uint32_t)bits_at(&narrow, 4);
            /* Cut to bfloat16; or to float16, whose exponent has another bias and fewer bits. */
            value = dtype == FBN_BF16 ? word >> 16 : (word >> 16 & 0x8000) | (((word >> 13) - 0x1C000u) & 0x7FFF);
            if (dtype == FBN_F16 && fabs(moderate) < 0x1p-14) value = 0;
        }
        set_bits(to, size, value);
    }
}

static fbn_dtype dtype_of(const call *c, enum role role) {
    return role <= DRESIDUAL               ? c->problem.dtype
           : role == GAMMA || role == BETA ? c->parameters
           : role == MEAN || role == VAR   ? c->statistics
                                           : c->running;
}

/* Of a role that a verb may write. */
static fbn_dtype dtype_written(const call *c, enum role role) {
    if (role <= DRESIDUAL || role == RUNNING_MEAN || role == RUNNING_VAR) return dtype_of(c, role);
    return element(c, role) == 8 ? FBN_F64 : FBN_F32;
}

static void allocate(call *c, enum role role) {
    memory *m = &c->memory[role];
    const size_t size = element(c, role), n = elements(c, role);
    const int wild = one_in(6), positive = role == VAR || role == RUNNING_VAR || role == SAVED;
    m->bytes = n * size;
    m->lead = (size_t)below(17) * size;
    m->room = m->lead + m->bytes + (one_in(2) ? 64 : 0);
    m->block = malloc(m->room + !m->room);
    m->before = malloc(m->room + !m->room);
    if (!m->block || !m->before) exit(3);
    memset(m->block, 0xA5, m->room);
    c->at[role] = m->block + m->lead;
    if (role == MASK)
        for (size_t i = 0; i < n; i++) m->block[m->lead + i] = one_in(3) ? 0 : (unsigned char)bits();
    else if (size > 1) fill(m->block + m->lead, n, size, dtype_of(c, role), wild, positive && !wild);
}

static void remember(call *c) {
    for (int r = 0; r < ROLES; r++)
        if (c->memory[r].block) memcpy(c->memory[r].before, c->memory[r].block, c->memory[r].room);
}

static void restore(call *c) {
    for (int r = 0; r < ROLES; r++)
        if (c->memory[r].block) memcpy(c->memory[r].block, c->memory[r].before, c->memory[r].room);
}

static void release(call *c) {
    for (int r = 0; r < ROLES; r++) {
        free(c->memory[r].block);
        free(c->memory[r].before);
    }
}

/* Is `role`'s memory written by this call, under its own name or as the place of a result? */
static int is_written(const call *c, int role) {
    for (int r = 0; r < ROLES; r++)
        if ((r == WORKSPACE || writes(c, r)) && c->at[r] && c->at[r] == c->memory[role].block + c->memory[role].lead)
            return 1;
    return 0;
}

/* Is all as it was, but for what a valid call writes? */
static void check_unchanged(const call *c, int valid) {
    for (int r = 0; r < ROLES; r++) {
        const memory *m = &c->memory[r];
        if (!m->block) continue;
        const size_t start = m->lead, end = m->lead + m->bytes;
        if (memcmp(m->block, m->before, start)) fail(c, "writes before", role_names[r]);
        if (memcmp(m->block + end, m->before + end, m->room - end)) fail(c, "writes behind", role_names[r]);
        if (valid && is_written(c, r)) continue;
        if (memcmp(m->block + start, m->before + start, m->bytes)) fail(c, "changes", role_names[r]);
    }
}

#endif
