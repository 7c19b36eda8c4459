"""Does any call that the contract allows give what the oracle gives, on every backend and instruction set?"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cases
import numpy as np
import oracle
import pytest

import fastbn

pytest.importorskip("hypothesis")
from hypothesis import event, given
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
FLOATS = (*cases.DTYPES, *cases.HALVES)

# What is drawn -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A way for an array to lie in memory: its axes from slow to fast, and a step and a margin for each of them.

    A step of 0 repeats the first values along its axis.
    """

    order: Shape
    steps: Shape
    margins: Shape
    unaligned: bool
    swapped: bool

    def __call__(self, a: Array) -> Array:
        dtype = a.dtype.newbyteorder() if self.swapped else a.dtype
        turned = a.transpose(self.order)
        sizes = [abs(step) * n if step else 1 for step, n in zip(self.steps, turned.shape, strict=True)]
        around = [size + 2 * margin for size, margin in zip(sizes, self.margins, strict=True)]
        raw = np.full(math.prod(around) * a.itemsize + 1, 0xFF, np.uint8)  # which are NaN, around what is placed
        buffer = raw[self.unaligned : raw.size - 1 + self.unaligned].view(dtype).reshape(around)
        inner = buffer[tuple(slice(m, m + size) for m, size in zip(self.margins, sizes, strict=True))]
        view = inner[tuple(slice(None, None, step or 1) for step in self.steps)]
        view[...] = turned[tuple(slice(None if step else 1) for step in self.steps)]
        if 0 in self.steps:
            view = np.broadcast_to(view, turned.shape)
        return view.transpose(np.argsort(self.order))


@st.composite
def places(draw: st.DrawFn, ndim: int, dtype: str, *, read: bool) -> Place | None:
    """Half of the arrays lie as NumPy makes them; those that are only read may repeat values and be byte-swapped."""
    if draw(st.booleans()):
        return None
    steps = st.sampled_from((1, 1, 1, 2, -1, -3, 0) if read else (1, 1, 1, 2, -1, -3))
    swapped = read and dtype != "bfloat16" and draw(st.integers(0, 4)) == 4
    return Place(
        tuple(draw(st.permutations(range(ndim)))),
        tuple(draw(st.lists(steps, min_size=ndim, max_size=ndim))),
        tuple(draw(st.lists(st.sampled_from((0, 0, 1, 3)), min_size=ndim, max_size=ndim))),
        draw(st.integers(0, 4)) == 4,
        swapped,
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Shape, int]:
    """A shape and its channel axis: small in any number of dimensions, or ragged, or with long channels."""
    family = draw(st.sampled_from(("small", "small", "rows", "planes", "long")))
    if family == "small":
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=5)))
    elif family == "rows":
        shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 70)))
    elif family == "planes":
        shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 70)))
    else:
        shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(200, 1500)))
    return shape, draw(st.integers(-len(shape), len(shape) - 1) if family == "small" else st.sampled_from((0, 1, -1)))


activations = st.one_of(
    st.sampled_from(cases.ACTIVATIONS), st.tuples(st.just("leaky_relu"), st.sampled_from((-0.5, 0.0, 0.1, 1.0, 1.75)))
)
parameter_dtypes = st.sampled_from((None, "float32", "float32", "float64", *cases.HALVES))


class Problem(NamedTuple):
    """All that makes up a call."""

    kernel: cases.Kernel
    threads: int
    dtype: str
    shape: Shape
    axis: int
    training: bool
    masked: Shape | None
    activation: Any
    residual: bool
    gamma: str | None
    beta: str | None
    offset: float
    spread: float
    constant: bool
    eps: float
    momentum: float
    seed: int

    def call(self) -> cases.Call:
        """Its arrays, as NumPy lays them out."""
        c = cases.call(self.shape, self.dtype, self.axis, self.offset, self.seed, self.spread)
        if self.constant:
            np.moveaxis(c.x, self.axis, 0)[-1] = c.x.flat[0]
        parameters = {
            name: None if dtype is None else getattr(c, name).astype(dtype)
            for name, dtype in (("gamma", self.gamma), ("beta", self.beta))
        }
        return c._replace(running_mean=c.running_mean + c.running_mean.dtype.type(self.offset), **parameters)

    def mask(self) -> Array | None:
        """Of x's positions, or of a shape that broadcasts to them."""
        if self.masked is None:
            return None
        mask = np.random.default_rng(self.seed).random(self.masked) < 0.6
        if np.broadcast_to(mask, tuple(np.delete(self.shape, self.axis))).sum() < 2:
            mask[...] = True
        return mask

    @property
    def channel(self) -> int:
        """The channel axis, counted from 0."""
        return self.axis % len(self.shape)

    @property
    def options(self) -> dict[str, Any]:
        return {"axis": self.axis, "activation": self.activation, "eps": self.eps}


@st.composite
def problems(draw: st.DrawFn, *, training: bool | None = None, activation: Any = activations) -> Problem:
    """Any call; halves stay where their few digits and float16's small range can tell something."""
    shape, axis = draw(shapes())
    dtype = draw(st.sampled_from(FLOATS))
    positions = tuple(np.delete(shape, axis).tolist())
    enough = math.prod(positions) >= 2
    masked = None
    if enough and draw(st.booleans()):
        masked = tuple(draw(st.sampled_from((n, n, n, 1))) for n in positions)[
            draw(st.integers(0, len(positions))) // 3 :
        ]
    half = dtype in cases.HALVES
    return Problem(
        kernel=draw(st.sampled_from(cases.KERNELS)),
        threads=draw(st.integers(1, 3)),
        dtype=dtype,
        shape=shape,
        axis=axis,
        training=enough and (draw(st.booleans()) or bool(training)),
        masked=masked,
        activation=draw(activation),
        residual=draw(st.booleans()),
        gamma=draw(parameter_dtypes),
        beta=draw(parameter_dtypes),
        offset=draw(st.sampled_from((0, 0.5, -100) if half else (0, 0.5, -100, 1e4, -1e6))),
        spread=draw(st.sampled_from((1, 0.01, 100) if half else (1, 1e-6, 1e8))),
        constant=draw(st.integers(0, 9)) == 9,
        eps=draw(st.sampled_from((1e-5, 1e-5, 0.0, 1e-3, 1.0))),
        momentum=draw(st.sampled_from((0.1, 0.0, 0.5, 1.0))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


# What must hold ------------------------------------------------------------------------------------------------------


@given(problems(), st.data())
def test_forward_and_backward(p: Problem, data: st.DataObject) -> None:
    """y, dx, dgamma, dbeta, dresidual and the running statistics, wherever the arrays lie."""
    c = p.call()
    ndim = len(p.shape)
    lie = {
        name: data.draw(places(ndim, p.dtype, read=name != "out"), label=name)
        for name in ("x", "dy", "residual", "out")
    }
    placed = {name: lie[name](getattr(c, name)) for name in ("x", "dy", "residual") if lie[name] is not None}
    mask = p.mask()
    if mask is not None and (place := data.draw(places(mask.ndim, "bool", read=False), label="mask")):
        mask = place(mask)
    event(f"{p.kernel}, {p.dtype}")
    with cases.running_on(p.kernel), fastbn.use_num_threads(p.threads):
        cases.check(
            c._replace(**placed), training=p.training, mask=mask, residual=p.residual, momentum=p.momentum,
            out=lie["out"], **p.options,
        )  # fmt: skip


@given(problems(training=True), st.data())
def test_shards_give_what_the_whole_gives(p: Problem, data: st.DataObject) -> None:
    """Moments before forward, sums before backward, each added up over any parts of a batch."""
    c = p.call()
    if not p.training:
        return
    positions = tuple(np.delete(p.shape, p.channel))
    along = data.draw(st.integers(0, len(positions) - 1), label="axis of positions to cut")
    cuts = (
        sorted(data.draw(st.sets(st.integers(1, positions[along] - 1), max_size=4), label="cuts"))
        if positions[along] > 1
        else []
    )
    cut = along + (along >= p.channel)
    mask = p.mask()
    exact = oracle.forward(c.x, c.gamma, c.beta, mask=mask, residual=c.residual if p.residual else None, **p.options)
    wanted = oracle.backward(c.dy, exact, c.gamma, axis=p.axis, mask=mask, activation=p.activation)
    xs, dys, residuals = (np.split(array, cuts, cut) for array in (c.x, c.dy, c.residual))
    shards = len(xs)
    masks: list[Any] = [None] * shards
    if mask is not None:
        masks = np.split(np.broadcast_to(mask, positions), cuts, along)
    with cases.running_on(p.kernel), fastbn.use_num_threads(p.threads):
        moments = [fastbn.moments(x, axis=p.axis, mask=m) for x, m in zip(xs, masks, strict=True)]
        total = (
            sum(moments[1:], moments[0]) if data.draw(st.booleans(), label="first first") else sum(reversed(moments))
        )
        assert total.count == sum(part.count for part in moments) == exact.count
        ys, caches = zip(
            *(
                fastbn.forward(
                    x, c.gamma, c.beta, mask=m, moments=total, residual=r if p.residual else None, **p.options
                )
                for x, m, r in zip(xs, masks, residuals, strict=True)
            ),
            strict=True,
        )
        sums = sum(fastbn.backward_sums(dy, cache) for dy, cache in zip(dys, caches, strict=True))
        assert sums.count == exact.count
        gradients = [fastbn.backward(dy, cache, sums=sums) for dy, cache in zip(dys, caches, strict=True)]
    cases.assert_moments(total, exact, c.x)
    cases.assert_y(np.concatenate(ys, cut), exact, c.gamma, axis=p.axis, activation=p.activation)
    first = gradients[0]
    for got in gradients:
        cases.assert_same_bits((got.dgamma, got.dbeta), (first.dgamma, first.dbeta))
    dresidual = np.concatenate([got.dresidual for got in gradients], cut) if p.residual else None
    dx = np.concatenate([got.dx for got in gradients], cut)
    cases.assert_gradients(fastbn.Gradients(dx, first.dgamma, first.dbeta, dresidual), wanted)
    cases.assert_sum("sum_dy", sums.sum_dy, wanted.exact.dbeta, wanted.terms.dbeta, wanted.slack.dbeta)
    cases.assert_sum("sum_dy_xhat", sums.sum_dy_xhat, wanted.exact.dgamma, wanted.terms.dgamma, wanted.slack.dgamma)


@given(problems(activation=st.sampled_from((None, "leaky_relu", ("leaky_relu", 0.5), ("leaky_relu", 2.0)))), st.data())
def test_in_place(p: Problem, data: st.DataObject) -> None:
    """Y takes x's place, and backward finds its way back from y."""
    c = p.call()
    if c.gamma is not None:
        c = c._replace(gamma=c.gamma + np.where(c.gamma < 0, -0.5, 0.5).astype(c.gamma.dtype))
    place = data.draw(places(len(p.shape), p.dtype, read=False), label="x")
    x = c.x.copy() if place is None else place(c.x)
    mask, residual = p.mask(), c.residual if p.residual else None
    statistics = (None, None) if p.training else (c.running_mean, c.running_var)
    exact = oracle.forward(c.x, c.gamma, c.beta, *statistics, mask=mask, residual=residual, **p.options)
    with cases.running_on(p.kernel), fastbn.use_num_threads(p.threads):
        arguments = {"training": p.training, "mask": mask, "residual": residual, **p.options}
        y, cache = fastbn.forward(x, c.gamma, c.beta, *statistics, out=x, **arguments)
        got = fastbn.backward(c.dy, cache)
    assert y is x
    curve = {"axis": p.axis, "activation": p.activation}
    cases.assert_y(y, exact, c.gamma, **curve)
    off = oracle.found_again(exact, c.gamma, dtype=p.dtype, **curve)
    wanted = oracle.backward(c.dy, exact, c.gamma, mask=mask, frozen=not p.training, off=off, **curve)
    cases.assert_gradients(got, wanted)
