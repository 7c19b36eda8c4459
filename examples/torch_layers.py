"""How does a PyTorch network run on fastbn's layers? By one call, and its weights and results stay what they were.

    python examples/torch_layers.py

Needs torch: pip install "fastbn[torch]".
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fastbn.torch


def network() -> nn.Module:
    """Two convolutions, each with its norm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Of ten steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    """Trains a network and its conversion alike, and takes the state from one to the other."""
    torch.manual_seed(0)
    plain = network()
    converted = fastbn.torch.convert_batchnorm(copy.deepcopy(plain))
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    theirs, ours = losses(plain, images, labels), losses(converted, images, labels)
    print(converted[1])
    print(f"loss {theirs[0]:.4f} to {theirs[-1]:.4f} by torch's layers, {ours[0]:.4f} to {ours[-1]:.4f} by fastbn's")
    print(f"largest difference of the losses: {max(abs(a - b) for a, b in zip(theirs, ours, strict=True)):.0e}")
    plain.load_state_dict(converted.state_dict())  # and the other way round
    with torch.inference_mode():
        apart = (plain.eval()(images) - converted.eval()(images)).abs().max()
    print(f"largest difference of the results: {apart:.0e}")


if __name__ == "__main__":
    main()
