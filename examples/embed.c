/* How does a C program normalize, without Python? Inference by a plan, and a training step. Run:
 *     cc examples/embed.c $(fastbn info --cflags) $(fastbn info --libs) -o embed && ./embed
 */
#include <fastbn.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { IMAGES = 16, CHANNELS = 8, PIXELS = 28 * 28, VALUES = IMAGES * CHANNELS * PIXELS, STEPS = 100 };

static float x[VALUES], y[VALUES], dy[VALUES], dx[VALUES];
static float gamma_[CHANNELS], beta[CHANNELS], running_mean[CHANNELS], running_var[CHANNELS];
static float dgamma[CHANNELS], dbeta[CHANNELS];
static double saved[FBN_SAVED_ROWS * CHANNELS];

static void expect(fbn_status status) {
    if (status == FBN_OK) return;
    fprintf(stderr, "fastbn: %s\n", fbn_status_text(status));
    exit(1);
}

static void *memory(size_t bytes) {
    void *found = malloc(bytes);
    if (!bytes || !found) exit(1);
    return found;
}

/* Of one channel of x or y, channels-first. */
static void print_channel(const char *name, const float *array, int channel) {
    double sum = 0, squares = 0;
    for (int image = 0; image < IMAGES; image++)
        for (int i = 0; i < PIXELS; i++) {
            const double value = array[(image * CHANNELS + channel) * PIXELS + i];
            sum += value;
            squares += value * value;
        }
    const double count = (double)IMAGES * PIXELS, mean = sum / count;
    printf("%s: channel %d has mean %.4f and standard deviation %.4f\n", name, channel, mean,
           sqrt(squares / count - mean * mean));
}

/* Forward, backward, and a step of gradient descent on gamma and beta. */
static void train(const fbn_problem *problem) {
    void *workspace = memory(fbn_workspace_bytes(problem));
    const fbn_forward_args forward = {.size = sizeof forward,
                                      .x = x,
                                      .parameters = {gamma_, beta, FBN_F32},
                                      .eps = 1e-5,
                                      .running = {running_mean, running_var, FBN_F32, .momentum = 0.1, .correction = 1},
                                      .y = y,
                                      .saved = saved};
    const fbn_backward_args backward = {.size = sizeof backward,
                                        .dy = dy,
                                        .x = x,
                                        .saved = saved,
                                        .count = (double)problem->outer * (double)problem->inner,
                                        .dx = dx,
                                        .dgamma = dgamma,
                                        .dbeta = dbeta};
    expect(fbn_forward(problem, &forward, workspace));
    expect(fbn_backward(problem, &backward, workspace));
    for (int c = 0; c < CHANNELS; c++) {
        gamma_[c] -= 1e-6f * dgamma[c];
        beta[c] -= 1e-6f * dbeta[c];
    }
    free(workspace);
}

/* The constants are computed once; then every call, from any thread, does nothing but map x to y. */
static void infer(const fbn_problem *problem) {
    void *plan = memory(fbn_plan_bytes(problem->channels));
    const fbn_plan_args set = {sizeof set, {gamma_, beta, FBN_F32}, 1e-5, {running_mean, running_var, FBN_F32}};
    const fbn_run_args run = {.size = sizeof run, .x = x, .y = y};
    expect(fbn_plan_set(problem, &set, plan));
    expect(fbn_plan_run(problem, &run, plan));
    free(plan);
}

int main(void) {
    if (fbn_abi_version() != FBN_ABI_VERSION) return 1;
    const fbn_machine machine = fbn_this_machine();
    const fbn_problem problem = {.machine = &machine,
                                 .dtype = FBN_F32,
                                 .activation = FBN_IDENTITY,
                                 .outer = IMAGES,
                                 .channels = CHANNELS,
                                 .inner = PIXELS,
                                 .threads = 2};
    unsigned state = 1;
    for (int i = 0; i < VALUES; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = 3 + (float)(state >> 8) / (1 << 24);
        dy[i] = x[i] - 3;
    }
    for (int c = 0; c < CHANNELS; c++) gamma_[c] = running_var[c] = 1;

    printf("kernels: %s, %s\n", fbn_kernels_name(machine.kernels), fbn_openmp() ? "OpenMP" : "one thread");
    print_channel("x", x, 0);
    for (int step = 0; step < STEPS; step++) train(&problem);
    print_channel("y in training", y, 0);
    printf("after %d steps: gamma %.4f, beta %.4f, running mean %.4f, running variance %.4f\n", STEPS, gamma_[0],
           beta[0], running_mean[0], running_var[0]);
    infer(&problem);
    print_channel("y of the plan", y, 0);
    return 0;
}
