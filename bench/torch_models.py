"""What do whole models of timm and torchvision gain by convert_batchnorm? Checks the numbers, then times.

    python -m fastbn.bench.torch_models timm/efficientnet_b0 torchvision/resnet50 --threads 1,2

Each model runs three times, in turns: as it is, converted, and converted with fuse=True. Its weights are random.
Neither library is part of an extra of fastbn: install timm, which brings torchvision.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastbn
import fastbn.torch

MODELS = (
    "timm/efficientnet_b0",
    "timm/mobilenetv3_large_100",
    "timm/regnety_004",
    "timm/densenet121",
    "torchvision/resnet50",
)
Clock = Callable[[], float]
TORCH, CONVERTED, FUSED = "torch", "converted", "fused"


def build(name: str) -> nn.Module:
    """A model by its library and name, with random weights; its norms' parameters and statistics are random, too."""
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        return importlib.import_module("timm").create_model(model, pretrained=False)
    if library == "torchvision":
        return importlib.import_module("torchvision").models.get_model(model, weights=None)
    raise ValueError(f"model: got {name!r}; allowed: timm/ or torchvision/ and the name of a model")


def randomized(model: nn.Module) -> nn.Module:
    """With statistics and norms' parameters that are not those of a new model."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model


def variants(model: nn.Module) -> tuple[dict[str, nn.Module], list[Any]]:
    """The model, the model converted, and the model converted and fused; and the report of the last."""
    report: list[Any] = []
    converted = fastbn.torch.convert_batchnorm(copy.deepcopy(model))
    fused = fastbn.torch.convert_batchnorm(copy.deepcopy(model), fuse=True, report=report)
    return {TORCH: model, CONVERTED: converted, FUSED: fused}, report


def passed(model: nn.Module, x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output, all gradients in one tensor, and all floating-point buffers in one."""
    model.train(training).zero_grad()
    one = x.clone().requires_grad_()
    torch.manual_seed(1)  # of dropout
    y = model(one)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [one.grad, *(parameter.grad for parameter in model.parameters())]
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return y.detach(), _joined([g for g in gradients if g is not None]), _joined(buffers)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors]) if tensors else torch.zeros(1)


def apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over the norm of the second."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-300))


def check(model: nn.Module, x: Tensor) -> dict[tuple[str, bool, str], float]:
    """How far outputs and gradients are from those of the model in float64, by dtype, mode and variant."""
    found = {}
    for training in (True, False):
        exact = passed(copy.deepcopy(model).double(), x.double(), training)
        for dtype in (torch.float64, torch.float32):
            others, _ = variants(copy.deepcopy(model).to(dtype))
            for name, other in others.items():
                results = zip(passed(other, x.to(dtype), training), exact, strict=True)
                found[str(dtype)[6:], training, name] = max(apart(one, wanted) for one, wanted in results)
    return found


def timed(
    models: dict[str, nn.Module], run: Callable[[nn.Module], object], rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """The seconds of the runs of each model, but the first; they take turns, each as often first as the others."""
    names, seconds = list(models), {name: [] for name in models}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            run(models[name])
            seconds[name].append(clock() - start)
    return {name: some[1:] for name, some in seconds.items()}


def gain(times: dict[str, list[float]], name: str) -> str:
    """The median of a variant's times, and how many times longer torch takes, by medians and by the fastest rounds."""
    ratios = (of(times[TORCH]) / of(times[name]) for of in (median, min))
    return f"{name:>11} {median(times[name]) * 1e3:8.1f} ms " + "{:5.2f}x ({:.2f}x)".format(*ratios)


def measure(
    name: str,
    model: nn.Module,
    x: Tensor,
    threads: Sequence[int],
    rounds: int,
    clock: Clock = time.perf_counter,
) -> None:
    """Prints the differences and the times of one model."""
    others, report = variants(model)
    converted, fused = sum(entry.converted for entry in report), sum("; fused with" in entry.note for entry in report)
    print(f"\n{name}: {converted} of {len(report)} norms converted, {fused} of them fused with what follows")
    small = x[:2, :, : max(8, x.shape[2] // 2), : max(8, x.shape[3] // 2)]
    for (dtype, training, variant), far in check(randomized(copy.deepcopy(model)), small).items():
        print(f"  {dtype}, {'training' if training else 'evaluation':<12}{variant:<10} {far:.1e} from float64")

    def step(one: nn.Module) -> None:
        one.train().zero_grad()
        one(x).square().mean().backward()

    def infer(one: nn.Module) -> None:
        with torch.inference_mode():
            one.eval()(x)

    before = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        for what, run in (("training step", step), ("inference", infer)):
            with fastbn.use_num_threads(count):
                times = timed(others, run, rounds, clock)
            row = "".join(gain(times, name) for name in times)
            print(f"  {count} threads, {what:<14}{row}", flush=True)
    torch.set_num_threads(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the models that are named."""
    parser = argparse.ArgumentParser(prog="python -m fastbn.bench.torch_models", description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="LIBRARY/MODEL", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (%(default)s)")
    parser.add_argument("--threads", default="1", help="numbers of threads, such as 1,2 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of each model (%(default)s)")
    parser.add_argument(
        "--processor-time", action="store_true", help="measure the processor's time: for one thread, on a busy machine"
    )
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, fastbn {fastbn.__version__}, batches of {options.batch}, {options.size} pixels")
    print("times: medians, and how many times faster than torch, by medians (and by the fastest rounds)")
    x = torch.randn(options.batch, 3, options.size, options.size)
    threads = [int(count) for count in options.threads.split(",")]
    for name in options.models:
        clock = time.process_time if options.processor_time else time.perf_counter
        measure(name, build(name), x, threads, options.rounds, clock)


if __name__ == "__main__":
    main()
