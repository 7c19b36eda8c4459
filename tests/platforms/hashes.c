/* hashes.c: which bits does the C core give on this platform? Random layers, each of which every verb is called for.
 *
 *     hashes                      prints the names of the kernels that run here, a line each
 *     hashes KERNELS FIRST LAST   calls those kernels for the layers FIRST to LAST - 1
 *
 * A line is the layer's number, a verb, its status, and a hash of all that the verb wrote. Integers alone make a layer,
 * so the same lines mean the same bits on any two platforms, whatever their order of bytes, their size of a pointer,
 * their compiler and its mathematical library. How many threads and which caches and habits a layer is given is random,
 * too, since no bit may depend on them.
 */
#include "../core/driver.h"

/* ---- values ---- */

/* PLAIN are numbers about 1 and below; those of OFFSET have a mean far above their deviation. TINY are subnormal or
 * hardly larger, LARGE near the largest, and SPREAD anywhere in between, by their channel. CONSTANT is one number a
 * channel. Some of SPECIAL are infinities, NaN, and zeros of both signs; WILD are any bits. */
enum kind { PLAIN, OFFSET, TINY, LARGE, SPREAD, CONSTANT, SPECIAL, WILD, KINDS };

/* Bits of the fraction, and the exponent's field of the largest numbers; half of that is the exponent's of 1. */
static const struct {
    int fraction, most;
} formats[] = {{23, 254}, {52, 2046}, {10, 30}, {7, 254}};

static uint64_t sign_bit(fbn_dtype dtype) { return UINT64_C(1) << (8 * bytes_of_dtype(dtype) - 1); }

static uint64_t special(fbn_dtype dtype) {
    const uint64_t infinity = (uint64_t)(formats[dtype].most + 1) << formats[dtype].fraction;
    const uint64_t signaling = infinity + 1, quiet = infinity + (UINT64_C(1) << (formats[dtype].fraction - 1));
    const uint64_t magnitudes[] = {0, 0, infinity, signaling, quiet, 1, infinity - 1};
    const uint64_t found = magnitudes[below(7)];
    return one_in(2) ? found : found | sign_bit(dtype);
}

static uint64_t number_of(fbn_dtype dtype, enum kind kind, int64_t channel, uint64_t random) {
    const int width = formats[dtype].fraction, most = formats[dtype].most, one = most / 2;
    uint64_t fraction = random >> 11 & ((UINT64_C(1) << width) - 1), sign = random >> 63 ? sign_bit(dtype) : 0;
    int64_t field = one;
    for (uint64_t rest = random & 255; rest & 1 && field > 1; rest >>= 1) field--;
    if (kind == OFFSET) field = one + width / 2, fraction >>= width / 2, sign = 0;
    if (kind == TINY) field = one - field;
    if (kind == LARGE) field += most - one;
    if (kind == SPREAD) field = 1 + (channel * 37 + 11) % most;
    return sign | (uint64_t)field << width | fraction;
}

static uint64_t value_of(fbn_dtype dtype, enum kind kind, int64_t channel) {
    const uint64_t random = bits();
    if (kind == WILD) return random;
    if (kind == SPECIAL && one_in(60)) return special(dtype);
    return number_of(dtype, kind, channel, kind == CONSTANT ? number + (uint64_t)channel * 2654435761u : random);
}

static void set_values(call *c, enum role role, enum kind kind) {
    const int64_t of_channel = role <= DRESIDUAL ? c->problem.inner : 1;
    const fbn_dtype dtype = dtype_of(c, role);
    const size_t size = element(c, role), n = elements(c, role);
    unsigned char *at = c->at[role];
    for (size_t i = 0; i < n; i++, at += size) {
        const uint64_t value = value_of(dtype, kind, (int64_t)i / of_channel % c->problem.channels);
        set_bits(at, size, role == VAR || role == RUNNING_VAR ? value & ~sign_bit(dtype) : value);
    }
}

/* ---- layers ---- */

static void set_shape(fbn_problem *p) {
    p->outer = 1 + below(one_in(4) ? 40 : 6);
    p->channels = 1 + below(one_in(4) ? 70 : 8);
    p->inner = one_in(3) ? 1 : 1 + below(one_in(4) ? 130 : 20);
    if (one_in(40)) { /* a long plane */
        p->inner = 500 + below(3000);
        p->channels = 1 + below(3);
        p->outer = 1 + below(4);
    } else if (one_in(40)) { /* many rows, some of them joined */
        p->inner = 1;
        p->channels = 1 + below(one_in(2) ? 600 : 30);
        p->outer = 6000 / p->channels;
    } else if (one_in(400)) { /* a plane that is cut */
        p->inner = 65537 + below(5000);
        p->outer = p->channels = 1;
    }
}

static void set_machine(fbn_machine *m, const fbn_kernels *kernels) {
    static const int64_t bytes[] = {0, 4096, 65536, 8 << 20}, turns[] = {0, 1, 512, 4096};
    m->kernels = kernels;
    m->core_cache = bytes[below(4)];
    m->shared_cache = bytes[below(4)];
    m->habits.streams = below(9);
    m->habits.row_streams = below(9);
    m->habits.turn = turns[below(4)];
    m->habits.stream_from = one_in(3) ? 1 : 0;
    m->habits.block = bytes[below(4)];
}

static void set_layer(call *c, const fbn_kernels *kernels) {
    static const double slopes[] = {0.01, 0, -0.5, 2, 1e300}, eps[] = {1e-5, 0, 1e-3, 1e300};
    fbn_problem *p = &c->problem;
    set_machine(&c->machine, kernels);
    set_shape(p);
    p->machine = &c->machine;
    p->dtype = (fbn_dtype)below(4);
    p->activation = (fbn_activation)below(FBN_ACTIVATIONS);
    p->slope = slopes[below(one_in(3) ? 5 : 1)];
    p->threads = 1 + (int)below(3);
    c->given_problem = p;
    c->parameters = (fbn_dtype)below(4);
    c->statistics = (fbn_dtype)below(4);
    c->running = (fbn_dtype)below(4);
    c->eps = eps[below(one_in(3) ? 4 : 1)];
    c->momentum = (double)below(9) / 8;
    c->correction = (double)below(3);
    c->frozen = one_in(3);
}

static enum kind kind_of(enum role role, enum kind of_layer) {
    if (role == X || role == RESIDUAL) return of_layer;
    return one_in(8) ? (enum kind)below(KINDS) : PLAIN;
}

static void set_arrays(call *c) {
    const unsigned optional = IN(RESIDUAL) | IN(MASK) | IN(GAMMA) | IN(BETA) | IN(DGAMMA) | IN(DBETA);
    const enum kind of_layer = one_in(2) ? PLAIN : (enum kind)below(KINDS);
    const int without_running = one_in(3);
    for (int r = 0; r < ROLES; r++) {
        const int absent = optional >> r & 1 && one_in(3);
        allocate(c, (enum role)r);
        if (r <= DRESIDUAL || (r >= GAMMA && r <= RUNNING_VAR))
            set_values(c, (enum role)r, kind_of((enum role)r, of_layer));
        if (absent || ((r == RUNNING_MEAN || r == RUNNING_VAR) && without_running)) c->at[r] = NULL;
    }
}

/* The values of a channel that count. */
static double values_of(const call *c) {
    const unsigned char *mask = c->at[MASK];
    double values = 0;
    for (int64_t i = 0; i < c->problem.outer * c->problem.inner; i++) values += mask ? mask[i] != 0 : 1;
    return values;
}

/* ---- hashes ---- */

/* FNV-1a, with the number's lowest byte first. */
static uint64_t hashed(uint64_t hash, uint64_t value) {
    for (int i = 0; i < 8; i++, value >>= 8) hash = (hash ^ (value & 255)) * UINT64_C(0x100000001B3);
    return hash;
}

/* Calls a verb, and prints a line. All NaN are alike: which of them an operation gives depends on the processor. */
static void print(call *c, enum verb verb) {
    uint64_t hash = UINT64_C(0xCBF29CE484222325);
    c->verb = verb;
    const fbn_status status = verbs[verb].call(c);
    for (int r = 0; r < ROLES; r++) {
        const fbn_dtype dtype = dtype_written(c, (enum role)r);
        const size_t size = element(c, (enum role)r), n = elements(c, (enum role)r);
        const unsigned char *at = c->at[r];
        if (r == PLAN || !writes(c, (enum role)r) || !at) continue;
        for (size_t i = 0; i < n; i++, at += size) {
            const uint64_t value = bits_at(at, size);
            hash = hashed(hash, is_nan(value, dtype) ? UINT64_MAX : value);
        }
    }
    printf("%llu %s %d %016llx\n", number, verbs[verb].name, (int)status, (unsigned long long)hash);
}

static void gradient(call *c) {
    c->count = values_of(c) < 1 ? 1 : values_of(c);
    print(c, BACKWARD_SUMS);
    c->at[GIVEN_SUMS] = one_in(3) ? c->at[SUMS] : NULL;
    print(c, BACKWARD);
}

static void all_verbs(const fbn_kernels *kernels) {
    call c = {0};
    state = number * UINT64_C(0xD1342543DE82EF95) + 1;
    set_layer(&c, kernels);
    set_arrays(&c);
    print(&c, INFER);
    if (c.frozen) gradient(&c);
    c.verb = PLAN_SET;
    plan_set(&c);
    print(&c, PLAN_RUN);
    print(&c, FORWARD);
    print(&c, GET_MOMENTS);
    print(&c, APPLY);
    if (!c.frozen) gradient(&c);
    c.from_y = c.problem.activation == FBN_IDENTITY || (c.problem.activation == FBN_LEAKY_RELU && c.problem.slope > 0);
    if (c.from_y) {
        c.at[Y] = c.at[X];
        print(&c, FORWARD);
        c.at[DX] = c.at[DY];
        gradient(&c);
    }
    release(&c);
}

int main(int arguments, char **argument) {
    for (int i = 0; fbn_kernels_at(i); i++) {
        const fbn_kernels *kernels = fbn_kernels_at(i);
        if (arguments == 1) puts(fbn_kernels_name(kernels));
        if (arguments != 4 || strcmp(argument[1], fbn_kernels_name(kernels)) != 0) continue;
        const unsigned long long last = strtoull(argument[3], NULL, 10);
        for (number = strtoull(argument[2], NULL, 10); number < last; number++) all_verbs(kernels);
        return 0;
    }
    return arguments == 1 ? 0 : 2;
}
