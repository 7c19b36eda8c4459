"""How much faster are fastbn's layers in PyTorch? Times single layers, small calls, and the training of a network.

A small residual network learns handwritten digits three times, with the same batches and initial weights: with torch's
layers, with the same network converted, and with fastbn's layers, which compute the sum and the ReLU that follow, too.
The steps of the three networks alternate.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import fastbn
import fastbn.torch

from . import eager_calls
from .extras import extra

try:
    import sklearn.datasets
except ImportError as error:
    raise ImportError('--torch needs scikit-learn: pip install "fastbn[demo]"') from error
import torch
from torch import Tensor, nn

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TORCH, CONVERTED, FUSED = "torch's layers", "converted", "fused with what follows"

Curves = dict[str, list[float]]
"""A number for each step (the loss, or the seconds), by network."""


class Block(nn.Module):
    """A residual block: two convolutions with their norms, and a convolution with its norm around them."""

    def __init__(self, before: int, after: int, stride: int, fused: bool) -> None:
        super().__init__()
        last = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.straight = nn.Sequential(*convolution(before, after, stride, fused), last)
        self.norm = fastbn.torch.BatchNorm2d(after, activation="relu") if fused else nn.BatchNorm2d(after)
        self.around = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        straight, around = self.straight(x), self.around(x)
        if self.fused:
            return self.norm(straight, residual=around)
        return torch.relu(self.norm(straight) + around)


def convolution(before: int, after: int, stride: int, fused: bool) -> list[nn.Module]:
    """A convolution, its norm and its ReLU. The last two are one layer if they are fused."""
    first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    if fused:
        return [first, fastbn.torch.BatchNorm2d(after, activation="relu")]
    return [first, nn.BatchNorm2d(after), nn.ReLU()]


def network(fused: bool = False) -> nn.Module:
    """A network of a convolution and three residual blocks, with ten norms."""
    torch.manual_seed(0)
    return nn.Sequential(
        *convolution(1, 32, 1, fused),
        Block(32, 32, 1, fused),
        Block(32, 64, 2, fused),
        Block(64, 64, 2, fused),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def networks() -> dict[str, nn.Module]:
    """The three networks, with the same weights."""
    plain = network()
    fused = fastbn.torch.convert_batchnorm(network(fused=True))
    return {TORCH: plain, CONVERTED: fastbn.torch.convert_batchnorm(copy.deepcopy(plain)), FUSED: fused}


def batches(steps: int, size: int, magnified: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of handwritten digits, which are 8 by 8 pixels before they are magnified."""
    digits = sklearn.datasets.load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = images.repeat_interleave(magnified, 2).repeat_interleave(magnified, 3)
    labels = torch.from_numpy(digits.target).long()
    some = torch.Generator().manual_seed(0)
    chosen = [torch.randint(len(labels), (size,), generator=some) for _ in range(steps)]
    return [(images[i], labels[i]) for i in chosen]


def train(data: list[tuple[Tensor, Tensor]], memory_format: torch.memory_format) -> tuple[Curves, Curves]:
    """The losses and the seconds of each step, by network."""
    models = {name: model.to(memory_format=memory_format) for name, model in networks().items()}
    optimizers = {name: torch.optim.SGD(model.parameters(), 0.02, 0.9) for name, model in models.items()}
    losses: Curves = {name: [] for name in models}
    seconds: Curves = {name: [] for name in models}
    for step, (images, labels) in enumerate(data):
        x = images.contiguous(memory_format=memory_format)
        for name in rotated(list(models), step):
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss = nn.functional.cross_entropy(models[name](x), labels)
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(loss.item())
    return losses, seconds


def time_layers(shape: tuple[int, ...], memory_format: torch.memory_format, rounds: int) -> dict[str, float]:
    """The median seconds of a layer's forward and backward pass, alone and followed by a ReLU."""
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape).contiguous(memory_format=memory_format)
    theirs = nn.BatchNorm2d(shape[1])
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "torch ": theirs,
        "fastbn ": fastbn.torch.BatchNorm2d(shape[1]),
        "torch ReLU": nn.Sequential(theirs, nn.ReLU(inplace=True)),
        "fastbn ReLU": fastbn.torch.BatchNorm2d(shape[1], activation="relu"),
    }
    seconds: Curves = {name: [] for name in layers}
    for i in range(rounds):
        for name in rotated(list(layers), i):
            start = time.perf_counter()
            torch.autograd.grad(layers[name](x), x, dy)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(some[1:]) for name, some in seconds.items()}


def rotated(names: list[str], step: int) -> list[str]:
    """The names in another order for each step, so that all networks come first equally often."""
    return names[step % len(names) :] + names[: step % len(names)]


def report_layers(shapes: list[tuple[int, ...]], rounds: int) -> None:
    """Prints the times of a layer for each shape and memory format."""
    print(f"{'one layer, forward and backward':<34}{'':<6}{'torch':>12}{'fastbn':>12}{'faster':>9}")
    for shape in shapes:
        for name, memory_format in FORMATS.items():
            times = time_layers(shape, memory_format, rounds)
            for what in ("", "ReLU"):
                theirs, ours = times[f"torch {what}"], times[f"fastbn {what}"]
                label = f"{shape!s:<20}{name:<14}{what:<6}"
                print(f"{label}{theirs * 1e3:9.3f} ms{ours * 1e3:9.3f} ms{theirs / ours:8.2f}x")


def report_training(curves: dict[str, Curves], seconds: dict[str, Curves]) -> None:
    """Prints the times of a step, and how far the losses are apart, compared with torch's in two memory formats."""
    print("\none training step")
    for name, times in seconds.items():
        theirs = median(times[TORCH])
        for layers, some in times.items():
            print(f"{name:<14}{layers:<26}{median(some) * 1e3:10.1f} ms{theirs / median(some):9.2f}x")
    print("\nlosses")
    for name, losses in curves.items():
        print(f"{name:<14}{losses[TORCH][0]:.3f} to {losses[TORCH][-1]:.3f}, ", end="")
        print(f"converted at most {apart(losses[TORCH], losses[CONVERTED]):.1e} apart")
    one, other = (losses[TORCH] for losses in curves.values())
    print(f"torch's own in the two memory formats: at most {apart(one, other):.1e} apart")


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference between two curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def draw(curves: dict[str, Curves], seconds: dict[str, Curves], path: Path) -> None:
    """Draws the losses by step, where the curves coincide, and by time, where they do not."""
    styles: dict[str, dict[str, Any]] = {
        TORCH: {"color": "#b9bec6", "linewidth": 4},
        CONVERTED: {"color": "#1f6fb4", "linewidth": 1.6},
        FUSED: {"color": "#d1495b", "linewidth": 1.6, "linestyle": (0, (4, 2))},
    }
    figure = extra("matplotlib.figure").Figure(figsize=(10, 6.4), layout="constrained")
    rows = figure.subplots(len(curves), 2, sharey=True, sharex="col")
    for row, (name, losses) in zip(rows, curves.items(), strict=True):
        for layers, loss in losses.items():
            each, steps = median(seconds[name][layers]), range(1, len(loss) + 1)
            row[0].plot(steps, loss, **styles[layers])
            row[1].plot([i * each for i in steps], loss, label=f"{layers}: {each * 1e3:.0f} ms", **styles[layers])
        row[0].set_ylabel(f"loss, {name}")
        row[1].legend(frameon=False, loc="lower left", title="median step", alignment="left")
        for axes in row:
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    rows[-1][0].set_xlabel("step")
    rows[-1][1].set_xlabel("seconds (steps times their median)")
    rows[0][0].set_title("The same loss at every step", loc="left", fontsize=11)
    rows[0][1].set_title("In less time", loc="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"written: {path}")


def run(quick: bool, picture: Path) -> None:
    """Times the layers, then trains. If `quick`, it trains for a few steps on small images."""
    print(f"torch {torch.__version__}, fastbn {fastbn.__version__}, {torch.get_num_threads()} threads")
    if quick:
        report_layers([(4, 8, 6, 6)], 3)
        eager_calls.report(2)
        data = batches(6, 16, 1)
    else:
        report_layers([(64, 32, 8, 8), (64, 32, 32, 32), (64, 64, 56, 56)], 11)
        eager_calls.report(1500)
        data = batches(30, 64, 4)
    trained = {name: train(data, memory_format) for name, memory_format in FORMATS.items()}
    curves, seconds = ({name: both[i] for name, both in trained.items()} for i in (0, 1))
    report_training(curves, seconds)
    draw(curves, seconds, picture)
