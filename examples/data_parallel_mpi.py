"""How do MPI ranks train a network as one process would? Each has its share of every batch; fastbn.mpi does the norms.

    mpiexec -n 2 python -m mpi4py examples/data_parallel_mpi.py

Needs mpi4py and scikit-learn: pip install "fastbn[mpi,demo]", and mpich if there is no MPI. `-m mpi4py` ends all ranks
if one fails.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
from mpi4py import MPI

import fastbn.mpi
from fastbn.demo import networks

COMM = MPI.COMM_WORLD
STEPS, BATCH, RATE = 40, 64, 0.1


def synchronized(network: networks.Network) -> networks.Network:
    """The network, with its norms replaced by those of fastbn.mpi."""
    for i, layer in enumerate(network.layers):
        if isinstance(layer, fastbn.BatchNorm):
            options = {"axis": layer.axis, "activation": layer.activation, "dtype": layer.dtype}
            network.layers[i] = fastbn.mpi.BatchNorm(layer.num_features, comm=COMM, **options)
            network.layers[i].load_state_dict(layer.state_dict())
    return network


def losses(network: networks.Network, mine: slice, together: bool) -> list[float]:
    """The loss of each step on the whole batches, of which this rank takes the part `mine`."""
    images, labels = networks.load_data().train
    found = []
    for chosen in islice(networks.batches(len(images), BATCH, seed=0), STEPS):
        x, right = images[chosen][mine].astype(np.float64), labels[chosen][mine]
        loss, gradient = networks.cross_entropy(network(x), right)
        weight = len(right) / BATCH  # since the loss is the mean over this rank's share
        network.backward(gradient * weight)
        gradients = network.gradients()
        if together:
            loss = COMM.allreduce(loss * weight)
            gradients = summed(network)
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter -= RATE * gradient
        found.append(loss)
    return found


def summed(network: networks.Network) -> list[np.ndarray]:
    """The gradients of the whole batch: those of fastbn.mpi's layers are, the others are added up over the ranks."""
    found = []
    for layer in network.layers:
        for gradient in layer.gradients().values():
            if not isinstance(layer, fastbn.mpi.BatchNorm):
                COMM.Allreduce(MPI.IN_PLACE, gradient)
            found.append(gradient)
    return found


def main() -> None:
    """Trains the demo's convolutional network on all ranks together, and again on each rank alone."""
    bounds = np.linspace(0, BATCH, COMM.size + 1).astype(int)
    mine = slice(*bounds[COMM.rank : COMM.rank + 2])
    together = losses(synchronized(networks.build("conv", True, dtype="float64")), mine, True)
    alone = losses(networks.build("conv", True, dtype="float64"), slice(None), False)
    apart = max(abs(a / b - 1) for a, b in zip(together, alone, strict=True))
    if COMM.rank == 0:
        print(f"{COMM.size} ranks, {STEPS} steps: loss {together[0]:.4f} to {together[-1]:.4f}")
        print(f"largest relative difference from the losses of one process: {apart:.0e}")


if __name__ == "__main__":
    main()
