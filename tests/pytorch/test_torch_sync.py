"""Is SyncBatchNorm over several processes that of one process, and torch's layer in every other respect?"""

from __future__ import annotations

import copy
import inspect
import io
import re
import socket
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import rank_cases
import torch_cases
from rank_cases import SHARED, SHARES, WORLD, Case, assert_all_raise, assert_told
from torch_cases import assert_agree, called, data, randomized, torch

import fastbn.torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

as_found = torch_cases.as_found
WORKER = Path(__file__).with_name("sync_worker.py")
STEPS = 20


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank of one start found."""

    def start(folder: Path) -> None:
        rank_cases.run([rank_cases.python(WORKER, folder, rank) for rank in range(WORLD)])

    return rank_cases.started(tmp_path_factory, "gloo", start)


@pytest.fixture(params=SHARES)
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def of(results: list[dict[Any, Any]], ranks: int, name: str) -> list[Any]:
    """What the first `ranks` ranks found."""
    return [found[ranks, name] for found in results[:ranks]]


# Over several processes ----------------------------------------------------------------------------------------------


def test_results(results: list[dict[Any, Any]], ranks: int) -> None:
    """Each case's, and the same bits again in a second run."""
    for name, case in SHARED.items():
        runs, where = of(results, ranks, name), f"({name}, {ranks} ranks)"
        rank_cases.assert_right(case, [first for first, _ in runs], where, local=True)
        if case.training and ranks > 1:
            rank_cases.assert_building_blocks(case, [first for first, _ in runs], where)
        for first, second in runs:
            assert first.pop("order"), f"y is in another memory order than x {where}"
            for key, value in first.items():
                cases.assert_same_bits(value, second[key], f"{key} {where}")


def test_second_order(results: list[dict[Any, Any]], ranks: int) -> None:
    """Gradients of gradients are torch's of the whole batch; those of the parameters add up."""
    case = Case((12, 3, 2, 2), "float64", activation="silu", residual=True)
    c, found = case.call(), of(results, ranks, "second order")
    layer = torch.nn.BatchNorm2d(3).double()
    layer.load_state_dict({"weight": torch.tensor(c.gamma), "bias": torch.tensor(c.beta)}, strict=False)
    shares = [torch.tensor(c.x).requires_grad_(), torch.tensor(c.residual).requires_grad_()]
    y = torch.nn.functional.silu(layer(shares[0]) + shares[1])
    dx, dgamma = torch.autograd.grad((y**3).sum(), (shares[0], layer.weight), create_graph=True)
    # Each rank squares its part of dgamma, so that the square of the sum is not what is differentiated.
    parts = [share.sum((0, 2, 3)) for share in per_rank(layer, *shares, ranks)]
    torch.testing.assert_close(sum(parts), dgamma, rtol=1e-10, atol=1e-10)
    loss = (dx**2).sum() + sum((part**2).sum() for part in parts)
    wanted = torch.autograd.grad(loss, (*shares, layer.weight, layer.bias))
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(np.concatenate([one["dx"] for one in found]), dx.detach().numpy(), **close)
    for name, gradient in zip(("x", "residual"), wanted[:2], strict=True):
        np.testing.assert_allclose(np.concatenate([one[name] for one in found]), gradient.numpy(), **close)
    for name, gradient in zip(("weight", "bias"), wanted[2:], strict=True):
        np.testing.assert_allclose(sum(one[name] for one in found), gradient.numpy(), **close)


def per_rank(layer: Any, x: Any, residual: Any, ranks: int) -> list[Any]:
    """The terms of each rank's share of the gradient of weight, of sum(y ** 3), as a graph."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    xhat = (x - mean) / (var + layer.eps).sqrt()
    z = xhat * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1) + residual
    y, slope = torch.nn.functional.silu(z), torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    terms = 3 * y**2 * slope * xhat
    return [terms[rank_cases.share_of(rank, ranks)] for rank in range(ranks)]


@cache
def trained_alone() -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """The losses of torch's layers in one process, the first gradients, and the state at the end."""
    x, labels = torch_cases.images()
    torch.set_num_threads(1)
    torch.manual_seed(2)
    model, losses = torch_cases.network().double(), []
    optimizer, first = torch.optim.SGD(model.parameters(), 0.05, 0.9), {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        first = first or {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, first, {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_training_gives_the_losses_of_one_process(results: list[dict[Any, Any]], ranks: int) -> None:
    """Under DDP, in float64, with equal shares. A gradient that is reduced twice would be another."""
    found = of(results, ranks, "train")
    losses, first, state = trained_alone()
    together = np.mean([one["losses"] for one in found], axis=0)
    np.testing.assert_allclose(together, losses, rtol=1e-12)
    for name, gradient in first.items():
        np.testing.assert_allclose(found[0]["gradients"][name], gradient, rtol=1e-9, atol=1e-13, err_msg=name)
    for one in found:
        for name, value in state.items():
            np.testing.assert_allclose(one["state"][name], value, rtol=1e-9, atol=1e-12, err_msg=name)
            cases.assert_same_bits(one["state"][name], found[0]["state"][name], name)


def test_what_makes_no_difference(results: list[dict[Any, Any]]) -> None:
    for found in of(results, 3, "alike"):
        assert all(found.values()), found


def test_compiled(results: list[dict[Any, Any]]) -> None:
    assert of(results, 2, "compiled") == [True, True]


def test_a_process_outside_the_group(results: list[dict[Any, Any]]) -> None:
    """Its layer synchronizes with none."""
    for ranks in SHARES:
        assert all(found[ranks, "outside"] for found in results[ranks:])


OF_THE_LAST = {
    "a list": ("TypeError", "input: got list; allowed: a tensor"),
    "integers": ("TypeError", "input: got torch.int32; allowed: torch.float16, torch.bfloat16"),
    "one axis": ("ValueError", r"expected at least 2D input \(got 1D input\)"),
    "channels": ("ValueError", "input: got 4 channels; allowed: the layer's 5"),
    "meta": ("TypeError", "input: got a Tensor on meta"),
    "sparse": ("TypeError", "input: got a Tensor on cpu, torch.sparse_coo"),
    "residual shape": ("ValueError", "residual: got shape"),
    "residual dtype": ("TypeError", "residual: got torch.float64"),
    "eps": ("ValueError", "eps: got -1.0; allowed over several processes: a finite number above 0"),
    "momentum": ("ValueError", "momentum: got 'x'; allowed: a finite number, or None"),
    "activation": ("ValueError", "activation: got 'tanh'"),
    "running_var": ("ValueError", "running_mean: got one running statistic; allowed: both or neither"),
    "inference running_mean": ("ValueError", "running_mean: got an inference tensor"),
    "inference num_batches_tracked": ("ValueError", "num_batches_tracked: got an inference tensor"),
    "expanded running_var": ("ValueError", "running_var: got an expanded tensor"),
    "observed by one": ("NotImplementedError", "SyncBatchNorm: got a call that torch.func"),
    "changed in place": ("RuntimeError", "one of the variables needed .* modified by an inplace operation"),
    "changed weight": ("RuntimeError", "weight: got values modified by an inplace operation"),
}
OF_ALL = {
    "observed": ("NotImplementedError", "SyncBatchNorm: got a call that torch.func"),
    "traced": ("NotImplementedError", "SyncBatchNorm: got a call that .* a tracer"),
    "forward mode": ("NotImplementedError", "SyncBatchNorm: got a call that .* forward-mode AD observes"),
    "different eps": ("ValueError", r"eps: got 1e-05 on rank 0 and 0.001 on rank \d; allowed: the same on every rank"),
    "different momentum": ("ValueError", r"momentum: got 0.1 on rank 0 and 1 on rank \d"),
    "different gradients": ("ValueError", r"whether the input requires a gradient: got 0 on rank 0 and 1 on rank \d"),
    "different dtypes": ("TypeError", r"input: got the statistics dtype float32 on rank 0 and .* float64 on rank \d"),
    "different layers": ("ValueError", r"input: got 5 channels on rank 0 and 4 channels on rank \d"),
    "nothing": ("ValueError", "input: got 0 values per channel on all ranks together; allowed: 2 or more to train"),
    "one value": ("ValueError", "input: got 1 value per channel on all ranks together"),
    "backward and forward": ("RuntimeError", r"call: got forward on rank 0 and backward on rank \d"),
    "recorded by one": ("RuntimeError", r"call: got backward on rank 0 and sum on rank \d"),
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_error_on_one_rank_raises_on_all(results: list[dict[Any, Any]], ranks: int) -> None:
    """With its class and text, and nothing has changed; the last call of all shows that none has fallen behind."""
    found = of(results, ranks, "errors")
    told = {name: [one[name] for one in found] for name in found[0]}
    for name, (kind, text) in OF_THE_LAST.items():
        assert_told(told.pop(name), ranks - 1, kind, text)
    for name, (kind, text) in OF_ALL.items():
        assert_all_raise(told.pop(name), kind, text)
    for kind, _ in told.pop("batched gradients"):
        assert kind in ("TypeError", "NotImplementedError")
    assert told == {"after all": [True] * ranks}


@pytest.mark.skipif(not rank_cases.EXAMPLES.is_dir(), reason="examples are not beside the tests: no checkout")
def test_example() -> None:
    """Started without torchrun, which takes longer than the example."""
    pytest.importorskip("sklearn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = rank_cases.python(rank_cases.EXAMPLES / "data_parallel_torch.py")
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    commands = [["env", f"RANK={rank}", *script] for rank in range(2)]
    rank_cases.assert_example(rank_cases.run(commands, **environment))


# In one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (4, 5, 6, 3), (3, 5, 2, 4, 3)], ids=str)
def test_without_a_process_group(shape: tuple[int, ...], training: bool) -> None:
    """It is torch's layer, which is batch normalization then."""
    theirs = randomized(torch.nn.SyncBatchNorm(5)).train(training)
    ours = fastbn.torch.SyncBatchNorm(5).train(training)
    ours.load_state_dict(theirs.state_dict())
    x, dy = data(shape), data(shape)
    assert_agree(called(ours, x, dy), called(theirs, x, dy), 1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 0, 3), (1, 5)], ids=str)
def test_refuses_what_torch_refuses(shape: tuple[int, ...]) -> None:
    channels = shape[1] if len(shape) > 1 else 5
    with pytest.raises((ValueError, RuntimeError)) as wanted:
        torch.nn.SyncBatchNorm(channels)(torch.ones(shape))
    with pytest.raises(wanted.type, match=re.escape(str(wanted.value))):
        fastbn.torch.SyncBatchNorm(channels)(torch.ones(shape))


def test_arguments_and_state_are_torchs() -> None:
    theirs, ours = torch.nn.SyncBatchNorm, fastbn.torch.SyncBatchNorm
    assert [*inspect.signature(theirs).parameters, "activation"] == list(inspect.signature(ours).parameters)
    layers = [kind(3, 1e-3, None, True, False, None, None, torch.float64) for kind in (theirs, ours)]
    assert list(layers[0].state_dict()) == list(layers[1].state_dict())
    assert vars(layers[0]).keys() | {"activation"} == vars(layers[1]).keys()
    for name in ("eps", "momentum", "affine", "track_running_stats", "process_group", "num_features"):
        assert getattr(layers[0], name) == getattr(layers[1], name)
    assert not isinstance(layers[1], theirs), "DistributedDataParallel refuses it on a CPU"


@pytest.mark.parametrize("copied", ["pickle", "deepcopy"])
def test_pickles_and_copies(copied: str) -> None:
    layer = randomized(fastbn.torch.SyncBatchNorm(3, activation="relu"))
    if copied == "pickle":
        memory = io.BytesIO()
        torch.save(layer, memory)
        memory.seek(0)
        again = torch.load(memory, weights_only=False)
    else:
        again = copy.deepcopy(layer)
    assert type(again) is fastbn.torch.SyncBatchNorm
    assert again.activation == "relu"
    assert_agree(again.state_dict(), layer.state_dict(), 0)


def trained_elsewhere() -> Any:
    """A network as torch.nn.SyncBatchNorm.convert_sync_batchnorm leaves it, with statistics of its own."""
    return randomized(torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch_cases.network())).eval()


@pytest.mark.parametrize("convert", ["convert_batchnorm", "convert_sync_batchnorm"])
def test_a_model_trained_elsewhere(convert: str) -> None:
    """Converts with its objects and its state, evaluates as torch's layers do, and is reverted."""
    model, x = trained_elsewhere(), torch.randn(4, 3, 8, 8)
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    kinds, attributes = [type(module) for module in modules], [set(vars(module)) for module in modules]
    wanted = model(x)
    assert getattr(fastbn.torch, convert)(model) is model
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    converted = [module for module in modules if type(module) is fastbn.torch.SyncBatchNorm]
    assert len(converted) == kinds.count(torch.nn.SyncBatchNorm) == 6
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert_agree(model.state_dict(), state, 0)
    assert fastbn.torch.revert_batchnorm(model) is model
    assert [type(module) for module in modules] == kinds
    assert [set(vars(module)) for module in modules] == attributes
    assert_agree(model.state_dict(), state, 0)


def test_conversion_and_its_inverse() -> None:
    """Of torch's layers and fastbn's, whose activation stays; each becomes what revert_batchnorm would have made it."""
    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(5), torch.nn.BatchNorm2d(5), torch.nn.BatchNorm3d(5), fastbn.torch.BatchNorm2d(5)
    )
    attributes = [set(vars(module)) for module in model]
    attributes[3] = attributes[1]
    fused = fastbn.torch.convert_sync_batchnorm(fastbn.torch.BatchNorm2d(5, activation="relu"))
    assert type(fused) is fastbn.torch.SyncBatchNorm
    assert fused(torch.randn(3, 5, 2, 2)).min() == 0
    fastbn.torch.convert_sync_batchnorm(model)
    fastbn.torch.convert_sync_batchnorm(copy.deepcopy(fastbn.torch.convert_sync_batchnorm(model)))
    assert {type(module) for module in model} == {fastbn.torch.SyncBatchNorm}
    assert all(module.process_group is None for module in model)
    fastbn.torch.revert_batchnorm(model)
    kinds = [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.BatchNorm2d]
    assert [type(module) for module in model] == kinds
    assert [set(vars(module)) for module in model] == attributes


def test_conversion_names_what_it_leaves() -> None:
    """Since a layer that is not synchronized trains on other statistics."""

    class Own(torch.nn.BatchNorm2d):  # type: ignore[misc]
        pass

    model = torch.nn.Sequential(*(torch.nn.BatchNorm2d(3) for _ in range(3)), Own(3))
    model[1].forward, model[2].activation = torch.relu, "relu"
    with pytest.warns(
        UserWarning, match=r"leaves layers unsynchronized: '1' \(BatchNorm2d\), '2' \(BatchNorm2d\), '3' \(.*Own\)"
    ):
        fastbn.torch.convert_sync_batchnorm(model)
    theirs = torch.nn.BatchNorm2d
    assert [type(module) for module in model] == [fastbn.torch.SyncBatchNorm, theirs, theirs, Own]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbn.torch.convert_sync_batchnorm(torch_cases.network())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: got list; allowed: a torch.nn.Module"):
        fastbn.torch.convert_sync_batchnorm([])
    model = torch.nn.BatchNorm2d(3)
    with pytest.raises(TypeError, match=r"process_group: got 'world' .*; allowed: a torch.distributed.ProcessGroup"):
        fastbn.torch.convert_sync_batchnorm(model, "world")
    assert type(model) is torch.nn.BatchNorm2d
    with pytest.raises(TypeError, match="process_group: got 7"):
        fastbn.torch.SyncBatchNorm(3, process_group=7)
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        fastbn.torch.SyncBatchNorm(3, activation="tanh")


def test_other_devices_go_to_torchs_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training over several processes, with residual and activation."""
    seen = []

    def theirs(layer: Any, x: Any) -> Any:
        seen.append(layer)
        return -x

    layer = fastbn.torch.SyncBatchNorm(3, activation="relu")
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", theirs)
    monkeypatch.setattr(layer, "_group", lambda: "a group")
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        assert layer(x, x).device.type == "cuda"
    assert seen == [layer]
