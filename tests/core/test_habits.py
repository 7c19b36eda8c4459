"""Do results keep every bit, whatever habits the machine has? And can habits be set and told?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import bits
import cases
import numpy as np
import pytest

import fastbn

bridge: Any = pytest.importorskip("fastbn._backends.c.bridge", reason="the C backend is not built")

NAMES = ("streams", "row_streams", "turn", "ahead", "stream_from", "block")
LARGEST = 2**63 - 1
EXTREME: dict[str, tuple[int, ...]] = {
    "all 0": (0,) * 6,
    "all 1": (1,) * 6,
    "all negative": (-1,) * 6,
    "least": (-LARGEST - 1,) * 6,
    "largest": (LARGEST,) * 6,
    "streamed": (8, 8, 128, -1, 1, 1),
    "streamed, one by one": (1, 1, 4096, 2048, 1, LARGEST),
    "never streamed": (2, 4, 1 << 20, 1, -1, 1 << 16),
}
VALUES = (-LARGEST - 1, -7, -1, 0, 1, 2, 3, 5, 8, 9, 100, 128, 500, 512, 4096, 70_000, 1 << 20, 1 << 40, LARGEST)


def random_habits(seed: int) -> tuple[int, ...]:
    rng = np.random.default_rng(seed)
    return tuple(VALUES[rng.integers(len(VALUES))] for _ in NAMES)


RANDOM = {f"random {seed}": random_habits(seed) for seed in range(4)}
EVERY = {**EXTREME, **RANDOM}


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Habits are as they were after each test."""
    before = bridge.habits()
    yield
    bridge.set_habits(before)


def use(values: tuple[int, ...]) -> None:
    bridge.set_habits(dict(zip(NAMES, values, strict=True)))


# Bits ----------------------------------------------------------------------------------------------------------------

# Every way that calls are cut, with work for several threads: planes, cut planes, small planes, and rows of few, odd
# and many channels; planes and rows whose bytes are, and are not, whole cache lines.
SHAPES = (
    ((6, 5, 60, 60), 1),
    ((17, 3, 64, 64), 1),
    ((9, 16, 28, 28), 1),
    ((2, 2, 300, 301), 1),
    ((1, 2, 140_000), 1),
    ((3, 500, 14, 14), 1),
    ((11, 96, 14, 14), 1),
    ((8, 300, 7, 7), 1),
    ((33, 44, 7, 7), 1),
    ((20, 160, 4, 8), 1),
    ((40, 40, 50), 1),
    ((70_001, 1), -1),
    ((25_003, 3), -1),
    ((4_001, 20), -1),
    ((5, 21, 11, 64), -1),
    ((2_048, 64), -1),
    ((503, 257), -1),
    ((100, 1000), -1),
)


@cache
def call(shape: tuple[int, ...], axis: int, dtype: str) -> cases.Call:
    return cases.call(shape, dtype, axis=axis)


@cache
def mask_of(shape: tuple[int, ...], axis: int) -> cases.Array:
    return cases.random_mask(shape, axis)


def results(c: cases.Call, axis: int, activation: Any, masked: bool) -> tuple[Any, ...]:
    """All that the calls of every verb return or update."""
    mean, var = c.running_mean.copy(), c.running_var.copy()
    mask = mask_of(c.x.shape, axis) if masked else None
    residual = c.residual if activation else None
    same: dict[str, Any] = {"axis": axis, "activation": activation, "residual": residual}
    moments, masked_moments = (fastbn.moments(c.x, axis=axis, mask=counted) for counted in (None, mask))
    given = (c.gamma, c.beta, c.running_mean, c.running_var)
    plan = fastbn.InferencePlan(*given, axis=axis, activation=activation)
    found = [masked_moments.mean, masked_moments.mean_low, masked_moments.m2]
    found += [fastbn.infer(c.x, *given, **same), plan(c.x, residual=residual)]
    ways: tuple[dict[str, Any], ...] = ({"training": False}, {"moments": moments}, {"mask": mask})
    for way in ways:
        y, made = fastbn.forward(c.x, c.gamma, c.beta, mean, var, **same, **way)
        sums = fastbn.backward_sums(c.dy, made)
        gradients = fastbn.backward(c.dy, made)
        found += [y, mean.copy(), var.copy(), sums.sum_dy, sums.sum_dy_xhat, *gradients, gradients.dresidual]
    return (*found, *fastbn.backward(c.dy, made, sums=sums))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(40, 5, 49), (40, 3, 700), (9, 2, 70_000)], ids=str)
def test_bits_under_a_mask_of_examples(shape: tuple[int, ...], dtype: str) -> None:
    """Planes that it treats alike are added and mapped together, in streams if these are best."""
    c = call(shape, 1, dtype)
    mask = np.random.default_rng(3).random((shape[0], 1)) < 0.8
    found: dict[str, list[Any]] = {}
    with fastbn.use_backend("c"):
        for name, habits in EXTREME.items():
            use(habits)
            for threads in (1, 2):
                with fastbn.use_num_threads(threads):
                    y, made = fastbn.forward(c.x, c.gamma, c.beta, mask=mask)
                    moments = fastbn.moments(c.x, mask=mask)
                    found[f"{name}, {threads}"] = [y, *fastbn.backward(c.dy, made), moments.mean, moments.m2]
    first, *others = found
    for other in others:
        for result, expected in zip(found[other], found[first], strict=True):
            cases.assert_same_bits(result, expected, other)


@pytest.mark.parametrize(("activation", "masked"), [(None, False), ("relu", False), ("relu", True), ("silu", False)])
def test_bits_of_planes_in_the_order_of_memory(activation: str | None, masked: bool) -> None:
    """A channel is far larger than a core's cache, so one thread passes through from end to end if one stream is best.

    Two threads take blocks of channels, and so does one where several streams are best.
    """
    inner, images = 600, max(1, 5 * (bridge.caches()[1] or 1 << 20) // (600 * 4))
    c = call((images, 3, inner), 1, "float32")
    with fastbn.use_backend("c"):
        found = []
        for threads, streams in ((1, 1), (2, 1), (1, 8)):
            use((streams, streams, 0, 0, 0, 0))
            with fastbn.use_num_threads(threads):
                found.append([np.asarray(array).tobytes() for array in results(c, 1, activation, masked)])
    assert found[0] == found[1]
    assert found[0] == found[2]


@pytest.mark.parametrize("dtype", [*cases.DTYPES, *cases.HALVES])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_bits_of_large_calls(shape: tuple[int, ...], axis: int, dtype: str) -> None:
    """One thread and the usual habits give what several threads give with any habits.

    Without a mask all are tried (of the random ones half), and with one a third, in turns from shape to shape.
    """
    c, turn = call(shape, axis, dtype), SHAPES.index((shape, axis))
    tried = EVERY if dtype == "float32" else {name: EVERY[name] for name in ("streamed", "largest", "random 2")}
    with fastbn.use_backend("c"):
        for masked, activation in enumerate((None, "silu")):
            with fastbn.use_num_threads(1):
                use(EXTREME["all 0"])
                wanted = results(c, axis, activation, bool(masked))
            for number, (name, values) in enumerate(tried.items()):
                if (masked and (number + turn) % 3) or (name in RANDOM and (number + turn) % 2):
                    continue
                use(values)
                with fastbn.use_num_threads(1 + number % 3):
                    cases.assert_same_bits(results(c, axis, activation, bool(masked)), wanted, f"with habits {name}")


@pytest.mark.parametrize("dtype", [*cases.DTYPES, "float16"])
@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, ((40, 130, 24, 24), 1), ((9, 37, 23, 41), 1)], ids=str)
def test_bits_wherever_dz_is_kept(shape: tuple[int, ...], axis: int, dtype: str) -> None:
    """In dx, in a block of each thread's, or not at all: which one depends on the habits, the activation and dx."""
    c = call(shape, axis, dtype)

    def gradients(activation: str, out: cases.Array | None) -> tuple[Any, ...]:
        _, made = fastbn.forward(c.x, c.gamma, c.beta, axis=axis, activation=activation, backend="c")
        return tuple(fastbn.backward(c.dy if out is None else out, made, out=out, backend="c"))

    for activation in ("silu", "sigmoid", "relu"):
        use(EXTREME["never streamed"])
        with fastbn.use_num_threads(1):
            wanted = gradients(activation, None)
        for threads, name in enumerate(("streamed", "streamed, one by one", "random 1"), 1):
            use(EVERY[name])
            with fastbn.use_num_threads(threads):
                cases.assert_same_bits(gradients(activation, None), wanted, f"{activation}, {name}")
                cases.assert_same_bits(gradients(activation, c.dy.copy()), wanted, f"{activation}, {name}, over dy")


@pytest.mark.parametrize("shape", [(64, 3), (9, 3, 49), (2, 3, 700)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_gradient_where_gamma_is_beyond_float32(shape: tuple[int, ...], activation: str) -> None:
    """The power of two that suits dx leaves nothing of x in z, which is computed again where dz was not kept."""
    c = cases.call(shape)
    gamma, mean, var = np.full(3, -1e75), np.full(3, -44.32953916653982), np.full(3, 1e76)
    y, made = fastbn.forward(c.x, gamma, None, mean, var, training=False, eps=0, activation=activation, backend="c")
    assert (y <= 0).all()  # since x > mean
    wanted = -1e37 * c.dy.astype(np.float64) * (0.01 if activation == "leaky_relu" else 0)
    for name in ("never streamed", "streamed"):
        use(EXTREME[name])
        sums = fastbn.backward_sums(c.dy, made, backend="c")
        for given in (None, sums):
            dx = fastbn.backward(c.dy, made, sums=given, backend="c").dx
            np.testing.assert_allclose(dx, wanted, rtol=1e-6, err_msg=f"{name}, given {given}")


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradient_of_0_where_gamma_and_the_spread_are_large(activation: str | None) -> None:
    """The prescaled x - mean is infinite here, and its factor 0."""
    x = np.tile(np.array([[1e38], [-1e38]], np.float32), (16, 2))
    _, made = fastbn.forward(x, np.full(2, 1e80), None, activation=activation, backend="c")
    for name in ("never streamed", "streamed"):
        use(EXTREME[name])
        assert (fastbn.backward(np.zeros_like(x), made, backend="c").dx == 0).all()


@pytest.mark.parametrize("dtype", [*cases.DTYPES, *cases.HALVES])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 13, 7, 7), 1),
        ((11, 9, 3, 3), 1),
        ((3, 130, 3, 3), 1),
        ((2, 3, 600), 1),
        ((37, 21), -1),
        ((41, 5), -1),
        ((9, 1030), -1),
    ],
    ids=str,
)
def test_results_that_begin_anywhere_in_a_cache_line(shape: tuple[int, ...], axis: int, dtype: str) -> None:
    """Their lines are written around the cache as far as they are theirs, and what lies beside them stays."""
    c = call(shape, axis, dtype)
    given = (c.gamma, c.beta, c.running_mean, c.running_var)

    def results(out: Any) -> Iterator[Any]:
        yield fastbn.infer(c.x, *given, axis=axis, activation="relu", out=out)
        for options in ({}, {"activation": "relu", "residual": c.residual, "mask": mask_of(shape, axis)}):
            y, made = fastbn.forward(c.x, c.gamma, c.beta, axis=axis, out=out, **options)
            yield y
            gradients = fastbn.backward(c.dy, made, out=out)
            yield gradients.dx
            if options:
                yield gradients.dresidual
        in_place = np.empty_like(c.x) if out is None else out
        in_place[...] = c.x
        yield fastbn.infer(in_place, *given, axis=axis, out=in_place)

    with fastbn.use_backend("c"), fastbn.use_num_threads(1):
        use(EXTREME["never streamed"])
        wanted = [result.copy() for result in results(None)]
        for name in ("streamed", "streamed, one by one"):
            use(EXTREME[name])
            for start in range(64 // c.x.itemsize):
                room = np.full(c.x.size + 128, 7, c.x.dtype)
                out = room[start : start + c.x.size].reshape(shape)
                for result, expected in zip(results(out), wanted, strict=True):
                    cases.assert_same_bits(result, expected, f"{name}, from element {start} on")
                    assert (room[:start] == 7).all()
                    assert (room[start + c.x.size :] == 7).all()


def test_bits_of_calls_of_all_kinds() -> None:
    """Those of bits.py: dtypes, activations, residuals, masks, ways and extreme values, all streamed, in 8 streams.

    With the usual habits, test_bits.py holds them against the record, which the baseline has none of.
    """
    if bridge.isa() == "baseline":
        with fastbn.use_num_threads(1):
            wanted = bits.found()
    else:
        wanted = bits.recorded()
    use(EVERY["streamed"])
    with fastbn.use_num_threads(2):
        found = bits.found()
    assert len(found) > 500
    assert [case for case, value in found.items() if wanted[case] != value] == []


def test_habits_that_change_while_calls_run() -> None:
    """A call keeps those with which it started, for which its workspace was made."""
    c = call((8, 300, 7, 7), 1, "float32")
    wanted, wrong, done = fastbn.forward(c.x, backend="c").y.tobytes(), [], threading.Event()

    def run() -> None:
        while not done.is_set():
            if fastbn.forward(c.x, backend="c").y.tobytes() != wanted:
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(300):
        use(tuple(EVERY.values())[number % len(EVERY)])
        fastbn.moments(c.x[:1], backend="c")
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


# Setting them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_habits_are_what_was_set(name: str) -> None:
    use(EVERY[name])
    assert bridge.habits() == dict(zip(NAMES, EVERY[name], strict=True))
    assert bridge.usual_habits().keys() == bridge.habits().keys()


@pytest.mark.parametrize("isa", cases.isas())
def test_instruction_sets_keep_the_habits(isa: str) -> None:
    use(EXTREME["streamed"])
    with cases.running_on(cases.Kernel("c", isa)):
        assert bridge.isa() == isa
        assert tuple(bridge.habits().values()) == EXTREME["streamed"]
    assert tuple(bridge.habits().values()) == EXTREME["streamed"]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, ("{}", "streams", "block")),
        (None, ValueError, ("None", "streams")),
        (dict.fromkeys((*NAMES, "size"), 1), ValueError, ("size", "streams")),
        ({**dict.fromkeys(NAMES, 1), "turn": 1.0}, TypeError, ("turn=1.0", "integers")),
        ({**dict.fromkeys(NAMES, 1), "turn": True}, TypeError, ("turn=True", "integers")),
        ({**dict.fromkeys(NAMES, 1), "block": 1 << 63}, ValueError, ("block=", "64 bits")),
    ],
    ids=str,
)
def test_what_is_not_habits_changes_nothing(given: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    before = bridge.habits()
    with pytest.raises(error, match=r"^habits: got") as raised:
        bridge.set_habits(given)
    assert all(word in str(raised.value) for word in words)
    assert bridge.habits() == before
