"""Are results the same, bit for bit, for any number of threads, on every call and in any process?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import fastbn
from fastbn.call.activations import Activation
from fastbn.config import environment

# Enough work for eight threads (32768 values each), or nearly; split in every way that the blocking has.
SHAPES = (
    (2, 3, 300, 301),
    (1, 1, 600_001),
    (1, 2, 150_000),
    (3, 2, 70_001),
    (4096, 100),
    (20_001, 16),
    (300_001, 1),
    (100_003, 3),
    (600, 1000),
    (3000, 257),
    (2, 150_001),
    (2, 100_000, 3),
    (3, 2000, 7, 7),
    (16, 131, 14, 14),
    (40, 50, 9),
)


@cache
def call(shape: tuple[int, ...], dtype: str) -> cases.Call:
    return cases.call(shape, dtype)


def results(c: cases.Call) -> tuple[Any, ...]:
    """Everything that forward, backward and infer return or update."""
    mean, var = c.running_mean.copy(), c.running_var.copy()
    y, made = fastbn.forward(c.x, c.gamma, c.beta, mean, var, activation="relu", residual=c.residual)
    gradients = fastbn.backward(c.dy, made)
    _, frozen = fastbn.forward(c.x, c.gamma, c.beta, mean, var, training=False)
    inferred = fastbn.infer(c.x, c.gamma, c.beta, mean, var, residual=c.residual)
    return (y, mean, var, *gradients, gradients.dresidual, *fastbn.backward(c.dy, frozen), inferred)


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads(kernel: cases.Kernel, dtype: str, shape: tuple[int, ...]) -> None:
    c = call(shape, dtype)
    with fastbn.use_num_threads(1):
        wanted = results(c)
    for threads in (3, 8):
        with fastbn.use_num_threads(threads):
            cases.assert_same_bits(results(c), wanted, f"for {threads} threads")


C_KERNELS = tuple(kernel for kernel in cases.KERNELS if kernel.backend == "c")


@pytest.mark.parametrize("kernel", C_KERNELS, ids=str, indirect=True)
def test_one_channel_in_any_shape(kernel: cases.Kernel, dtype: str) -> None:
    """A single channel is one plane to the C core, whatever rows or planes it is given in."""
    import c_calls  # needs the C backend

    rng = np.random.default_rng(1)
    x, dy = (rng.normal(2, 3, 70_070).astype(dtype) for _ in range(2))
    one, behind = np.full(1, 1.25, dtype), c_calls.Behind(Activation.SILU)

    def found(shape: tuple[int, int, int]) -> tuple[Any, ...]:
        made = c_calls.forward(x.reshape(shape), one, one, behind)
        back = c_calls.backward(dy.reshape(shape), x.reshape(shape), made.saved, behind)
        return (made.y.ravel(), made.saved, made.running_var, back.dx.ravel(), back.dgamma, back.dbeta)

    wanted = found((1, 1, 70_070))
    for shape in ((70_070, 1, 1), (10_010, 1, 7), (70, 1, 1001), (2, 1, 35_035)):
        cases.assert_same_bits(found(shape), wanted, f"as {shape}")


def test_every_call(kernel: cases.Kernel, dtype: str) -> None:
    """Also where earlier calls have left other values in memory."""
    c = call((40, 50, 9), dtype)
    wanted = results(c)
    for shape in ((600, 100), (13, 37), (40, 50, 9)):
        results(cases.call(shape, dtype, seed=1))
        cases.assert_same_bits(results(c), wanted, f"after {shape}")


def test_wherever_the_arrays_lie(kernel: cases.Kernel, dtype: str) -> None:
    """Neither an array's address nor a stranger's data beside it matters."""
    for shape in ((13, 37), (3, 5, 67), (5000, 19), (2, 3, 70_001)):
        c = call(shape, dtype)
        odd = cases.PLACEMENTS["odd address"]
        moved = cases.Call(*(odd(array) for array in c))
        cases.assert_same_bits(results(moved), results(c), f"for {shape}")


def fused_kernels() -> list[cases.Kernel]:
    """Those whose instruction set has fused multiply-add, if there are several to compare."""
    found = [kernel for kernel in cases.KERNELS if kernel.isa not in (None, "baseline")]
    if len(found) < 2:
        pytest.skip(f"this processor has {', '.join(map(str, found)) or 'none'} of them")
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_instruction_sets_with_fused_multiply_add_agree(dtype: str, shape: tuple[int, ...]) -> None:
    found = []
    for kernel in fused_kernels():
        with cases.running_on(kernel):
            found.append(results(call(shape, dtype)))
    for other in found[1:]:
        cases.assert_same_bits(other, found[0])


# Planes and rows that are longer than what is widened at a time, small planes, joined ones, and few images.
ROUNDED = (
    ((3, 2500), 1),
    ((2, 3, 4200), 1),
    ((3, 130, 9, 9), 1),
    ((11, 60, 3, 3), 1),
    ((9, 7, 5, 29), -1),
    ((4, 5, 20, 20), 1),
)


@pytest.mark.parametrize("kernel", C_KERNELS, ids=str, indirect=True)
@pytest.mark.parametrize("dtype", cases.HALVES)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), ROUNDED, ids=str)
def test_16_bit_results_are_those_of_float32(
    kernel: cases.Kernel, dtype: str, shape: tuple[int, ...], axis: int, activation: Any
) -> None:
    """Rounded: what is computed with values of 16 bits does not depend on how they are stored."""
    given = cases.call(shape, dtype, axis)
    mask = cases.random_mask(shape, axis)

    def found(*data: cases.Array) -> Iterator[cases.Array]:
        x, dy, residual = data
        known = (given.gamma, given.beta, given.running_mean, given.running_var)
        fused: dict[str, Any] = {"axis": axis, "activation": activation}
        yield fastbn.infer(x, *known, **fused)
        for more in ({}, {"residual": residual}, {"residual": residual, "mask": mask}):
            y, made = fastbn.forward(x, given.gamma, given.beta, **fused, **more)
            yield y
            yield from fastbn.backward(dy, made)
        y, made = fastbn.forward(x, *known, **fused, residual=residual, training=False)
        gradients = fastbn.backward(dy, made, out=dy.copy())
        yield from (y, *gradients, gradients.dresidual)

    data = (given.x, given.dy, given.residual)
    narrow, wide = found(*data), found(*(a.astype(np.float32) for a in data))
    for number, (result, exact) in enumerate(zip(narrow, wide, strict=True)):
        cases.assert_same_bits(result, exact.astype(result.dtype), f"result {number}")


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(8, 21, 31), (3, 40, 7, 7), (5, 3, 5), (2, 5, 600)], ids=str)
def test_planes_are_mapped_as_rows_are(
    kernel: cases.Kernel, dtype: str, shape: tuple[int, ...], activation: Any
) -> None:
    """Also where a constant is 0 for all channels, which loops of columns do not read."""
    c = cases.call(shape, dtype)
    rows = np.ascontiguousarray(np.moveaxis(c.x, 1, -1))
    zero = np.zeros_like(c.beta)
    for beta, mean in ((c.beta, c.running_mean), (zero, zero)):
        known = (c.gamma, beta, mean, c.running_var)
        wanted = np.moveaxis(fastbn.infer(rows, *known, axis=-1, activation=activation), -1, 1)
        found = fastbn.infer(c.x, *known, activation=activation)
        cases.assert_same_bits(found, np.ascontiguousarray(wanted), f"mean {mean[0]}")


# The rest of the operation: every dtype, smooth activations, masks, in place, moments and sums.
FEWER = ((4096, 100), (2, 3, 70_001), (16, 131, 14, 14), (3, 2000, 7, 7), (13, 37))


def other_results(c: cases.Call) -> tuple[Any, ...]:
    """What the calls that `results` does not make return."""
    mask = cases.random_mask(c.x.shape)
    found: list[Any] = []
    for activation in ("silu", "hardswish"):
        y, cache = fastbn.forward(c.x, c.gamma, c.beta, mask=mask, activation=activation, residual=c.residual)
        gradients = fastbn.backward(c.dy, cache)
        found += [y, *gradients, gradients.dresidual]
    moments = fastbn.moments(c.x, mask=mask) + fastbn.moments(c.dy)
    y, cache = fastbn.forward(c.x, c.gamma, c.beta, mask=mask, moments=moments, activation="sigmoid")
    sums = fastbn.backward_sums(c.dy, cache)
    found += [moments.mean, moments.m2, y, sums.sum_dy, sums.sum_dy_xhat]
    found += fastbn.backward(c.dy, cache, sums=sums + sums)
    x = c.x.copy()
    _, cache = fastbn.forward(x, None, c.beta, activation="leaky_relu", out=x)
    return (*found, x, *fastbn.backward(c.dy, cache))


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("kind", [*cases.DTYPES, *cases.HALVES])
@pytest.mark.parametrize("shape", FEWER, ids=str)
def test_any_number_of_threads_for_the_rest(kernel: cases.Kernel, kind: str, shape: tuple[int, ...]) -> None:
    c = call(shape, kind)
    with fastbn.use_num_threads(1):
        wanted = other_results(c)
    with fastbn.use_num_threads(5):
        cases.assert_same_bits(other_results(c), wanted)


@pytest.mark.parametrize("kind", [*cases.DTYPES, *cases.HALVES])
@pytest.mark.parametrize("shape", FEWER, ids=str)
def test_instruction_sets_agree_on_the_rest(kind: str, shape: tuple[int, ...]) -> None:
    found = []
    for kernel in fused_kernels():
        with cases.running_on(kernel):
            found.append((*other_results(call(shape, kind)), *results(call(shape, kind))))
    for other in found[1:]:
        cases.assert_same_bits(other, found[0])


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
def test_an_unusual_channel_changes_no_bit_of_others(kernel: cases.Kernel, dtype: str) -> None:
    """Threads share the channels, and a channel with a tiny spread takes another way. The others' dx is subnormal."""
    c = cases.call((4000, 64), dtype)
    tiny = np.finfo(c.x.dtype).smallest_normal
    x, gamma = c.x.copy(), np.full(64, 1e-8, c.x.dtype)
    x[:, 3] *= np.sqrt(tiny)
    dy = c.dy * (tiny * 1e5)
    _, cache = fastbn.forward(x, gamma, eps=0)
    with fastbn.use_num_threads(1):
        wanted = tuple(fastbn.backward(dy, cache))
    for threads in (2, 5):
        with fastbn.use_num_threads(threads):
            cases.assert_same_bits(tuple(fastbn.backward(dy, cache)), wanted, f"for {threads} threads")


ZEROS = ((2, 3, 1021), (9, 3, 37), (5, 3, 7), (50, 37), (64, 70, 9))


@pytest.mark.parametrize("activation", [None, "relu", "silu", "hardswish"])
@pytest.mark.parametrize("shape", ZEROS, ids=str)
def test_zeros_have_one_sign(dtype: str, shape: tuple[int, ...], activation: Any) -> None:
    """Where a product is rounded to -0, or x and beta are -0, on every instruction set and wherever y lies."""
    c, channels, odd = cases.call(shape, dtype), shape[1], cases.PLACEMENTS["odd address"]
    ones, zeros = np.ones(channels, c.x.dtype), np.zeros(channels, c.x.dtype)
    tiny = np.finfo(c.x.dtype).smallest_normal
    for x, gamma, beta in ((c.x * tiny, ones * 1e-17, zeros), (np.where(c.x < 0, -zeros[0], c.x), ones, -zeros)):
        found = []
        for kernel in fused_kernels():
            with cases.running_on(kernel):
                found.append(fastbn.infer(x, gamma, beta, zeros, ones, activation=activation))
                out = odd(np.zeros_like(x))
                found.append(fastbn.infer(x, gamma, beta, zeros, ones, activation=activation, out=out))
        assert (found[0] == 0).any()
        for other in found[1:]:
            cases.assert_same_bits(other, found[0])


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("shape", [(2, 3, 1032), (2, 3, 1021), (51, 3), (5, 3, 7)], ids=str)
def test_an_infinite_mean_reaches_no_padding(kernel: cases.Kernel, dtype: str, shape: tuple[int, ...]) -> None:
    """The sum of dy * xhat is -inf, not NaN, also where vectors are filled up."""
    mean, ones = np.full(3, np.inf, dtype), np.ones(3, dtype)
    x = np.ones(shape, dtype)
    _, cache = fastbn.forward(x, ones, None, mean, ones.copy(), training=False)
    np.testing.assert_array_equal(fastbn.backward_sums(x, cache).sum_dy_xhat, -np.inf)
    np.testing.assert_array_equal(fastbn.backward(x, cache).dgamma, -np.inf)


PROCESS = """
import hashlib, numpy as np, fastbn
for dtype in ("float32", "float64"):
    for shape in ((600, 1000), (20_001, 16), (2, 3, 70_001), (3, 2000, 7, 7), (13, 37)):
        rng = np.random.default_rng(0)
        x, dy, residual = rng.standard_normal((3, *shape)).astype(dtype) + np.asarray(1000, dtype)
        gamma, beta = rng.standard_normal((2, shape[1])).astype(dtype)
        y, cache = fastbn.forward(x, gamma, beta, activation="relu", residual=residual - x)
        found = hashlib.blake2b(y)
        for array in fastbn.backward(dy, cache):
            found.update(array)
        print(found.hexdigest())
"""


@pytest.mark.parametrize("isa", environment.ISAS)
def test_any_number_of_threads_in_processes(isa: str, tmp_path: Path) -> None:
    """As users set it: FASTBN_ISA and FASTBN_NUM_THREADS; and the fused ones agree across processes, too."""
    if isa not in cases.isas():
        pytest.skip(f"this processor or build has no {isa}")
    found = set()
    for threads in "18":
        done = cases.run_python(PROCESS, tmp_path, FASTBN_ISA=isa, FASTBN_NUM_THREADS=threads, FASTBN_BACKEND="c")
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
    if isa == "avx512":
        assert cases.run_python(PROCESS, tmp_path, FASTBN_ISA="avx2", FASTBN_BACKEND="c").stdout in found
