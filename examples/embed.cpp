// How does a C++ program normalize, without Python? Inference by a plan, and a training step, channels last. Run:
//     c++ examples/embed.cpp $(fastbn info --cflags) $(fastbn info --libs) -o embed && ./embed
#include <fastbn.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <vector>

namespace {

void expect(fbn_status status) {
    if (status != FBN_OK) throw std::invalid_argument(fbn_status_text(status));
}

// Batch norm and ReLU over rows of `channels` values: (rows, channels), or images with their channels last.
class BatchNorm {
  public:
    explicit BatchNorm(std::int64_t channels)
        : gamma(channels, 1), beta(channels), running_mean(channels), running_var(channels, 1), dgamma(channels),
          dbeta(channels), machine_(fbn_this_machine()), saved_(FBN_SAVED_ROWS * channels) {}

    std::vector<float> forward(const std::vector<float> &x) {
        const fbn_problem p = problem(x);
        std::vector<float> y(x.size());
        fbn_forward_args args = {};
        args.size = sizeof args;
        args.x = x.data();
        args.parameters = {gamma.data(), beta.data(), FBN_F32};
        args.eps = eps;
        args.running = {running_mean.data(), running_var.data(), FBN_F32, 0.1, 1};
        args.y = y.data();
        args.saved = saved_.data();
        expect(fbn_forward(&p, &args, workspace(p)));
        return y;
    }

    std::vector<float> backward(const std::vector<float> &dy, const std::vector<float> &x) {
        const fbn_problem p = problem(x);
        std::vector<float> dx(x.size());
        fbn_backward_args args = {};
        args.size = sizeof args;
        args.dy = dy.data();
        args.x = x.data();
        args.saved = saved_.data();
        args.count = static_cast<double>(p.outer);
        args.dx = dx.data();
        args.dgamma = dgamma.data();
        args.dbeta = dbeta.data();
        expect(fbn_backward(&p, &args, workspace(p)));
        return dx;
    }

    // The layer as it is now, for inference from any number of threads. A vector's memory stays where it is when moved.
    std::vector<char> plan() const {
        const fbn_problem p = problem({});
        std::vector<char> memory(fbn_plan_bytes(p.channels));
        fbn_plan_args args = {};
        args.size = sizeof args;
        args.parameters = {gamma.data(), beta.data(), FBN_F32};
        args.eps = eps;
        args.statistics = {running_mean.data(), running_var.data(), FBN_F32};
        expect(fbn_plan_set(&p, &args, memory.data()));
        return memory;
    }

    void infer(const std::vector<char> &plan, std::vector<float> &x) const {
        const fbn_problem p = problem(x);
        const fbn_run_args args = {sizeof args, x.data(), nullptr, x.data()}; // in place
        expect(fbn_plan_run(&p, &args, plan.data()));
    }

    std::vector<float> gamma, beta, running_mean, running_var, dgamma, dbeta;

  private:
    static constexpr double eps = 1e-5;

    fbn_problem problem(const std::vector<float> &x) const {
        const auto channels = static_cast<std::int64_t>(gamma.size());
        return {&machine_, FBN_F32, FBN_RELU, 0, static_cast<std::int64_t>(x.size()) / channels, channels, 1, 2};
    }

    void *workspace(const fbn_problem &p) {
        workspace_.resize(fbn_workspace_bytes(&p));
        return workspace_.data();
    }

    fbn_machine machine_;
    std::vector<double> saved_;
    std::vector<char> workspace_;
};

void run() {
    constexpr int rows = 4096, channels = 16;
    std::vector<float> x(rows * channels);
    unsigned state = 1;
    for (float &value : x) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(state >> 8) / (1 << 24) - 100;
    }
    BatchNorm layer(channels);
    std::vector<float> y, dx;
    for (int step = 0; step < 100; step++) {
        y = layer.forward(x);
        dx = layer.backward(y, x);
    }
    std::printf("training: y %.4f, dx %.4f; dgamma %.1f, dbeta %.1f\n", y[3], dx[3], layer.dgamma[3], layer.dbeta[3]);
    std::vector<float> z = x;
    layer.infer(layer.plan(), z);
    std::printf("inference: y %.4f, with running mean %.4f and variance %.4f\n", z[3], layer.running_mean[3],
                layer.running_var[3]);
    try {
        BatchNorm(channels / 2).infer(layer.plan(), z);
    } catch (const std::invalid_argument &error) {
        std::printf("another layer's plan: %s\n", error.what());
    }
}

} // namespace

int main() {
    try {
        run();
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
