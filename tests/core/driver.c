/* driver.c: does the C API hold under random calls? Valid ones, and such with one or two things wrong.
 *
 *     driver SEED FIRST LAST LARGE
 *
 * makes the calls FIRST to LAST - 1 and prints how often each verb gave each status. One call in LARGE is on arrays
 * that several threads share. A call depends on its number and the seed alone, so one that fails can be made alone.
 *
 * A call's arrays are as large as fastbn.h says, to the byte, with guard bytes or the end of the allocation around
 * them. A refused call must give the status that its fault calls for, and change nothing. A valid one must write what
 * the header says and nothing else, and must write the same again with other threads, other caches, and a mask whose
 * bytes are all 0 or 1. The rest is the sanitizers' that this is compiled with: reads, undefined operations, races.
 */
#include "driver.h"

/* ---- valid calls ---- */

static int64_t pick(const int64_t *from, int n) { return from[below(n)]; }

static void set_shape(fbn_problem *p, int large) {
    static const int64_t channels[] = {1, 2, 3, 5, 16, 20, 64, 131, 257},
                         inner[] = {1, 1, 2, 9, 49, 196, 784, 3001, 70001};
    if (large) {
        p->channels = pick(channels, 9);
        p->inner = pick(inner, p->channels > 3 ? 8 : 9);
        if (one_in(4)) { /* small planes: whole images beside panels, and short rows */
            p->inner = 2 + below(38);
            p->channels = (one_in(2) ? 1000 + below(600) : 16 + below(32)) / p->inner + 1;
        } else if (one_in(4)) { /* many images of few channels, or of more than a panel has */
            p->inner = one_in(2) ? 24 + below(20) : 500 + below(700);
            p->channels = one_in(2) ? 1 + below(6) : 60 + below(10);
        }
        p->outer = (2 * FBN_WORK_PER_THREAD + below(100000)) / (p->channels * p->inner) + 1;
    } else {
        p->outer = below(one_in(4) ? 200 : 7);
        p->channels = below(one_in(4) ? 80 : 9);
        p->inner = one_in(3) ? 1 : below(one_in(4) ? 120 : 20);
        if (p->outer * p->channels < 40 && one_in(4)) p->inner = 400 + below(600); /* planes, or the longest columns */
        if (p->outer < 40 && p->inner == 1 && one_in(3)) p->channels = 500 + below(3000); /* long rows */
    }
}

static int kernel_tables(void) {
    int n = 0;
    while (fbn_kernels_at(n)) n++;
    return n;
}

static void set_caches(fbn_machine *m) {
    static const int64_t sizes[] = {-1, 0, 1, 4096, 65536, 1 << 20, 8 << 20, INT64_MAX};
    static const int64_t habits[] = {INT64_MIN, -1, 0, 1, 2, 3, 8, 100, 512, 4096, 1 << 20, INT64_MAX};
    m->core_cache = pick(sizes, 8);
    m->shared_cache = pick(sizes, 8);
    m->habits = (fbn_habits){pick(habits, 12), pick(habits, 12), pick(habits, 12),
                             pick(habits, 12), pick(habits, 12), pick(habits, 12)};
}

static int invertible(const fbn_problem *p) {
    return p->activation == FBN_IDENTITY || (p->activation == FBN_LEAKY_RELU && p->slope > 0);
}

static void set_numbers(call *c, int large) {
    fbn_problem *p = &c->problem;
    static const double slopes[] = {0.01, 0, -0.5, 2, 1e300};
    static const double small[] = {1e-5, 0, 1e-3, 1e300};
    c->verb = (enum verb)below(VERBS);
    c->machine.kernels = fbn_kernels_at((int)below(kernel_tables()));
    set_caches(&c->machine);
    set_shape(p, large);
    p->machine = &c->machine;
    p->dtype = (fbn_dtype)below(4);
    p->activation = (fbn_activation)below(7);
    p->slope = slopes[below(5)];
    p->threads = 1;
    c->given_problem = p;
    c->parameters = (fbn_dtype)below(4);
    c->statistics = (fbn_dtype)below(4);
    c->running = (fbn_dtype)below(4);
    c->eps = small[below(4)];
    c->momentum = (double)below(11) / 10;
    c->correction = (double)below(3);
    c->count = (double)(1 + below(1000));
    c->frozen = one_in(3);
    c->from_y = invertible(p) && one_in(3);
}

static void set_arrays(call *c) {
    const int with_running = one_in(2);
    for (int r = 0; r < ROLES; r++) {
        const int running = r == RUNNING_MEAN || r == RUNNING_VAR;
        const int absent = running ? !with_running : verbs[c->verb].optional >> r & 1 && one_in(2);
        if (uses(c, r) && !absent) allocate(c, r);
    }
    if (c->verb == BACKWARD && !writes(c, DRESIDUAL) && one_in(2)) c->at[DRESIDUAL] = NULL;
    if (uses(c, Y) && one_in(4)) c->at[Y] = c->at[X];
    if (uses(c, DX) && one_in(4)) c->at[DX] = c->at[DY];
}

/* A plan is set for the machine and the channels that it will run on. */
static void set_plan(call *c) {
    call setter = *c;
    setter.verb = PLAN_SET;
    for (int r = GAMMA; r <= VAR; r++) allocate(&setter, r);
    if (plan_set(&setter)) fail(&setter, "refuses", "a valid plan");
    for (int r = GAMMA; r <= VAR; r++) {
        free(setter.memory[r].block);
        free(setter.memory[r].before);
    }
}

/* What a call without a fault gives. */
static fbn_status expected_of(const call *c) {
    const unsigned char *mask = c->at[MASK];
    const int64_t positions = c->problem.outer * c->problem.inner;
    double values = 0;
    if (c->verb != FORWARD && c->verb != GET_MOMENTS) return FBN_OK;
    for (int64_t i = 0; i < positions; i++) values += mask ? mask[i] != 0 : 1;
    if (values < 1) return FBN_TOO_FEW_VALUES;
    return c->at[RUNNING_MEAN] && c->correction >= values ? FBN_TOO_FEW_VALUES : FBN_OK;
}

/* ---- faults: each makes one thing wrong and returns the status for it, or FBN_OK where it does not apply ---- */

static fbn_status null_pointer(call *c) {
    const int role = (int)below(ROLES);
    if (c->verb == FORWARD && role == RUNNING_VAR && !c->at[RUNNING_MEAN]) return FBN_OK;
    const int half = c->verb == FORWARD && (role == RUNNING_MEAN || role == RUNNING_VAR) && c->at[role];
    if (!(needs(c, role) || half) || !c->memory[role].bytes) return FBN_OK;
    c->at[role] = NULL;
    return FBN_NULL_POINTER;
}

static fbn_status no_struct(call *c) {
    const int which = (int)below(4);
    if (which == 0) c->given_problem = NULL;
    else if (which == 1) c->no_args = 1;
    else if (which == 2) c->problem.machine = NULL;
    else c->machine.kernels = NULL;
    return FBN_NULL_POINTER;
}

static fbn_status misaligned(call *c) {
    const int role = (int)below(ROLES);
    const int ignored = role == DRESIDUAL && !writes(c, role);
    if (!uses(c, role) || !c->at[role] || !c->memory[role].bytes || element(c, role) == 1 || ignored) return FBN_OK;
    if ((uintptr_t)c->at[role] % element(c, role)) return FBN_OK; /* a second fault might align it again */
    c->at[role] = (char *)c->at[role] + 1 + below((int64_t)element(c, role) - 1);
    return FBN_MISALIGNED;
}

static fbn_status overlap(call *c) {
    const int result = one_in(2) ? Y : one_in(2) ? DX : DRESIDUAL, other = (int)below(DRESIDUAL + 1);
    const int64_t n = (int64_t)(c->memory[X].bytes / element(c, X));
    if (!writes(c, result) || !uses(c, other) || !c->at[other] || result == other || n < 1) return FBN_OK;
    const int same = (result == Y && other == X) || (result == DX && other == DY);
    if (other == DRESIDUAL && !writes(c, other)) return FBN_OK;
    if (same && n < 2) return FBN_OK;
    const int64_t away = same ? 1 + below(n - 1) : below(n);
    c->at[result] = (char *)c->at[other] + (one_in(2) ? away : -away) * (int64_t)element(c, X);
    return FBN_OVERLAP;
}

static fbn_status bad_dtype(call *c) {
    static const int numbers[] = {-1, 4, 77, INT32_MIN};
    const fbn_dtype wrong = (fbn_dtype)numbers[below(4)];
    const int which = (int)below(4);
    const int has_channels = c->problem.channels > 0;
    if (which == 0) c->problem.dtype = wrong;
    else if (which == 1 && has_channels && (c->at[GAMMA] || c->at[BETA])) c->parameters = wrong;
    else if (which == 2 && uses(c, MEAN)) c->statistics = wrong;
    else if (which == 3 && c->at[RUNNING_MEAN]) c->running = wrong;
    else return FBN_OK;
    return FBN_BAD_DTYPE;
}

static fbn_status bad_activation(call *c) {
    static const int numbers[] = {-1, 7, 99, INT32_MAX};
    if (c->verb == PLAN_SET) return FBN_OK;
    if (one_in(3) && (c->verb == BACKWARD || c->verb == BACKWARD_SUMS) && !invertible(&c->problem)) c->from_y = 1;
    else if (one_in(2)) {
        c->problem.activation = FBN_LEAKY_RELU;
        c->problem.slope = one_in(2) ? (double)NAN : (double)INFINITY;
    } else c->problem.activation = (fbn_activation)numbers[below(4)];
    return FBN_BAD_ACTIVATION;
}

static fbn_status bad_shape(call *c) {
    static const int64_t sizes[] = {-1, INT64_MIN, INT64_MAX, FBN_MOST_VALUES + 1, INT64_C(1) << 62};
    int64_t *const where[] = {&c->problem.channels, &c->problem.outer, &c->problem.inner};
    *where[c->verb == PLAN_SET ? 0 : below(3)] = pick(sizes, 5);
    return FBN_BAD_SHAPE;
}

static fbn_status bad_threads(call *c) {
    static const int64_t counts[] = {0, -1, INT32_MIN, FBN_MOST_THREADS + 1, INT32_MAX};
    if (c->verb == PLAN_SET) return FBN_OK;
    c->problem.threads = (int)pick(counts, 5);
    return FBN_BAD_THREADS;
}

static double bad_number(double too_large) {
    const double numbers[] = {-1e-9, (double)NAN, (double)INFINITY, -(double)INFINITY, too_large};
    return numbers[below(5)];
}

static fbn_status bad_eps(call *c) {
    if (c->verb != PLAN_SET && !uses(c, Y)) return FBN_OK;
    if (c->verb == PLAN_RUN) return FBN_OK;
    c->eps = bad_number(-1);
    return FBN_BAD_EPS;
}

static fbn_status bad_momentum(call *c) {
    if (!c->at[RUNNING_MEAN]) return FBN_OK;
    if (one_in(2)) c->momentum = bad_number(1.0001);
    else c->correction = bad_number(-3);
    return FBN_BAD_MOMENTUM;
}

static fbn_status bad_count(call *c) {
    if (c->verb != BACKWARD || c->frozen) return FBN_OK;
    c->count = one_in(2) ? 0.5 : bad_number(0);
    return FBN_TOO_FEW_VALUES;
}

static fbn_status bad_plan(call *c) {
    if (c->verb != PLAN_RUN) return FBN_OK;
    const int which = (int)below(3);
    if (which == 0) memset(c->at[PLAN], 0x5A, c->memory[PLAN].bytes);
    else if (which == 1) ((unsigned char *)c->at[PLAN])[0]++; /* which a second fault does not undo */
    else if (c->problem.channels < 1) return FBN_OK;
    else c->problem.channels--;
    return FBN_BAD_PLAN;
}

static fbn_status bad_size(call *c) {
    static const int64_t off[] = {-8, 8, 1, 1 << 20};
    c->wrong_size = (size_t)pick(off, 4);
    return FBN_BAD_SIZE;
}

static fbn_status (*const faults[])(call *) = {null_pointer,   no_struct, misaligned,  overlap,      bad_dtype,
                                               bad_activation, bad_shape, bad_threads, bad_eps,      bad_momentum,
                                               bad_count,      bad_plan,  bad_size,    null_pointer, misaligned};
enum { FAULTS = sizeof faults / sizeof *faults };

/* ---- one call ---- */

static void check_refused(call *c, fbn_status wanted, int several) {
    remember(c); /* a fault may have changed a plan */
    const fbn_status status = verbs[c->verb].call(c);
    if (several ? status == FBN_OK : status != wanted) {
        fprintf(stderr, "wanted: %s\n", several ? "any error" : fbn_status_text(wanted));
        fail(c, "gives", fbn_status_text(status));
    }
    check_unchanged(c, 0);
}

static int same(const call *c, enum role role, const unsigned char *a, const unsigned char *b) {
    const size_t size = element(c, role), n = elements(c, role);
    const fbn_dtype dtype = dtype_written(c, role);
    for (size_t i = 0; i < n; i++, a += size, b += size)
        if (memcmp(a, b, size) != 0 && !(is_nan(bits_at(a, size), dtype) && is_nan(bits_at(b, size), dtype))) return 0;
    return 1;
}

/* Makes the call again, as it is set now, in a workspace of that size; what it writes must be the same. */
static void check_again(call *c, const call *first, const char *with) {
    restore(c);
    void *const workspace = c->at[WORKSPACE];
    unsigned char *const exact = malloc(fbn_workspace_bytes(&c->problem) + 1);
    if (!exact) exit(3);
    if (workspace) c->at[WORKSPACE] = exact + one_in(2);
    if (verbs[c->verb].call(c)) fail(c, "is refused", with);
    for (int r = 0; r < ROLES; r++) {
        if (r == PLAN || !writes(c, r) || !c->at[r]) continue;
        if (!same(c, (enum role)r, c->at[r], first->at[r])) fail(c, with, role_names[r]);
    }
    c->at[WORKSPACE] = workspace;
    free(exact);
}

static void check_valid(call *c) {
    call first = *c;
    if (verbs[c->verb].call(c)) fail(c, "refuses", "a valid call");
    check_unchanged(c, 1);
    for (int r = 0; r < ROLES; r++) {
        const size_t bytes = elements(c, (enum role)r) * element(c, (enum role)r);
        first.at[r] = NULL;
        if (r == PLAN || !writes(c, r) || !c->at[r]) continue;
        first.at[r] = malloc(bytes + 1);
        if (!first.at[r]) exit(3);
        memcpy(first.at[r], c->at[r], bytes);
    }
    c->problem.threads = 2 + (int)below(3);
    set_caches(&c->machine);
    check_again(c, &first, "with other threads and caches there is another");
    memory *mask = &c->memory[MASK];
    for (size_t i = 0; mask->block && i < mask->bytes; i++)
        mask->before[mask->lead + i] = !!mask->before[mask->lead + i];
    check_again(c, &first, "with a mask of 0 and 1 there is another");
    for (int r = 0; r < ROLES; r++) free(first.at[r]);
}

/* Sizes of problems that need not be valid. */
static void check_sizes(call *c) {
    const fbn_status wanted = one_in(2) ? bad_shape(c) : one_in(2) ? bad_threads(c) : FBN_OK;
    if ((fbn_workspace_bytes(&c->problem) != 0) != (wanted == FBN_OK)) fail(c, "has a wrong size of", "workspace");
    const int64_t channels = c->problem.channels;
    const int valid = channels >= 0 && channels <= FBN_MOST_VALUES;
    if ((fbn_plan_bytes(channels) != 0) != valid) fail(c, "has a wrong size of", "plan");
}

static fbn_status make(int64_t large, enum verb *verb) {
    call c = {0};
    state = seed * UINT64_C(0xD1342543DE82EF95) + number;
    set_numbers(&c, one_in(large));
    set_arrays(&c);
    if (c.verb == PLAN_RUN) set_plan(&c);
    remember(&c);
    *verb = c.verb;
    fbn_status wanted = one_in(2) ? faults[below(FAULTS)](&c) : FBN_OK;
    int several = 0;
    if (wanted && one_in(4)) several = faults[below(FAULTS)](&c) != FBN_OK;
    if (!wanted) wanted = expected_of(&c);
    if (wanted) check_refused(&c, wanted, several);
    else check_valid(&c);
    release(&c);
    if (c.verb != PLAN_SET && !wanted) check_sizes(&c);
    return wanted;
}

int main(int arguments, char **argument) {
    static int64_t counts[VERBS][FBN_BAD_SIZE + 1];
    if (arguments != 5) return 2;
    seed = strtoull(argument[1], NULL, 10);
    const unsigned long long last = strtoull(argument[3], NULL, 10);
    const int64_t large = strtoll(argument[4], NULL, 10);
    for (number = strtoull(argument[2], NULL, 10); number < last; number++) {
        enum verb verb;
        const fbn_status status = make(large, &verb);
        counts[verb][status]++;
    }
    for (int verb = 0; verb < VERBS; verb++)
        for (int status = 0; status <= FBN_BAD_SIZE; status++)
            if (counts[verb][status])
                printf("%s %lld: %s\n", verbs[verb].name, (long long)counts[verb][status],
                       fbn_status_text((fbn_status)status));
    return 0;
}
