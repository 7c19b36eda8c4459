"""What do the ranks of test_torch_sync.py run? Each keeps what it found in the folder of its argument."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import rank_cases
import torch
import torch.distributed as dist
import torch_cases
from rank_cases import EPS, MOMENTUM, SHARED, SHARES, WORLD, Case, attempt, share_of
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastbn.torch
from fastbn.torch import SyncBatchNorm

STEPS = 20


def tensor(array: Any) -> Any:
    """On a copy of the array, with its strides."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.copy(order="K").view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.copy(order="K"))


def array(value: Any) -> Any:
    value = value.detach()
    if value.dtype is torch.bfloat16:
        return value.view(torch.int16).numpy().view("bfloat16")
    return value.numpy()


def layer_of(case: Case, group: Any) -> Any:
    c = case.call()
    layer = SyncBatchNorm(
        c.gamma.size, EPS, MOMENTUM, process_group=group, activation=case.activation, dtype=tensor(c.gamma).dtype
    )
    state = {"weight": c.gamma, "bias": c.beta, "running_mean": c.running_mean, "running_var": c.running_var}
    layer.load_state_dict({name: tensor(value) for name, value in state.items()}, strict=False)
    return layer.train(case.training)


def passes(case: Case, group: Any, rank: int, ranks: int) -> dict[str, Any]:
    """One forward and backward pass, on this rank's share."""
    c, mine, layer = case.call(), share_of(rank, ranks), layer_of(case, group)
    x = tensor(case.placed(c.x)[mine]).requires_grad_()
    residual = tensor(case.placed(c.residual)[mine]).requires_grad_() if case.residual else None
    y = layer(x) if residual is None else layer(x, residual)
    y.backward(tensor(case.placed(c.dy)[mine]))
    found = {"y": y, "dx": x.grad, "dgamma": layer.weight.grad, "dbeta": layer.bias.grad}
    if residual is not None:
        found["dresidual"] = residual.grad
    found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return {name: array(value) for name, value in found.items()} | {
        "order": not x.numel() or y.stride() == torch.empty_like(x).stride()
    }


def second_order(group: Any, rank: int, ranks: int) -> dict[str, Any]:
    """The gradients of a function of a gradient, with an activation and a residual."""
    case = Case((12, 3, 2, 2), "float64", activation="silu", residual=True)
    c, mine, layer = case.call(), share_of(rank, ranks), layer_of(case, group)
    x, residual = (tensor(part[mine]).requires_grad_() for part in (c.x, c.residual))
    dx, dgamma = torch.autograd.grad((layer(x, residual) ** 3).sum(), (x, layer.weight), create_graph=True)
    wanted = torch.autograd.grad((dx**2).sum() + (dgamma**2).sum(), (x, residual, layer.weight, layer.bias))
    names = ("x", "residual", "weight", "bias")
    return {name: array(value) for name, value in zip(names, (*wanted,), strict=True)} | {"dx": array(dx)}


def train(group: Any, rank: int, ranks: int) -> dict[str, Any]:
    """The losses of a network under DDP in float64, with equal shares, and its first gradients."""
    images, labels = torch_cases.images()
    torch.manual_seed(2)
    model = fastbn.torch.convert_sync_batchnorm(torch_cases.network().double(), group)
    parallel = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.05, 0.9)
    size = len(images) // ranks
    mine, losses, first = slice(rank * size, (rank + 1) * size), [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(parallel(images[mine]), labels[mine])
        loss.backward()
        first = first or {name: array(p.grad).copy() for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    state = {name: array(value) for name, value in model.state_dict().items()}
    return {"losses": losses, "gradients": first, "state": state}


def alike(group: Any, rank: int, ranks: int) -> dict[str, Any]:
    """What is the same whether it is called so or so."""
    case = Case((12, 5, 4, 3), activation="relu")
    c, mine = case.call(), share_of(rank, ranks)
    x, found = tensor(c.x[mine]), {}

    def losses(call: Callable[[Any, Any], Any]) -> Any:
        layer, given = layer_of(case, group), x.clone().requires_grad_()
        call(layer, given).square().sum().backward()
        state = {k: v for k, v in layer.state_dict().items() if k != "num_batches_tracked"}
        return [given.grad, layer.weight.grad, layer.bias.grad], state

    plain, state = losses(lambda layer, given: layer(given))
    again, twice = losses(lambda layer, given: checkpoint(layer, given, use_reentrant=False))
    found["checkpointing"] = all(map(torch.equal, again, plain)) and not torch.equal(
        twice["running_mean"], state["running_mean"]
    )  # which is updated again, as by torch's layers
    with torch.autocast("cpu", torch.bfloat16):
        some, _ = losses(lambda layer, given: layer(given))
    found["autocast"] = all(map(torch.equal, some, plain))
    layer = layer_of(case, group)
    with torch.no_grad():
        first = layer(x)
    found["no_grad"] = torch.equal(first, layer_of(case, group)(x.clone().requires_grad_()))
    frozen = layer_of(case, group)
    frozen.weight.requires_grad_(False)
    given = x.clone().requires_grad_()
    frozen(given).square().sum().backward()
    found["frozen weight"] = torch.equal(given.grad, plain[0]) and frozen.weight.grad is None
    first = layer_of(case, group)
    first(x).square().sum().backward()  # x needs no gradient
    found["first layer"] = torch.equal(first.weight.grad, plain[1])
    averaged = layer_of(case, group)
    averaged.momentum = None
    averaged(x)
    averaged(x)
    once = layer_of(case, group)
    once.momentum = 1.0
    once(x)
    found["average"] = int(averaged.num_batches_tracked) == 2 and torch.allclose(
        averaged.running_mean, once.running_mean, atol=1e-6
    )
    untracked = SyncBatchNorm(5, track_running_stats=False, process_group=group).eval()
    local = torch.nn.BatchNorm2d(5, track_running_stats=False).eval()
    found["untracked, evaluated"] = len(x) < 2 or torch.allclose(untracked(x), local(x), atol=1e-5)
    if rank == 0:  # the others communicate nothing
        layer.eval()(x)
    return found


def compiled(group: Any, rank: int, ranks: int) -> bool:
    case = Case()
    x, layer = tensor(case.call().x[share_of(rank, ranks)]), layer_of(case, group)
    found = torch.compile(torch.nn.Sequential(layer, torch.nn.ReLU()), backend="eager")(x)
    return torch.equal(found, torch.relu(layer_of(case, group)(x)))


def errors(group: Any, rank: int, ranks: int) -> dict[Any, Any]:
    """By name: what each rank raised where the last, or all of them, did something wrong."""
    last, x = rank == ranks - 1, torch.randn(3 * rank, 5)
    found: dict[Any, Any] = {}

    def forward(*args: Any, **changed: Any) -> Any:
        layer = SyncBatchNorm(5, process_group=group)
        for name, value in changed.items():
            setattr(layer, name, value)
        outcome = attempt(lambda: layer(*(args or (x,))) is None)
        unchanged = int(layer.num_batches_tracked) == 0 and not layer.running_mean.any()
        return outcome if unchanged else "running statistics have changed"

    def backward(call: Callable[[Any, Any], Any], layer: Any = None) -> Any:
        given = x.clone().requires_grad_()
        y = (layer or SyncBatchNorm(5, process_group=group))(given)
        return attempt(lambda: call(given, y) is None)

    wrong: dict[str, tuple[Any, ...]] = {
        "a list": ([1.0],),
        "integers": (x.int(),),
        "one axis": (torch.ones(5),),
        "channels": (torch.ones(3, 4),),
        "meta": (x.to("meta"),),
        "sparse": (torch.ones(3, 5).to_sparse(),),
        "residual shape": (x, torch.ones(2, 2)),
        "residual dtype": (x, x.double()),
    }
    for name, given in wrong.items():
        found[name] = forward(*(given if last else ()))
    for name, value in {"eps": -1.0, "momentum": "x", "activation": "tanh", "running_var": None}.items():
        found[name] = forward(**({name: value} if last else {}))
    with torch.inference_mode():
        unwritable = {"running_mean": torch.zeros(5), "num_batches_tracked": torch.tensor(0)}
    for name, value in unwritable.items():
        found[f"inference {name}"] = forward(**({name: value} if last else {}))
    found["expanded running_var"] = forward(**({"running_var": torch.ones(1).expand(5)} if last else {}))
    found["observed"] = attempt(lambda: torch.vmap(SyncBatchNorm(5, process_group=group))(torch.ones(2, 3, 5)) is None)
    found["observed by one"] = attempt(
        lambda: (torch.vmap if last else lambda f: f)(SyncBatchNorm(5, process_group=group))(torch.ones(2, 5, 3))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["traced"] = attempt(lambda: torch.jit.trace(SyncBatchNorm(5, process_group=group), torch.ones(3, 5)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        found["forward mode"] = attempt(lambda: SyncBatchNorm(5, process_group=group)(dual))
    found["different eps"] = forward(eps=1e-3 if last else 1e-5)
    found["different momentum"] = forward(momentum=None if last else 0.1)
    found["different gradients"] = forward(x.clone().requires_grad_(last))
    found["different dtypes"] = forward(x.double() if last else x)
    found["different layers"] = attempt(
        lambda: SyncBatchNorm(4 if last else 5, process_group=group)(torch.ones(3, 4 if last else 5))
    )
    found["nothing"] = forward(x[:0])
    found["one value"] = forward(x[: int(last)])
    found["changed in place"] = backward(lambda given, y: (last and given.detach().zero_(), y.sum().backward()))
    found["backward and forward"] = backward(
        lambda given, y: y.sum().backward() if last else SyncBatchNorm(5, process_group=group)(x)
    )
    found["recorded by one"] = backward(lambda given, y: torch.autograd.grad(y.sum(), given, create_graph=last))
    found["batched gradients"] = backward(
        lambda given, y: torch.autograd.grad(y, given, torch.ones(2, *y.shape), is_grads_batched=True)
    )
    layer = SyncBatchNorm(5, process_group=group)

    def changed(given: Any, y: Any) -> None:
        if last:
            with torch.no_grad():
                layer.weight.mul_(2)
        torch.autograd.grad(y.sum(), given, create_graph=True)

    found["changed weight"] = backward(changed, layer)
    found["after all"] = backward(lambda given, y: y.sum().backward())
    return found


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results: dict[Any, Any] = {}
    groups = {ranks: dist.new_group(range(ranks)) for ranks in SHARES if ranks < WORLD} | {WORLD: None}
    for ranks, group in groups.items():
        if rank >= ranks:
            layer = SyncBatchNorm(5, process_group=group)
            results[ranks, "outside"] = torch.equal(layer(torch.ones(2, 5)), torch.zeros(2, 5))
            continue
        for name, case in SHARED.items():
            results[ranks, name] = [passes(case, group, rank, ranks) for _ in range(2)]
        results[ranks, "second order"] = second_order(group, rank, ranks)
        if ranks == 2:
            results[ranks, "compiled"] = compiled(group, rank, ranks)
        if ranks == 3:  # one of which has an empty share
            results[ranks, "alike"] = alike(group, rank, ranks)
        else:
            results[ranks, "train"] = train(group, rank, ranks)
        if ranks > 1:
            results[ranks, "errors"] = errors(group, rank, ranks)
    results["copy"] = copy.deepcopy(SyncBatchNorm(5)).process_group is None
    rank_cases.keep(folder, rank, results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
