/* line.h: what all kernels share: the constants of channels in vectors, loads, and z, the argument of an activation. */

/* Which parts of a kernel a call needs: compile-time constants in the loops for common calls. */
typedef struct {
    int activation, has_residual;
    int usual, exact, frozen; /* as in fbn_operands */
} NAME(parts);

/* Or'ed to the activation in loops that serve every call: any activation, residual and constants. */
enum { NAME(ANY) = 512 };

/* The parts that serve every call, so that code that is seldom run is compiled once. */
FBN_INLINE NAME(parts) NAME(any_parts)(const fbn_operands *o) {
    return (NAME(parts)){o->activation | NAME(ANY), o->residual != NULL, o->usual, o->exact, o->frozen};
}

/* The constants of one channel, or of a vector of columns. Those that a call does not need are never loaded. */
typedef struct {
    vec prescale, neg_mean, scale, scale_low, shift, shift_low, on_dy, on_x, constant, postscale;
    real slope;
} NAME(constants);

FBN_INLINE vec NAME(constant_at)(const fbn_operands *o, int which, int64_t c, int each) {
    const real *at = (const real *)o->constants.of[which] + c;
    return each ? vget(at) : vset(*at);
}

/* The constants from column c on, one after another if `each`, else channel c's in every lane. */
FBN_INLINE NAME(constants) NAME(constants_at)(const fbn_operands *o, int64_t c, int each, NAME(parts) p) {
    return (NAME(constants)){.prescale = p.usual ? vset(1) : NAME(constant_at)(o, FBN_PRESCALE, c, each),
                             .neg_mean = NAME(constant_at)(o, FBN_NEG_MEAN, c, each),
                             .scale = NAME(constant_at)(o, FBN_SCALE, c, each),
                             .scale_low = SPLITS_SCALE ? NAME(constant_at)(o, FBN_SCALE_LOW, c, each) : vset(0),
                             .shift = NAME(constant_at)(o, FBN_SHIFT, c, each),
                             .shift_low = p.exact ? vset(0) : NAME(constant_at)(o, FBN_SHIFT_LOW, c, each),
                             .on_dy = NAME(constant_at)(o, FBN_ON_DY, c, each),
                             .on_x = NAME(constant_at)(o, FBN_ON_X, c, each),
                             .constant = NAME(constant_at)(o, FBN_CONSTANT, c, each),
                             .postscale = p.usual ? vset(1) : NAME(constant_at)(o, FBN_POSTSCALE, c, each),
                             .slope = (real)o->slope};
}

/* x - mean_hi, which is exact where x is near the mean, however large the mean is. */
FBN_INLINE vec NAME(centre)(vec x, const NAME(constants) * k, NAME(parts) p) {
    return p.usual ? vadd(x, k->neg_mean) : vfma(vmul(x, k->prescale), k->prescale, k->neg_mean);
}

/* z, the argument of the activation. shift_low is added last, since it matters where y is near the shift. A residual
 * may cancel the shift, so the rounding error of their sum is kept (Knuth's two-sum), unless the sum is infinite. */
FBN_INLINE vec NAME(preactivation)(vec x, vec residual, const NAME(constants) * k, NAME(parts) p) {
    const vec d = NAME(centre)(x, k, p);
    if (!p.has_residual) return vline(d, k->scale, k->scale_low, k->shift, k->shift_low, p.usual, p.usual);
    const vec sum = vadd(k->shift, residual), back = vsub(sum, k->shift);
    const vec lost = vadd(vsub(k->shift, vsub(sum, back)), vsub(residual, back));
    return vline(d, k->scale, k->scale_low, sum, vzero_nan(vadd(lost, k->shift_low)), p.usual, 0);
}

/* n <= WIDTH elements, followed by zeros. In loops, n is the constant WIDTH. */
FBN_INLINE vec NAME(load)(const elem *p, int64_t n) { return n == WIDTH ? vload(p) : vload_n(p, n, vset(0)); }

FBN_INLINE void NAME(put)(elem *to, vec v, int64_t n, int stream) {
    if (n < WIDTH) vstore_n(to, v, n);
    else if (stream) vstream(to, v);
    else vstore(to, v);
}

/* Two vectors of adjacent elements. Where it is faster their lanes are mixed, which makes no difference if all elements
 * have the same constants. */
FBN_INLINE void NAME(load_two)(const elem *p, vec *to) {
#ifdef vload_two
    vload_two(p, to);
#else
    for (int j = 0; j < 2; j++) to[j] = vload(p + j * WIDTH);
#endif
}
FBN_INLINE void NAME(put_two)(elem *to, const vec *v, int stream) {
#ifdef vstore_two
    vstore_two(to, v, stream);
#else
    for (int j = 0; j < 2; j++) NAME(put)(to + j * WIDTH, v[j], WIDTH, stream);
#endif
}

/* The elements that are written together, a power of two: a vector, or a cache line where results are written around
 * the cache, since writing a part of a line there is slow. */
FBN_INLINE int64_t NAME(step_of)(int stream) {
    const int of_line = FBN_LINE / (int)sizeof(elem);
    return STREAMS && stream && of_line > WIDTH ? of_line : WIDTH;
}

/* The number of elements from element i of the result to the next multiple of a step. */
FBN_INLINE int64_t NAME(misaligned)(const fbn_operands *o, int64_t i, int64_t step) {
    return (int64_t)(-((uintptr_t)((elem *)o->out + i) / sizeof(elem)) & (uintptr_t)(step - 1));
}

FBN_INLINE int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }

/* Fetches the lines that lie `ahead` bytes after some vectors of what is read. */
FBN_INLINE void NAME(fetch)(const fbn_operands *o, int64_t i, int vectors, int64_t ahead, NAME(parts) p, int backward) {
    const int64_t at = i * (int64_t)sizeof(elem) + ahead;
    for (int b = 0; b < vectors * WIDTH * (int)sizeof(elem); b += FBN_LINE) {
        prefetch((const char *)o->x + at + b);
        if (backward) prefetch((const char *)o->dy + at + b);
        if (p.has_residual) prefetch((const char *)o->residual + at + b);
    }
}
