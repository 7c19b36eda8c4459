"""Is whatever a pickle, a copy or an assignment made of a cache, of moments or of a plan refused before it is used?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest
from test_checks import assert_refused, masked, read_only, zeros

import fastbn
from fastbn.call.checks import shown
from fastbn.call.pickles import FORMAT
from fastbn.call.record import Options
from fastbn.call.results import Parts

Array = np.ndarray[Any, Any]
SHAPE, C = (6, 5, 4), 5
MISALIGNED = np.zeros(6 * C * 8 + 1, np.uint8)[1:].view(np.float64).reshape(6, C)


class Bad(NamedTuple):
    """A field of a cache, what it is changed to, and the words of the message."""

    field: str
    value: Any
    error: type[Exception]
    words: tuple[str, ...]

    def __str__(self) -> str:
        value = self.value
        text = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else shown(value)[:30]
        return f"{self.field}={text}-{'-'.join(self.words)}"


ONE = (  # of a cache of one batch; the words are what was found, and what is allowed
    Bad("saved", zeros((6, 4), "f8"), ValueError, ("saved", "(6, 4)", "(6, 5)")),
    Bad("saved", zeros((6, 50), "f8"), ValueError, ("saved", "(6, 50)", "(6, 5)")),
    Bad("saved", zeros((5, 5), "f8"), ValueError, ("saved", "(5, 5)", "(6, 5)")),
    Bad("saved", zeros((5, 6), "f8").T, ValueError, ("saved", "not C-contiguous", "C-contiguous")),
    Bad("saved", zeros((6, 10), "f8")[:, ::2], ValueError, ("saved", "not C-contiguous", "C-contiguous")),
    Bad("saved", zeros((6, 5), ">f8"), ValueError, ("saved", ">f8", "byte order")),
    Bad("saved", MISALIGNED, ValueError, ("saved", "aligned")),
    Bad("saved", zeros(30, "f8"), ValueError, ("saved", "(30,)", "(6, 5)")),
    Bad("saved", zeros((6, 2, 5), "f8"), ValueError, ("saved", "(6, 2, 5)", "(6, 5)")),
    Bad("saved", zeros((6, 5), "f4"), TypeError, ("saved", "float32", "float64")),
    Bad("saved", zeros((6, 5), int), TypeError, ("saved", "int64", "float64")),
    Bad("saved", zeros((6, 5)).tolist(), TypeError, ("saved", "list", "float64")),
    Bad("saved", np.ma.masked_array(zeros((6, 5), "f8")), TypeError, ("saved", "float64")),
    Bad("saved", None, TypeError, ("saved", "None", "float64")),
    Bad("x", zeros((6, 9, 4)), ValueError, ("residual", "(6, 5, 4)", "(6, 9, 4)")),
    Bad("x", zeros((6, 5, 4), int), TypeError, ("x", "int64", "float32")),
    Bad("x", zeros((6, 5, 4), object), TypeError, ("x", "object", "float32")),
    Bad("x", masked(SHAPE), TypeError, ("x", "float32")),
    Bad("x", zeros(120), ValueError, ("x", "(120,)", "2 dimensions")),
    Bad("x", zeros(SHAPE).tolist(), TypeError, ("x", "list")),
    Bad("x", None, TypeError, ("x", "None")),
    Bad("residual", zeros((6, 5, 3)), ValueError, ("residual", "(6, 5, 3)", "(6, 5, 4)")),
    Bad("residual", zeros((1, 5, 4)), ValueError, ("residual", "(1, 5, 4)", "(6, 5, 4)")),
    Bad("residual", zeros(SHAPE, "f2"), TypeError, ("residual", "float16", "float32")),
    Bad("residual", zeros(SHAPE).tolist(), TypeError, ("residual", "list", "float32")),
    Bad("residual", 0, TypeError, ("residual", "0 (int)", "float32")),
    Bad("axis", 0, ValueError, ("saved", "(6, 5)", "(6, 6)")),
    Bad("axis", -1, ValueError, ("saved", "(6, 5)", "(6, 4)")),
    Bad("axis", 3, ValueError, ("axis", "3", "-3 to 2")),
    Bad("axis", -4, ValueError, ("axis", "-4", "-3 to 2")),
    Bad("axis", 2**70, ValueError, ("axis", "-3 to 2")),
    Bad("axis", 1.0, TypeError, ("axis", "1.0", "integer")),
    Bad("axis", True, TypeError, ("axis", "True", "integer")),
    Bad("axis", None, TypeError, ("axis", "None", "integer")),
    Bad("frozen", 1, TypeError, ("frozen", "1 (int)", "True or False")),
    Bad("frozen", "yes", TypeError, ("frozen", "'yes'", "True or False")),
    Bad("has_gamma", None, TypeError, ("has_gamma", "None", "True or False")),
    Bad("has_gamma", np.ones(2), TypeError, ("has_gamma", "float64", "True or False")),
    Bad("has_beta", 0, TypeError, ("has_beta", "0 (int)", "True or False")),
    Bad("from_y", 1, TypeError, ("from_y", "1 (int)", "True or False")),
    Bad("from_y", [], TypeError, ("from_y", "list", "True or False")),
    Bad("from_y", zeros(3, "f8"), TypeError, ("from_y", "float64", "True or False")),
    Bad("from_y", True, ValueError, ("in place", "'silu'", "leaky_relu")),
    Bad("options", Options("tanh"), ValueError, ("activation", "'tanh'", "'relu'")),
    Bad("options", Options(5), TypeError, ("activation", "5", "'relu'")),
    Bad("options", Options(["silu"]), TypeError, ("activation", "['silu']", "'relu'")),
    Bad("options", Options(("leaky_relu", None)), TypeError, ("activation", "number")),
    Bad("options", None, TypeError, ("options", "None", "Options")),
    Bad("options", "silu", TypeError, ("options", "'silu'", "Options")),
    Bad("options", ("silu", 0.0), TypeError, ("options", "tuple", "Options")),
    Bad("mask", np.ones((6, 5), bool), ValueError, ("mask", "(6, 5)", "(6, 4)")),
    Bad("mask", np.ones(SHAPE, bool), ValueError, ("mask", "(6, 5, 4)", "(6, 4)")),
    Bad("mask", np.ones((6, 4), np.uint8), TypeError, ("mask", "uint8", "bool")),
    Bad("mask", [[True]], TypeError, ("mask", "list", "bool")),
    Bad("mask", np.ones((6, 4), bool), TypeError, ("count", "None", "mask")),
    Bad("counted", 0, ValueError, ("count", "0", "2 to")),
    Bad("counted", 1, ValueError, ("count", "1", "2 to")),
    Bad("counted", -3, ValueError, ("count", "-3", "2 to")),
    Bad("counted", 2**70, ValueError, ("count", str(2**70), "2**63 - 1")),
    Bad("counted", 10**5000, ValueError, ("count", "too long to show", "2**63 - 1")),
    Bad("counted", np.nan, TypeError, ("count", "nan", "integer")),
    Bad("counted", 24.0, TypeError, ("count", "24.0", "integer")),
    Bad("counted", "24", TypeError, ("count", "'24'", "integer")),
    Bad("virtual", 0, ValueError, ("virtual_batch_size", "0")),
    Bad("virtual", -2, ValueError, ("virtual_batch_size", "-2")),
    Bad("virtual", 2.0, TypeError, ("virtual_batch_size", "2.0", "integer")),
    Bad("virtual", 2, ValueError, ("saved", "(6, 5)", "(6, 3, 5)")),
)
MANY = (  # of a cache of virtual batches: three of 2
    Bad("virtual", None, ValueError, ("saved", "(6, 3, 5)", "(6, 5)")),
    Bad("axis", 0, ValueError, ("virtual_batch_size", "2")),
    Bad("x", zeros((0, 5, 4)), ValueError, ("residual", "(6, 5, 4)", "(0, 5, 4)")),
    Bad("virtual", 1, ValueError, ("saved", "(6, 3, 5)", "(6, 6, 5)")),
    Bad("virtual", 10**30, ValueError, ("saved", "(6, 3, 5)", "(6, 1, 5)")),
    Bad("frozen", True, ValueError, ("virtual_batch_size", "2")),
    Bad("x", zeros((10, 5, 4)), ValueError, ("residual", "(6, 5, 4)", "(10, 5, 4)")),
    Bad("saved", zeros((6, 2, 5), "f8"), ValueError, ("saved", "(6, 2, 5)", "(6, 3, 5)")),
    Bad("saved", zeros((3, 6, 5), "f8"), ValueError, ("saved", "(3, 6, 5)", "(6, 3, 5)")),
)
CACHES = [(one, None) for one in ONE] + [(many, 2) for many in MANY]


def cache_of(size: int | None = None, **changed: Any) -> tuple[fastbn.Cache, Array]:
    """A good cache with some of its parts changed, and a dy for it."""
    c = cases.call(SHAPE)
    options: dict[str, Any] = {"residual": c.residual, "activation": "silu", "virtual_batch_size": size}
    cache = fastbn.forward(c.x, c.gamma, c.beta, **options).cache
    cache._parts = cache._parts._replace(**changed)
    return cache, c.dy


@pytest.mark.parametrize(("bad", "size"), CACHES, ids=str)
@pytest.mark.parametrize("verb", ["backward", "backward_sums"])
def test_a_cache_that_was_tampered_with(any_backend: cases.Kernel, verb: str, bad: Bad, size: int | None) -> None:
    """Also with a dy that fits its x, which the express lane would otherwise take."""
    cache, dy = cache_of(size, **{bad.field: bad.value})
    call = getattr(fastbn, verb)
    assert_refused(call, {"dy": dy, "cache": cache}, bad.error, "cache", *bad.words)
    if isinstance(bad.value, np.ndarray) and bad.field == "x" and bad.value.dtype == np.float32:
        assert_refused(call, {"dy": np.ones_like(bad.value), "cache": cache}, bad.error, "cache", *bad.words)


@pytest.mark.parametrize("bad", [one for one in ONE if one.field != "residual"], ids=str)
def test_a_plain_cache_that_was_tampered_with(any_backend: cases.Kernel, bad: Bad) -> None:
    """Without a residual, with a dy that fits: nothing but the cache is wrong."""
    x = np.ones_like(bad.value) if bad.field == "x" and isinstance(bad.value, np.ndarray) else zeros(SHAPE)
    cache = fastbn.Cache(Parts(zeros(SHAPE), None, np.ones((6, 5)), 1, False, Options("silu"), True, True))
    dy = np.array(x, np.float32)
    cache._parts = cache._parts._replace(**{bad.field: bad.value})
    error, words = (bad.error, bad.words) if bad.words[0] != "residual" else (ValueError, ("saved", "(6, 9)"))
    assert_refused(fastbn.backward, {"dy": dy, "cache": cache}, error, "cache", *words)


def test_no_virtual_batches(any_backend: cases.Kernel) -> None:
    x = zeros((0, 5))
    parts = Parts(x, None, np.ones((6, 0, 5)), 1, False, Options(), True, True, None, 7, virtual=2)
    arguments = {"dy": x, "cache": fastbn.Cache(parts)}
    assert_refused(fastbn.backward, arguments, ValueError, "cache", "virtual_batch_size", "2")


def test_one_value_and_none(any_backend: cases.Kernel) -> None:
    """Statistics of fewer than two values come from nowhere; with given moments, or frozen, they may."""
    for shape, found in (((1, 5), "1"), ((0, 5), "0"), ((4, 5, 0), "0")):
        parts = Parts(zeros(shape), None, np.ones((6, 5)), 1, False, Options(), True, True)
        for call in (fastbn.backward, fastbn.backward_sums):
            arguments = {"dy": zeros(shape), "cache": fastbn.Cache(parts)}
            assert_refused(call, arguments, ValueError, "cache", "count", found, "2 or more")
            call(zeros(shape), fastbn.Cache(parts._replace(counted=2)))
            call(zeros(shape), fastbn.Cache(parts._replace(frozen=True)))


@pytest.mark.parametrize("held", [None, 3, "parts", (), (1, 2), Ellipsis], ids=repr)
def test_a_cache_without_parts(any_backend: cases.Kernel, held: Any) -> None:
    cache, dy = cache_of()
    cache._parts = held
    empty = fastbn.Cache.__new__(fastbn.Cache)
    for call in (fastbn.backward, fastbn.backward_sums):
        assert_refused(call, {"dy": dy, "cache": cache}, TypeError, "cache", type(held).__name__, "forward")
        assert_refused(call, {"dy": dy, "cache": empty}, TypeError, "cache", "None", "forward")


def test_a_mask_that_was_changed(any_backend: cases.Kernel) -> None:
    """In a way that leaves a virtual batch nothing."""
    c = cases.call(SHAPE)
    mask = np.ones((6, 4), bool)
    mask[0, 0] = False
    cache = fastbn.forward(c.x, mask=mask, virtual_batch_size=2).cache
    mask[2:4] = False
    assert_refused(fastbn.backward, {"dy": c.dy, "cache": cache}, ValueError, "cache", "count", "0", "2 to")


@pytest.mark.parametrize("place", ["C", "F", "strided", ">f4"])
@pytest.mark.parametrize("virtual", [None, 2])
def test_good_caches_pass(any_backend: cases.Kernel, virtual: int | None, place: str) -> None:
    """Whatever the order of their arrays in memory, after a pickle too."""
    c = cases.call(SHAPE)
    x = {
        "C": c.x,
        "F": np.asfortranarray(c.x),
        "strided": np.repeat(c.x, 2, axis=2)[..., ::2],
        ">f4": c.x.astype(">f4"),
    }[place]
    mask = cases.random_mask(SHAPE) | (np.arange(4) < 1)
    for m in (None, mask):
        cache = fastbn.forward(x, c.gamma, residual=c.residual, mask=m, virtual_batch_size=virtual).cache
        wanted = tuple(fastbn.backward(c.dy, cache))
        for copied in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            got = fastbn.backward(c.dy, copied)
            for one, other in zip(got[:2], wanted[:2], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
            assert got.dbeta is None
            assert np.array_equal(copied.count, cache.count)
            cases.assert_same_bits((copied.mean, copied.var), (cache.mean, cache.var))


def test_copies_share_what_they_shared() -> None:
    """A shallow copy the arrays, a deep one nothing."""
    cache, _ = cache_of()
    assert copy.copy(cache)._parts.x is cache._parts.x
    assert not np.shares_memory(copy.deepcopy(cache)._parts.x, cache._parts.x)
    m = fastbn.moments(zeros(SHAPE))
    assert copy.copy(m)._rows is m._rows
    plan = plan_of()
    assert copy.copy(plan)._mean is plan._mean


# Moments and sums ----------------------------------------------------------------------------------------------------

SUMMED: dict[str, tuple[str, Any, type[Exception], tuple[str, ...]]] = {
    "fewer rows": ("_rows", np.zeros((1, 5)), ValueError, ("rows", "(1, 5)", "float64")),
    "more rows": ("_rows", np.zeros((4, 5)), ValueError, ("rows", "(4, 5)", "float64")),
    "one dimension": ("_rows", np.zeros(15), ValueError, ("rows", "(15,)")),
    "float32 rows": ("_rows", zeros((3, 5)), TypeError, ("rows", "float32", "float64")),
    "big-endian rows": ("_rows", zeros((3, 5), ">f8"), TypeError, ("rows", ">f8", "float64")),
    "integers": ("_rows", zeros((3, 5), int), TypeError, ("rows", "int64", "float64")),
    "a list": ("_rows", [[0.0] * 5] * 3, TypeError, ("rows", "list", "float64")),
    "no rows": ("_rows", None, TypeError, ("rows", "None", "float64")),
    "count -1": ("_count", -1, ValueError, ("count", "-1", "2**63 - 1")),
    "count 2**70": ("_count", 2**70, ValueError, ("count", str(2**70), "2**63 - 1")),
    "count 24.0": ("_count", 24.0, TypeError, ("count", "24.0", "integer")),
    "count nan": ("_count", np.nan, TypeError, ("count", "nan", "integer")),
    "count True": ("_count", True, TypeError, ("count", "True", "integer")),
    "no count": ("_count", None, TypeError, ("count", "None", "integer")),
    "dtype int": ("_dtype", np.dtype(int), TypeError, ("dtype", "int64", "float32")),
    "dtype float16": ("_dtype", np.dtype("f2"), TypeError, ("dtype", "float16", "float32")),
    "dtype text": ("_dtype", "float32", TypeError, ("dtype", "'float32'")),
}


def of_kind(kind: type[Any], **changed: Any) -> Any:
    c = cases.call(SHAPE)
    value: Any = fastbn.moments(c.x)
    if kind is fastbn.Sums:
        value = fastbn.backward_sums(c.dy, fastbn.forward(c.x).cache)
    for name, part in changed.items():
        setattr(value, name, part)
    return value


@pytest.mark.parametrize("kind", [fastbn.Moments, fastbn.Sums])
@pytest.mark.parametrize("bad", SUMMED)
def test_what_adds_up_was_tampered_with(any_backend: cases.Kernel, bad: str, kind: type[Any]) -> None:
    """It is refused by the calls that take it, by sums, and by pickles."""
    name, value, error, words = SUMMED[bad]
    if kind is fastbn.Sums and name == "_rows" and isinstance(value, np.ndarray) and value.shape == (3, 5):
        value = value[:2]
    good, tampered = of_kind(kind), of_kind(kind, **{name: value})
    c = cases.call(SHAPE)
    argument = kind.__name__.lower()
    if kind is fastbn.Moments:
        given = {"x": c.x, "running_mean": c.running_mean, "running_var": c.running_var}
        assert_refused(fastbn.forward, {**given, "moments": tampered}, error, argument, *words)
    else:
        given = {"dy": c.dy, "cache": fastbn.forward(c.x).cache, "out": np.zeros_like(c.x)}
        assert_refused(fastbn.backward, {**given, "sums": tampered}, error, argument, *words)
    for one, other in ((good, tampered), (tampered, good)):
        assert_refused(kind.__add__, {"self": one, "other": other}, error, argument, *words)
    if "dtype" not in bad and bad != "big-endian rows":  # which pickles put in order
        with pytest.raises(ValueError, match=f"{kind.__name__}.*format {FORMAT}"):
            pickle.loads(pickle.dumps(tampered))
    empty = {argument: kind.__new__(kind)}
    with pytest.raises(TypeError, match=f"{argument}: .*None"):
        fastbn.forward(c.x, **empty) if kind is fastbn.Moments else fastbn.backward(c.dy, given["cache"], **empty)


# Plans ---------------------------------------------------------------------------------------------------------------

PLANS: dict[str, tuple[str, Any, type[Exception], tuple[str, ...]]] = {
    "a mean of another length": ("_mean", zeros(3), ValueError, ("running_var", "(5,)", "(3,)")),
    "a longer mean": ("_mean", zeros(5000), ValueError, ("running_var", "(5,)", "(5000,)")),
    "a mean of another dtype": ("_mean", zeros(5, int), TypeError, ("running_mean", "int64")),
    "no mean": ("_mean", None, ValueError, ("running_mean", "None")),
    "a variance of another length": ("_var", zeros(4), ValueError, ("running_var", "(4,)", "(5,)")),
    "a variance of another dtype": ("_var", zeros(5, "f8"), TypeError, ("running_var", "float64", "float32")),
    "a list": ("_var", [1.0] * 5, TypeError, ("running_var", "list")),
    "gamma of another length": ("_gamma", zeros(4), ValueError, ("gamma", "(4,)", "(5,)")),
    "gamma of integers": ("_gamma", zeros(5, int), TypeError, ("gamma", "int64")),
    "beta of another shape": ("_beta", zeros((5, 1)), ValueError, ("beta", "(5, 1)", "(5,)")),
    "eps -1": ("_eps", -1.0, ValueError, ("eps", "-1.0")),
    "eps text": ("_eps", "0", TypeError, ("eps", "'0'")),
    "axis 7": ("_axis", 7, ValueError, ("axis", "7", "-3 to 2")),
    "axis 1.0": ("_axis", 1.0, TypeError, ("axis", "1.0", "integer")),
    "axis 2": ("_axis", 2, ValueError, ("x", "4 channels", "5 channels")),
    "activation tanh": ("_activation", "tanh", ValueError, ("activation", "'tanh'", "'relu'")),
}


def plan_of() -> fastbn.InferencePlan:
    c = cases.call(SHAPE)
    return fastbn.InferencePlan(c.gamma, c.beta, c.running_mean, c.running_var, activation="relu")


@pytest.mark.parametrize("bad", PLANS)
def test_a_plan_that_was_tampered_with(any_backend: cases.Kernel, bad: str) -> None:
    name, value, error, words = PLANS[bad]
    plan, x = plan_of(), cases.call(SHAPE).x
    setattr(plan, name, value)
    assert_refused(plan, {"x": x, "out": np.zeros_like(x)}, error, *words)
    if name != "_axis" or not isinstance(value, int):  # which fits an x of another shape
        with pytest.raises(ValueError, match=f"InferencePlan.*format {FORMAT}"):
            pickle.loads(pickle.dumps(plan))


def test_a_plan_that_was_used_before(any_backend: cases.Kernel) -> None:
    """What its backend prepared has the constants that it was made with."""
    plan, c = plan_of(), cases.call(SHAPE)
    wanted = plan(c.x, np.zeros_like(c.x))
    plan._var = zeros(5000)
    try:
        got = plan(c.x, np.zeros_like(c.x))
    except ValueError as error:
        assert "running_var" in str(error)
    else:
        cases.assert_same_bits(got, wanted)


# Pickles -------------------------------------------------------------------------------------------------------------


def objects() -> dict[str, Any]:
    return {
        "Cache": cache_of()[0],
        "Moments": of_kind(fastbn.Moments),
        "Sums": of_kind(fastbn.Sums),
        "InferencePlan": plan_of(),
        "BatchNorm": fastbn.BatchNorm(5),
    }


@pytest.mark.parametrize("name", list(objects()))
@pytest.mark.parametrize(
    "state",
    [
        (FORMAT + 1, ()),
        (0, ()),
        (-1, None),
        ("1", ()),
        (True, ()),
        {},
        {"format": 1},
        (None, {"_count": 1}),
        [1, ()],
        7,
    ],
    ids=repr,
)
def test_an_unknown_format(name: str, state: Any) -> None:
    """Such as a later release may write, or one before there were formats wrote."""
    value = objects()[name]
    with pytest.raises(ValueError, match=rf"^{name}: got a pickle .*; allowed: format {FORMAT}$"):
        value.__setstate__(state)


@pytest.mark.parametrize("name", list(objects()))
@pytest.mark.parametrize("contents", [None, (), (1, 2), {}, {"eps": 1}, [None] * 12, "x" * 7], ids=repr)
def test_contents_that_do_not_fit(name: str, contents: Any) -> None:
    value = objects()[name]
    with pytest.raises(ValueError, match=rf"^{name}: got a pickle whose contents do not fit .*format {FORMAT}"):
        value.__setstate__((FORMAT, contents))


IN_ORDER = [(bad, size) for bad, size in CACHES if not {"C-contiguous", "aligned", "byte order"} & set(bad.words)]
"""Without those that pickles put in order."""


@pytest.mark.parametrize(("bad", "size"), IN_ORDER, ids=str)
def test_a_pickle_of_a_bad_cache(bad: Bad, size: int | None) -> None:
    cache, _ = cache_of(size, **{bad.field: bad.value})
    for duplicate in (copy.copy, lambda value: pickle.loads(pickle.dumps(value))):
        with pytest.raises(ValueError, match=f"Cache: .*format {FORMAT}") as caught:
            duplicate(cache)
        assert all(word in str(caught.value) for word in bad.words)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", list(objects()))
def test_pickles_name_public_classes(name: str, protocol: int) -> None:
    """So that a later release finds them, wherever it keeps them: no module of fastbn but itself, and NumPy's."""
    pickled = pickle.dumps(objects()[name], protocol)
    assert b"fastbn._" not in pickled
    assert b"fastbn" in pickled
    again = pickle.loads(pickled)
    assert type(again) is getattr(fastbn, name)
    assert pickle.dumps(again, protocol) == pickle.dumps(pickle.loads(pickled), protocol)


@pytest.mark.parametrize("skew", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", list(objects()))
def test_pickles_in_buffers(name: str, skew: int) -> None:
    """Pickles whose arrays came apart from them (PEP 574), into memory that is read-only or at an odd address."""
    given = objects()[name]
    apart: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(given, 5, buffer_callback=apart.append)
    buffers = [memoryview(bytes(skew) + array.raw().tobytes())[skew:] for array in apart]
    again = pickle.loads(pickled, buffers=buffers)
    assert pickle.dumps(again) == pickle.dumps(pickle.loads(pickle.dumps(given)))
    if isinstance(again, fastbn.BatchNorm):
        again.train()(cases.call((4, 5, 3)).x)


def test_results_travel(any_backend: cases.Kernel) -> None:
    """Forward and Gradients, with all that is in them."""
    c = cases.call(SHAPE)
    result = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, activation="silu")
    wanted = fastbn.backward(c.dy, result.cache)
    duplicates: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
    for duplicate in duplicates:
        got = fastbn.backward(c.dy, duplicate(result).cache)
        for one in (got, duplicate(wanted)):
            cases.assert_same_bits((*one, one.dresidual), (*wanted, wanted.dresidual))


@pytest.mark.parametrize(
    "changed",
    [
        {"eps": -1.0},
        {"momentum": 7},
        {"weight": zeros(4)},
        {"running_mean": None},
        {"running_var": [1.0] * 5},
        {"num_batches_tracked": -1},
        {"num_features": 4},
        {"activation": "tanh"},
        {"dtype": "int32"},
    ],
    ids=str,
)
def test_a_pickle_of_a_bad_layer(changed: dict[str, Any]) -> None:
    bn = fastbn.BatchNorm(5)
    bn.__dict__.update(changed)
    with pytest.raises(ValueError, match=f"BatchNorm: .*format {FORMAT}") as caught:
        pickle.loads(pickle.dumps(bn))
    assert any(word in str(caught.value) for word in (*changed, "weight"))


def test_a_read_only_cache_is_enough(any_backend: cases.Kernel) -> None:
    """A pickle may map its arrays from a file that is not to be written to."""
    cache, dy = cache_of()
    wanted = fastbn.backward(dy, cache)
    cache._parts = cache._parts._replace(saved=read_only(cache._parts.saved.copy()), x=read_only(cache._parts.x.copy()))
    cases.assert_same_bits(tuple(fastbn.backward(dy, cache)), tuple(wanted))
