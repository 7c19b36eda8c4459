"""Does convert_batchnorm(fuse=True) fuse what it may, and nothing else, and are the results those of the model?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch_cases import FORMATS, Residual, as_found, data, network, randomized, torch
from torch_fusing import FUSED, SHAPE, Block, check, fused, graph_of, in_place, lenient, report_of
from torch_others import BatchNormAct2d, FrozenBatchNorm2d, importable

import fastbn.torch

__all__ = ["as_found", "importable", "lenient"]
nn = torch.nn
functional = torch.nn.functional


def asked(y: Any) -> Any:
    return y * 2 if isinstance(y, torch.Tensor) else y


NOT_FUSED = {
    "used twice": (lambda s, x: (lambda y: y + torch.relu(y))(s.bn(x)), "its result is used 2 times"),
    "returned, too": (lambda s, x: (lambda y: (torch.relu(y), y))(s.bn(x)), "its result is used 2 times"),
    "twice itself": (lambda s, x: (lambda y: y + y)(s.bn(x)), "add follows it"),
    "shape": (lambda s, x: (lambda y: torch.relu(y) * y.shape[0])(s.bn(x)), "its result is used 2 times"),
    "alpha": (lambda s, x: torch.add(s.bn(x), x, alpha=2), "add follows it"),
    "a number": (lambda s, x: s.bn(x) + 1, "add follows it"),
    "into the other": (lambda s, x: torch.relu(in_place(x * 1, s.bn(x))), "iadd follows it"),
    "its class asked for": (lambda s, x: torch.relu(asked(s.bn(x))), "gives the result to isinstance()"),
    "its class asked for in evaluation": (
        lambda s, x: torch.relu(asked(s.bn(x)) if not s.training else s.bn(x)),
        "gives the result to isinstance()",
    ),
    "tanh": (lambda s, x: torch.tanh(s.bn(x)), "tanh follows it"),
    "clipped": (lambda s, x: functional.hardtanh(s.bn(x), -1.0, 6.0), "hardtanh follows it"),
    "called twice": (lambda s, x: torch.relu(s.bn(torch.relu(s.bn(x)))), "it is called 2 times"),
    "alone": (lambda s, x: s.bn(x), "its result leaves Block"),
    "untraceable": (lambda s, x: torch.relu(s.bn(x)) if x.sum() > 0 else s.bn(x), "cannot record Block"),
    "input shared": (lambda s, x: (lambda z: s.act(s.bn(z) + z.mul_(2)))(s.conv(x)), "which might change its input"),
    "input a view": (lambda s, x: (lambda z: s.act(s.bn(z[:]) + z.mul_(2)))(s.conv(x)), "which might change its input"),
    "after the sum": (
        lambda s, x: (lambda z: (lambda y, w: s.act(y) + w)(s.bn(s.conv(x)) + z, z.mul_(2)))(x * 1),
        "which might change its input",
    ),
}


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", FUSED)
def test_fused(which: str, place: str) -> None:
    """What follows is no node of its own, and all numbers are the model's."""
    forward, words = FUSED[which]
    theirs = randomized(Block(forward)).double().to(memory_format=FORMATS[place])
    ours = fused(theirs, f"converted; fused with {words}")
    check(theirs, ours, place=place)
    names = graph_of(ours(data(SHAPE, place, torch.float64).requires_grad_()))
    assert "NormalizationBackward" in names
    apart = {"AddBackward0", "ReluBackward0", "HardtanhBackward0", "SiluBackward0", "HardswishBackward0"}
    apart |= {"LeakyReluBackward0"} if "sigmoid" not in which else {"SigmoidBackward0"}
    assert names.isdisjoint(apart) or which == "sum used twice"


@pytest.mark.parametrize("which", NOT_FUSED)
def test_not_fused(which: str) -> None:
    """The report says why, and no forward is replaced."""
    forward, words = NOT_FUSED[which]
    theirs = randomized(Block(forward)).double()
    ours = fused(theirs, words)
    assert "fused with" not in str(report_of(theirs))
    assert not any("forward" in vars(module) for module in ours.modules())
    x = data(SHAPE, dtype=torch.float64)
    if which == "untraceable":
        ours.run, theirs.run = FUSED["module"][0], FUSED["module"][0]
    if not which.startswith("input"):
        check(theirs, ours)
    with torch.no_grad():  # with gradients, autograd refuses inputs that change
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["timm", "frozen", "own", "act"])
def test_other_norms(norm: str) -> None:
    """Of timm without an activation, of torchvision, and fastbn's own."""
    layers = {
        "timm": BatchNormAct2d(6),
        "frozen": FrozenBatchNorm2d(6),
        "own": nn.BatchNorm2d(6, affine=False),
        "act": BatchNormAct2d(6, nn.SiLU()),
    }
    theirs = randomized(Block(FUSED["around"][0], layers[norm])).double()
    ours = fused(theirs, "its SiLU; not fused: it has an activation of its own" if norm == "act" else "fused with")
    check(theirs, ours)
    assert fused(nn.Sequential(fastbn.torch.BatchNorm2d(6), nn.ReLU()), "already; fused with relu")


def test_subclasses_of_fastbns_layers() -> None:
    """Their forwards may be anything."""

    class Mine(fastbn.torch.BatchNorm2d):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    model = nn.Sequential(Mine(6), nn.ReLU())
    check(model.double(), fused(model, "its class has a forward of its own"))


def test_sequentials() -> None:
    """Within others, and as the inner part of a block, whose addition is outside."""
    inner = nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), nn.ReLU6(), nn.Conv2d(6, 6, 1))
    last = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    block = Block(lambda s, x: s.act(x + s.deep(x)), deep=nn.Sequential(inner, last))
    theirs = randomized(nn.Sequential(block, nn.Sequential(nn.BatchNorm2d(6), nn.Identity()), nn.LeakyReLU())).double()
    report: list[Any] = []
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs), fuse=True, report=report)
    assert [entry.note for entry in report] == [
        "converted; not fused: no forward that torch.fx can record calls it",
        "converted; fused with relu6",
        "converted; fused with the addition and relu",
        "converted; fused with leaky_relu",
    ]
    check(theirs, ours)
    x = data(SHAPE, dtype=torch.float64)
    for part in ("0.deep.0.0", "0.deep", "0.deep.1.1", "1"):  # a part by itself gives tensors, and the model's
        found, wanted = (model.eval().get_submodule(part)(x) for model in (ours, theirs))
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_arguments_with_defaults() -> None:
    """The way that the forward takes by default is fused; with other arguments the numbers are right, too."""

    class Optional(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Any, shift: Any = None, *, scale: float = 1.0) -> Any:
            y = self.bn(x)
            if shift is not None:
                y = y * shift
            return torch.relu(y) if scale == 1.0 else torch.relu(y) * scale

    theirs = randomized(Optional()).double()
    ours = fused(theirs, "fused with relu")
    check(theirs, ours)
    x = data(SHAPE, dtype=torch.float64)
    for args, kwargs in (((x, x), {}), ((x,), {"scale": 2.0}), ((), {"x": x, "shift": 2.0})):
        torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs), rtol=1e-9, atol=1e-9)


class Given(nn.Module):  # type: ignore[misc]
    """Gives its input on."""

    def forward(self, x: Any) -> Any:
        return x


class Rectified(nn.Module):  # type: ignore[misc]
    """A ReLU of a model's own."""

    def forward(self, x: Any) -> Any:
        return functional.relu(x)


@pytest.mark.parametrize("where", ["given", "rect"])
def test_modules_that_the_result_passes(where: str) -> None:
    """Fused, until one of them has a hook, which sees a tensor."""
    theirs = randomized(Block(lambda s, x: s.rect(s.given(s.bn(s.conv(x)))), given=Given(), rect=Rectified())).double()
    ours = fused(theirs, "fused with relu")
    check(theirs, ours)
    x, seen = data(SHAPE, dtype=torch.float64).requires_grad_(), []
    assert ours(x).grad_fn.name() == "NormalizationBackward"
    getattr(ours, where).register_forward_hook(lambda module, args, y: seen.extend((args[0], y)))
    assert ours(x).grad_fn.name() == "ReluBackward0"
    assert all(type(one) is torch.Tensor for one in seen)
    assert len(seen) == 2


def test_two_norms_in_one_sum() -> None:
    """One of them takes the other's result as its residual."""
    around = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    theirs = randomized(Block(lambda s, x: s.act(s.bn(s.conv(x)) + s.around(x)), around=around)).double()
    ours = fused(theirs, "the addition that follows is fused with another norm")
    check(theirs, ours)


def test_whole_networks() -> None:
    """The residual blocks of the other tests, whose norms are in containers."""
    theirs = network().double()
    report: list[Any] = []
    ours = fastbn.torch.convert_batchnorm(copy.deepcopy(theirs), fuse=True, report=report)
    notes = [entry.note.removeprefix("converted; ") for entry in report]
    assert notes == ["fused with relu", *["fused with relu", "fused with the addition and relu"] * 2, notes[-1]]
    check(theirs, ours, (4, 3, 8, 8))


def test_only_forwards_are_replaced() -> None:
    """Objects, classes, state and text stay; reverting takes the forwards away; twice is once."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), Residual(3))
    before = [(id(module), type(module), set(vars(module))) for module in model.modules()]
    text, state = repr(model), list(model.state_dict())
    fastbn.torch.convert_batchnorm(model, fuse=True)
    changed = {name: set(vars(module)) for name, module in model.named_modules()}
    assert [name for name, own in changed.items() if "forward" in own] == [
        "",
        "1",
        "3",
        "3.norms.first",
        "3.norms.second",
    ]
    assert repr(model) == text
    assert list(model.state_dict()) == state
    forwards = [vars(module).get("forward") for module in model.modules()]
    report: list[Any] = []
    fastbn.torch.convert_batchnorm(model, fuse=True, report=report)
    fastbn.torch.convert_batchnorm(model)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert {entry.note for entry in report} == {"fastbn's already; fused before"}
    fastbn.torch.revert_batchnorm(model)
    assert [(id(module), type(module), set(vars(module))) for module in model.modules()] == before


def test_forwards_that_a_model_has_stay() -> None:
    theirs = Block(FUSED["module"][0])
    theirs.forward = lambda x: x * 2
    mine = theirs.forward
    fastbn.torch.convert_batchnorm(theirs, fuse=True)
    assert theirs.forward is mine
    fastbn.torch.revert_batchnorm(theirs)
    assert theirs.forward is mine
