"""How do processes train a PyTorch network as one would? DistributedDataParallel, and one call for its norms.

    torchrun --standalone --nproc-per-node 2 examples/data_parallel_torch.py

Needs torch and scikit-learn: pip install "fastbn[torch,demo]".
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastbn.torch
from fastbn.demo import networks

STEPS, BATCH, RATE = 40, 64, 0.1


def network() -> nn.Module:
    """The demo's convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    ).double()


def losses(model: nn.Module, mine: slice) -> list[float]:
    """The loss of each step on the part `mine` of the batches."""
    images, labels = networks.load_data().train
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    found = []
    for chosen in islice(networks.batches(len(images), BATCH, seed=0), STEPS):
        x = torch.from_numpy(images[chosen][mine]).double().reshape(-1, 1, 8, 8)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.from_numpy(labels[chosen][mine]))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    """Trains the network in all processes together, and again in each process alone, with torch's layers."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    size = BATCH // ranks  # shares of one size, since DistributedDataParallel averages the gradients
    parallel = DistributedDataParallel(fastbn.torch.convert_sync_batchnorm(network()))
    together = torch.tensor(losses(parallel, slice(rank * size, (rank + 1) * size)), dtype=torch.float64)
    dist.all_reduce(together)
    together /= ranks
    alone = torch.tensor(losses(network(), slice(size * ranks)), dtype=torch.float64)
    if rank == 0:
        print(f"{ranks} ranks, {STEPS} steps: loss {together[0]:.4f} to {together[-1]:.4f}")
        print(f"largest relative difference from the losses of one process: {(together / alone - 1).abs().max():.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
