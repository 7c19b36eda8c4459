"""Are the norms of timm and torchvision converted, is what stays as it is reported, and does everything come back?"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from torch_cases import FORMATS, SHAPES, as_found, assert_agree, called, data, randomized, torch
from torch_others import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, importable

import fastbn.torch

__all__ = ["as_found", "importable"]
nn = torch.nn
KNOWN = {
    "relu": (nn.ReLU(inplace=True), "relu"),
    "relu6": (nn.ReLU6(), "relu6"),
    "leaky_relu": (nn.LeakyReLU(0.2, inplace=True), ("leaky_relu", 0.2)),
    "silu": (nn.SiLU(inplace=True), "silu"),
    "hardswish": (nn.Hardswish(), "hardswish"),
    "sigmoid": (nn.Sigmoid(), "sigmoid"),
    "none": (nn.Identity(), None),
}
"""Activations, and what fastbn calls them."""


# timm's --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", KNOWN)
def test_norms_with_activation(act: str, place: str, dtype: str, tolerance: float, training: bool) -> None:
    """Results, gradients and statistics, and the kernels compute the activation, too."""
    theirs = randomized(BatchNormAct2d(5, copy.deepcopy(KNOWN[act][0]), momentum=0.3))
    theirs.to(getattr(torch, dtype)).train(training)
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs))
    assert isinstance(ours, fastbn.torch.BatchNorm2d)
    assert isinstance(ours, BatchNormAct2d)
    assert ours.activation == KNOWN[act][1]
    x, dy = (data(SHAPES[2], place, getattr(torch, dtype)) for _ in range(2))
    assert_agree(called(ours, x, dy), called(theirs, x, dy), tolerance)
    assert ours(x.requires_grad_()).grad_fn.name() == "NormalizationBackward"


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_options(options: dict[str, Any]) -> None:
    theirs = randomized(BatchNormAct2d(5, nn.SiLU(), **options)).double()
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs))
    for training in (True, True, False):
        x, dy = (data(SHAPES[2], dtype=torch.float64) for _ in range(2))
        assert_agree(called(ours.train(training), x, dy), called(theirs.train(training), x, dy), 1e-12)


def test_activations_that_fastbn_has_not() -> None:
    """They run after the norm, and the report says so."""
    for act in (nn.GELU(), nn.PReLU(), nn.Hardtanh(0.0, 6.0), nn.Sequential(nn.ReLU())):
        theirs = randomized(BatchNormAct2d(5, act)).double()
        report: list[Any] = []
        ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs), report=report)
        assert ours.activation is None
        assert f"its {type(act).__name__} runs after it: fastbn has no such activation" in report[0].note
        x, dy = (data(SHAPES[2], dtype=torch.float64) for _ in range(2))
        assert_agree(called(ours, x, dy), called(theirs, x, dy), 1e-12)


def test_drop_layers() -> None:
    """They stay between the norm and the activation, with the same random numbers."""
    theirs = randomized(BatchNormAct2d(5, nn.ReLU(), nn.Dropout2d(0.5))).double()
    report: list[Any] = []
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs), report=report)
    assert report[0].note == "converted; its ReLU runs after it: Dropout2d is between"
    x, dy, found = *(data(SHAPES[2], dtype=torch.float64) for _ in range(2)), []
    for training in (True, False):
        for layer in (ours, theirs):
            torch.manual_seed(1)
            found.append(called(layer.train(training), x, dy))
        assert_agree(*found[-2:], 1e-12)


def test_parts_are_looked_at_in_each_call() -> None:
    """They may be replaced and changed, and hooks see them."""
    theirs = randomized(BatchNormAct2d(5, nn.LeakyReLU(0.1))).double()
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs))
    x, seen = data(SHAPES[2], dtype=torch.float64), []

    def agree() -> None:
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)

    agree()
    for layer in (ours, theirs):
        layer.act.negative_slope = 0.5
    agree()
    for layer in (ours, theirs):
        layer.act = nn.Tanh()
    agree()
    for layer in (ours, theirs):
        layer.act = nn.ReLU()
    handle = ours.act.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    agree()
    assert seen[0].min() < 0
    handle.remove()
    agree()
    assert len(seen) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    with handle:
        ours(x)
    assert seen[1:] == [nn.Identity, nn.ReLU, type(ours)]
    for layer in (ours, theirs):
        layer.drop = nn.Dropout(0.5).eval()
    agree()


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU()], ids=["silu", "gelu"])
def test_residual_of_a_norm_with_activation(act: Any) -> None:
    ours = fastbn.torch.convert_batchnorm(randomized(BatchNormAct2d(5, act))).double()
    x, residual = (data(SHAPES[2], dtype=torch.float64) for _ in range(2))
    plain = nn.functional.batch_norm(x, None, None, ours.weight, ours.bias, True) + residual
    torch.testing.assert_close(ours(x, residual), act(plain), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x, residual, "relu"), plain.relu(), rtol=1e-12, atol=1e-12)


# Frozen --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["none", "silu", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
def test_frozen(place: str, training: bool, act: str) -> None:
    """In training, too, no statistics are taken of the batch."""
    layers = [FrozenBatchNorm2d(5, eps=0.01)] * (act == "none") + [FrozenBatchNormAct2d(5, KNOWN[act][0])]
    for theirs in layers:
        randomized(theirs).double().train(training)
        ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs))
        assert isinstance(ours, type(theirs))
        assert ours.training is training
        x, dy = (data(SHAPES[2], place, torch.float64) for _ in range(2))
        assert_agree(called(ours, x, dy), called(theirs, x, dy), 1e-12)
        y = ours(x.requires_grad_())
        assert y.grad_fn.name() == "NormalizationBackward"


def test_frozen_of_other_dtypes_and_shapes() -> None:
    """What the kernels do not compute, the layer's formula does, with the dtypes and shapes that it gives."""
    theirs = randomized(FrozenBatchNorm2d(5))
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs))
    for x in (
        data(SHAPES[2]).half(),
        data(SHAPES[2]).double(),
        data((5, 3, 2)),
        data((0, 5, 3, 2)),
        torch.ones(2, 5, 3, 3, dtype=torch.int64),
    ):
        y, wanted = ours(x), theirs(x)
        assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        conv = nn.Conv2d(5, 5, 1)
        assert ours(conv(data(SHAPES[2]))).dtype == theirs(conv(data(SHAPES[2]))).dtype == torch.float32
    single = [fastbn.torch.convert_batchnorm(FrozenBatchNorm2d(1)), FrozenBatchNorm2d(1)]
    x = data(SHAPES[2])
    torch.testing.assert_close(single[0](x), single[1](x))  # one channel is broadcast


def test_frozen_buffers_with_gradients() -> None:
    theirs = randomized(FrozenBatchNorm2d(5)).double()
    found = []
    for layer in (fastbn.torch.convert_batchnorm(copy.deepcopy(theirs)), theirs):
        torch.manual_seed(0)
        for tensor in layer.buffers():
            tensor.requires_grad_()
        layer(data(SHAPES[2], dtype=torch.float64)).pow(2).sum().backward()
        found.append({name: tensor.grad for name, tensor in layer.named_buffers()})
    assert_agree(*found, 1e-10)


# What is converted, and what is said of it ---------------------------------------------------------------------------


class Own(nn.BatchNorm2d):  # type: ignore[misc]
    """A subclass with a forward of its own."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) * 2


class Before(BatchNormAct2d):
    """An activation before the norm, under a name that is known."""

    def forward(self, x: Any) -> Any:
        return nn.BatchNorm2d.forward(self, self.act(x))


def renamed(layer: Any, **more: Any) -> Any:
    """The layer with a class of timm's name that does and has something else."""
    base = nn.BatchNorm2d if isinstance(layer, nn.BatchNorm2d) else nn.Module
    layer.__class__ = type("BatchNormAct2d", (base,), {"forward": type(layer).forward})
    for name, module in more.items():
        layer.add_module(name, module)
    return layer


def test_report() -> None:
    """An entry for each norm: its name, its class, whether it was converted, and why not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy modules
        lazy = nn.LazyBatchNorm2d()
    named, patched = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    named.activation = nn.ReLU()
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "plain": nn.BatchNorm1d(3),
            "relu": BatchNormAct2d(3, nn.ReLU()),
            "none": BatchNormAct2d(3),
            "frozen": FrozenBatchNorm2d(3),
            "ours": fastbn.torch.BatchNorm3d(3),
            "sync": nn.SyncBatchNorm(3),
            "lazy": lazy,
            "own": Own(3),
            "named": named,
            "patched": patched,
            "before": renamed(Before(3, nn.ReLU())),
            "aa": renamed(BatchNormAct2d(3, nn.ReLU()), aa=nn.AvgPool2d(2)),
            "conv": nn.Conv2d(3, 3, 1),
        }
    )
    model["again"] = model["plain"]
    report: list[Any] = ["before"]
    assert fastbn.torch.convert_batchnorm(model, report=report) is model
    assert report.pop(0) == "before"
    assert {entry.name: (entry.layer, entry.converted) for entry in report} == {
        "plain": ("BatchNorm1d", True),
        "relu": ("BatchNormAct2d", True),
        "none": ("BatchNormAct2d", True),
        "frozen": ("FrozenBatchNorm2d", True),
        "ours": ("BatchNorm3d", True),
        "sync": ("SyncBatchNorm", True),
        "lazy": ("LazyBatchNorm2d", False),
        "own": ("Own", False),
        "named": ("BatchNorm2d", False),
        "patched": ("BatchNorm2d", False),
        "before": ("BatchNormAct2d", False),
        "aa": ("BatchNormAct2d", False),
    }
    notes = {entry.name: str(entry).partition(": ")[2] for entry in report}
    assert notes["plain"] == notes["none"] == notes["frozen"] == "converted"
    assert notes["relu"] == "converted with its ReLU"
    assert notes["ours"] == "fastbn's already"
    assert "does not know" in notes["own"]
    assert "does not know" in notes["lazy"]
    assert "attribute activation" in notes["named"]
    assert "a forward of its own" in notes["patched"]
    assert "does not compute what" in notes["before"]
    assert notes["aa"] == "left alone: its parts are drop, act, aa, not act and drop"
    assert str(report[0]) == "plain (BatchNorm1d): converted"
    again: list[Any] = []
    fastbn.torch.convert_batchnorm(model["relu"], report=again)
    assert str(again[0]) == "the model (BatchNormAct2d): fastbn's already"


def test_the_trial_leaves_no_trace() -> None:
    """Neither in the layer, nor in torch's random numbers, nor for hooks."""
    seen: list[Any] = []
    layer = randomized(BatchNormAct2d(3, nn.ReLU(), nn.Dropout(0.5)))
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.act.register_forward_hook(lambda *_: seen.append(1))
    before, state = copy.deepcopy(layer.state_dict()), torch.random.get_rng_state()
    fastbn.torch.convert_batchnorm(layer)
    assert_agree(layer.state_dict(), before, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert seen == []
    assert layer.training
    assert len(layer._forward_hooks) == 1


def test_other_devices() -> None:
    """Layers without memory are converted, too."""
    layer = BatchNormAct2d(3, nn.ReLU()).to("meta")
    fastbn.torch.convert_batchnorm(layer)
    assert layer.activation == "relu"
    assert layer(torch.empty(2, 3, 4, 4, device="meta")).device.type == "meta"


def test_bad_arguments() -> None:
    model = nn.BatchNorm2d(3)
    with pytest.raises(TypeError, match="fuse: got"):
        fastbn.torch.convert_batchnorm(model, fuse="yes")
    with pytest.raises(TypeError, match="report: got tuple; allowed: a list, or None"):
        fastbn.torch.convert_batchnorm(model, report=())
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        fastbn.torch.BatchNorm2d(3)(data(SHAPES[2])[:, :3], activation="tanh")
    assert type(model) is nn.BatchNorm2d


# Copies, and back ----------------------------------------------------------------------------------------------------


def others() -> Any:
    return nn.Sequential(
        BatchNormAct2d(5, nn.SiLU()), FrozenBatchNorm2d(5), FrozenBatchNormAct2d(5, nn.ReLU()), nn.BatchNorm2d(5)
    )


def test_revert() -> None:
    """Classes, attributes, objects, text and state are what they were."""
    model = randomized(others())
    model[0].register_forward_hook(lambda *_: None)
    before = [(id(module), type(module), set(vars(module))) for module in model.modules()]
    text, state = repr(model), copy.deepcopy(model.state_dict())
    fastbn.torch.convert_batchnorm(fastbn.torch.convert_batchnorm(model))
    assert repr(model) == text
    assert list(model.state_dict()) == list(state)
    assert fastbn.torch.revert_batchnorm(model) is model
    assert [(id(module), type(module), set(vars(module))) for module in model.modules()] == before
    assert_agree(model.state_dict(), state, 0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(importable: None, how: str) -> None:
    model = fastbn.torch.convert_batchnorm(randomized(others()).double())
    x = data(SHAPES[2], dtype=torch.float64)
    model(x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "state_dict":
        other = others().double()
        other.load_state_dict(model.state_dict())
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    if how != "state_dict":
        assert [type(layer) for layer in other] == [type(layer) for layer in model]
    assert repr(other) == repr(model)
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)
    assert_agree(other.state_dict(), model.state_dict(), 1e-12)
    fastbn.torch.revert_batchnorm(other)
    assert [type(layer) for layer in other] == [type(layer) for layer in others()]


def test_training_with_frozen_parameters() -> None:
    """requires_grad of weights, train() and eval(), and an optimizer that was made before."""
    losses: list[list[float]] = []
    for converts in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), *others()).double()
        model[1].weight.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        if converts:
            fastbn.torch.convert_batchnorm(model)
        losses.append([])
        for step in range(8):
            optimizer.zero_grad()
            model.train(step % 3 != 2)
            loss = model(data((4, 3, 8, 8), dtype=torch.float64)).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert model[1].weight.grad is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


# Tracers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lenient() -> Iterator[None]:
    """Torch may warn of what is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("way", ["compile", "export", "trace", "fx", "func"])
def test_tracers(lenient: None, way: str) -> None:
    """They see what the table in fastbn.torch's docstring says."""
    model = randomized(others().append(BatchNormAct2d(5, nn.GELU()))).eval()
    x = data(SHAPES[2], "channels_last")
    wanted = model(x)
    fastbn.torch.convert_batchnorm(model)
    if way == "compile":
        torch.compiler.reset()
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    elif way == "export":
        program = torch.export.export(model, (x,))
        assert "fastbn" not in str(program.graph)
        found = program.module()(x)
    elif way == "trace":
        traced = torch.jit.trace(model, x)
        assert "fastbn::" not in str(traced.inlined_graph)
        found = traced(x)
    elif way == "fx":
        graph = torch.fx.symbolic_trace(model)
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == list("01234")
        found = graph(x)
    else:
        found = torch.func.vmap(lambda x: model(x[None])[0])(x)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_channels_last_is_kept() -> None:
    model = fastbn.torch.convert_batchnorm(others()).to(memory_format=torch.channels_last)
    assert model(data(SHAPES[2], "channels_last")).is_contiguous(memory_format=FORMATS["channels_last"])
