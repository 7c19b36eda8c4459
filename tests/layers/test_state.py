"""Does load_state_dict take what torch's takes and what checkpoints hold, wholly or not at all?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from test_checks import STRIDED, read_only, zeros
from test_layer import state_of, trained

import fastbn

Array = np.ndarray[Any, Any]
NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def assert_refused(bn: fastbn.BatchNorm, state: Any, error: type[Exception], *words: str, **options: Any) -> None:
    """Loading raises `error` with all words in its message; every array and the counter stay as they are."""
    before = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in vars(bn).items()}
    with pytest.raises(error) as caught:
        bn.load_state_dict(state, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert list(vars(bn)) == list(before)
    for name, value in vars(bn).items():
        assert np.array_equal(value, before[name]) if isinstance(value, np.ndarray) else value == before[name]


def other_state() -> dict[str, Any]:
    """One that differs from that of `trained()` everywhere."""
    state: dict[str, Any] = {name: np.full(5, i + 10, np.float32) for i, name in enumerate(NAMES[:4])}
    return {**state, "num_batches_tracked": np.array(77)}


# Counters ------------------------------------------------------------------------------------------------------------

COUNTERS: dict[str, tuple[Any, int]] = {
    "int": (7, 7),
    "float": (7.0, 7),
    "int64": (np.int64(7), 7),
    "shape ()": (np.array(7), 7),
    "shape (1,)": (np.array([7]), 7),
    "a list of one": ([7], 7),
    "int32": (np.array([7], np.int32), 7),
    "uint64": (np.array(7, np.uint64), 7),
    "float32 of shape ()": (np.array(7, np.float32), 7),
    "float32 of shape (1,)": (np.array([7], np.float32), 7),
    "float16": (np.float16(7), 7),
    "big-endian": (np.array([7.0], ">f8"), 7),
    "an object": (np.array([7], object), 7),
    "0": (-0.0, 0),
    "the largest": (2**63 - 1, 2**63 - 1),
    "the largest uint64 that fits": (np.uint64(2**63 - 1), 2**63 - 1),
    "a large float": (2.0**62, 2**62),
}


@pytest.mark.parametrize("counter", COUNTERS)
def test_counters(counter: str) -> None:
    value, wanted = COUNTERS[counter]
    bn = trained()
    bn.load_state_dict({**other_state(), "num_batches_tracked": value})
    assert bn.num_batches_tracked == wanted
    assert type(bn.num_batches_tracked) is int
    assert bn.state_dict()["num_batches_tracked"] == wanted
    assert (bn.weight == 10).all()


BAD_COUNTERS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "a fraction": (1.5, TypeError, ("1.5", "integer")),
    "a fraction in an array": (np.array([1.5], np.float32), TypeError, ("1.5", "integer")),
    "nan": (np.nan, TypeError, ("nan", "integer")),
    "inf": (np.inf, TypeError, ("inf", "integer")),
    "negative": (-1, ValueError, ("-1", "2**63 - 1")),
    "a negative float": (-3.0, ValueError, ("-3", "2**63 - 1")),
    "2**63": (2**63, ValueError, (str(2**63), "2**63 - 1")),
    "2**63 as a float": (2.0**63, ValueError, (str(2**63), "2**63 - 1")),
    "uint64": (np.uint64(2**64 - 1), ValueError, (str(2**64 - 1), "2**63 - 1")),
    "2**70": (2**70, ValueError, (str(2**70), "2**63 - 1")),
    "1e300": (1e300, ValueError, ("2**63 - 1",)),
    "two": (np.array([1, 2]), ValueError, ("(2,)", "integer")),
    "none": (np.array([], int), ValueError, ("(0,)", "integer")),
    "many": (np.zeros((1000, 1000)), ValueError, ("(1000, 1000)", "integer")),
    "a bool": (True, TypeError, ("True", "integer")),
    "an array of a bool": (np.array([True]), TypeError, ("True", "integer")),
    "a string": ("7", TypeError, ("'7'", "integer")),
    "None": (None, TypeError, ("None", "integer")),
    "complex": (7 + 0j, TypeError, ("(7+0j)", "integer")),
    "a date": (np.datetime64(7, "s"), TypeError, ("integer",)),
    "a masked array": (np.ma.masked_array([7]), TypeError, ("masked",)),
}


@pytest.mark.parametrize("bad", BAD_COUNTERS)
@pytest.mark.parametrize("prefix", ["", "norm.1."])
def test_a_bad_counter_names_its_key(bad: str, prefix: str) -> None:
    """Before anything was loaded."""
    value, error, words = BAD_COUNTERS[bad]
    state = {prefix + name: array for name, array in {**other_state(), "num_batches_tracked": value}.items()}
    words = (f"state['{prefix}num_batches_tracked']", *words)
    assert_refused(trained(), state, error, *words, prefix=prefix)


# All or nothing ------------------------------------------------------------------------------------------------------


class Raises:
    """What fails only when it is converted."""

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise RuntimeError("no data")


class Lazy(Mapping[str, Any]):
    """A mapping whose last value cannot be read."""

    def __getitem__(self, name: str) -> Any:
        if name == NAMES[-1]:
            raise OSError("the file is gone")
        return other_state()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_cannot_be_converted(name: str) -> None:
    for value in (Raises(), [[1.0], [1.0, 2.0]], object()):
        assert_refused(trained(), {**other_state(), name: value}, TypeError, f"state['{name}']")


def test_a_mapping_that_fails() -> None:
    assert_refused(trained(), Lazy(), OSError, "the file is gone")


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_target_that_cannot_be_written(name: str) -> None:
    """Of weight and bias, which are not updated by calls, the layer takes such arrays."""
    bn = trained()
    getattr(bn, name).flags.writeable = False
    assert_refused(bn, other_state(), ValueError, name, "read-only", "writable")


def test_targets_that_share_memory() -> None:
    """One of them could not keep what is loaded."""
    bn = trained()
    bn.bias = bn.weight
    assert_refused(bn, other_state(), ValueError, "weight", "bias", "shared")
    bn = trained()
    bn.weight = STRIDED(np.ones(1, np.float32), (5,), (0,))
    assert_refused(bn, other_state(), ValueError, "weight", "strides", "overlap")


def test_a_target_of_a_class_of_its_own() -> None:
    """Whose assignment raises: the memory is written, not the class asked."""

    class Stubborn(np.ndarray):  # type: ignore[type-arg]
        def __setitem__(self, *_: Any) -> None:
            raise RuntimeError("no")

    bn = trained()
    bn.running_var = np.ones(5, np.float32).view(Stubborn)
    bn.load_state_dict(other_state())
    assert (np.asarray(bn.running_var) == 13).all()
    assert (bn.weight == 10).all()


def test_a_state_made_of_the_layers_own_arrays() -> None:
    """Swapped: each is read before any is written."""
    bn = trained()
    weight, bias = bn.weight.copy(), bn.bias.copy()
    bn.load_state_dict({**bn.state_dict(), "weight": bn.bias, "bias": bn.weight})
    assert np.array_equal(bn.weight, bias)
    assert np.array_equal(bn.bias, weight)


def test_a_value_too_large_for_the_last_array() -> None:
    state = {**other_state(), "running_var": np.full(5, 1e300)}
    assert_refused(trained(), state, ValueError, "state['running_var']", "1e+300", "float32")


# Prefixes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["bn.", "layer1.0.bn.", "module.", "x"])
def test_prefix(prefix: str) -> None:
    """Of a whole network's state, the layer's; and the layer's state for a network's."""
    bn, other = trained(), fastbn.BatchNorm(5)
    network = {"conv.weight": zeros((5, 3)), "weight": zeros(9), 7: "seven", "bn2.weight": zeros(3), "other": Raises()}
    state = bn.state_dict(prefix)
    assert list(state) == [prefix + name for name in NAMES]
    assert other.load_state_dict({**network, **state}, prefix=prefix) is None
    assert state_of(other) == state_of(bn)
    assert_refused(other, {**network, **state}, ValueError, "state", "'conv.weight'")
    assert_refused(other, state, ValueError, "state", f"'{prefix}weight'", "'weight'")


def test_a_state_without_a_counter() -> None:
    """Has no name in its place."""
    bn = fastbn.BatchNorm(5, track_running_stats=False)
    for name in ("None", "num_batches_tracked"):
        assert_refused(bn, {**bn.state_dict(), name: np.array(3)}, ValueError, "state", repr(name), "'weight'")


def test_bad_prefixes() -> None:
    bn = trained()
    state = {f"bn.{name}": array for name, array in other_state().items()}
    for wrong in (None, 1, b"bn.", ["bn."]):
        assert_refused(bn, state, TypeError, "prefix", "string", prefix=wrong)
        with pytest.raises(TypeError, match="prefix"):
            bn.state_dict(wrong)  # type: ignore[arg-type]
    assert_refused(bn, state, ValueError, "no name", "'layer9.'", "'layer9.weight'", prefix="layer9.")
    assert_refused(bn, state, ValueError, "'bn.weight'", "'bnweight'", prefix="bn")
    extra = {**state, "bn.gamma": zeros(5)}
    assert_refused(bn, extra, ValueError, "'bn.gamma'", "'bn.weight'", prefix="bn.")
    del state["bn.bias"]
    assert_refused(bn, state, ValueError, "'bn.bias'", prefix="bn.")


def test_the_counter_may_be_missing_behind_a_prefix() -> None:
    bn = trained()
    state = {f"bn.{name}": array for name, array in other_state().items() if name != "num_batches_tracked"}
    bn.load_state_dict(state, prefix="bn.")
    assert bn.num_batches_tracked == 2
    assert (bn.bias == 11).all()


# Tensors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tensors(name: str, dtype: str) -> None:
    """Of every float dtype, parameters that require a gradient among them; no digit is lost."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, name)
    values = torch.tensor([1.0, 0.5, -2.0, 1 + 1 / 8, 96.0], dtype=torch.float64)
    state = {
        "weight": torch.nn.Parameter(values.to(kind)),
        "bias": values.to(kind).clone().requires_grad_(),
        "running_mean": values.flip(0).to(kind),
        "running_var": torch.stack([values, values], 1)[:, 1].to(kind),
        "num_batches_tracked": torch.tensor([7.0]).to(kind),
    }
    bn = fastbn.BatchNorm(5, dtype=dtype)
    bn.load_state_dict(state)
    exact = values.to(kind).double().numpy()
    assert (name == "float8_e5m2") == (exact[3] != 1 + 1 / 8), "of these values, that one is rounded"
    for array, wanted in zip(bn._state().values(), (exact, exact, exact[::-1], exact), strict=True):
        assert array.dtype == dtype
        assert np.array_equal(array, wanted)
    assert bn.num_batches_tracked == 7


def test_a_float64_tensor_keeps_its_digits() -> None:
    torch = pytest.importorskip("torch")
    values = torch.linspace(0.1, 0.9, 5, dtype=torch.float64) / 3
    bn = fastbn.BatchNorm(5, dtype="float64")
    bn.load_state_dict(dict.fromkeys(NAMES[:4], values))
    assert np.array_equal(bn.weight, values.numpy())


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_a_checkpoint(half: str, tmp_path: Any) -> None:
    """Of a network in half precision, as torch saves and loads it."""
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 5, 3), torch.nn.BatchNorm1d(5))
    network(torch.randn(4, 2, 8))
    network.to(getattr(torch, half))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    bn = fastbn.BatchNorm(5)
    bn.load_state_dict(torch.load(tmp_path / "model.pt"), prefix="1.")
    for name in NAMES[:4]:
        assert np.array_equal(getattr(bn, name), getattr(network[1], name).detach().float().numpy())
    assert bn.num_batches_tracked == 1


def test_tensors_without_data() -> None:
    torch = pytest.importorskip("torch")
    for bad in (torch.ones(5, device="meta"), torch.ones(5).to_sparse(), torch.ones(5, dtype=torch.int64)):
        for name in ("weight", "running_var"):
            assert_refused(trained(), {**other_state(), name: bad}, TypeError, f"state['{name}']")
    bad = torch.ones((), device="meta")
    assert_refused(trained(), {**other_state(), "num_batches_tracked": bad}, TypeError, "state['num_batches_tracked']")


def test_read_only_values_are_fine() -> None:
    state = {name: read_only(array) for name, array in other_state().items()}
    bn = trained()
    bn.load_state_dict(state)
    assert (bn.running_var == 13).all()
