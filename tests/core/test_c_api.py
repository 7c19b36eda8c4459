"""Does the C API refuse what it cannot do, before it writes anything, and never crash?"""

from __future__ import annotations

import ctypes as ct
import math
import re
from collections.abc import Callable
from typing import Any

import c_api
import cases
import numpy as np
import pytest
from c_api import (
    BAD_ACTIVATION,
    BAD_DTYPE,
    BAD_EPS,
    BAD_MOMENTUM,
    BAD_PLAN,
    BAD_SHAPE,
    BAD_SIZE,
    BAD_THREADS,
    MISALIGNED,
    NULL_POINTER,
    OK,
    OVERLAP,
    TOO_FEW_VALUES,
)

import fastbn

OUTER, CHANNELS, INNER = 4, 3, 5
FLOATING = ("float32", "float64", "float16", "bfloat16")
"""In the order of fbn_dtype."""
HEADER = cases.CHECKOUT / "src_c/fastbn.h"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> c_api.Api:
    return c_api.load(tmp_path_factory.mktemp("api"))


class Memory:
    """One valid call of each verb: arrays, and the structures that point to them."""

    def __init__(
        self,
        api: c_api.Api,
        activation: int = 1,
        threads: int = 1,
        shape: tuple[int, int, int] = (OUTER, CHANNELS, INNER),
        dtype: str = "float32",
    ) -> None:
        rng = np.random.default_rng(0)
        self.api = api
        outer, channels, inner = shape
        self.x, self.dy, self.residual = rng.standard_normal((3, *shape), np.float32).astype(dtype)
        self.y, self.dx, self.dresidual = np.full((3, *shape), 7, dtype)
        self.gamma, self.beta, self.mean, self.var = rng.uniform(1, 2, (4, channels)).astype(np.float32)
        self.dgamma, self.dbeta = np.full((2, channels), 7, "float64" if dtype == "float64" else "float32")
        self.saved, self.moments, self.sums = (np.full((rows, channels), 7.0) for rows in (6, 3, 2))
        self.mask = np.ones((outer, inner), np.uint8)
        self.machine = api.this_machine()
        self.problem = c_api.Problem(
            ct.pointer(self.machine), FLOATING.index(dtype), activation, 0.1, outer, channels, inner, threads
        )
        self.parameters = c_api.Parameters(self.gamma.ctypes.data, self.beta.ctypes.data, 0)
        self.statistics = c_api.Statistics(self.mean.ctypes.data, self.var.ctypes.data, 0)
        self.running = c_api.Running(self.mean.ctypes.data, self.var.ctypes.data, 0, 0.1, 1)
        self.workspace = np.zeros(api.workspace_bytes(ct.byref(self.problem)), np.uint8)
        self.plan = np.zeros(api.plan_bytes(channels), np.uint8)
        self.arguments: dict[str, Any] = {
            "problem": ct.byref(self.problem), "eps": 1e-5, "count": outer * inner, "frozen": 0, "from_y": 0,
            "given_sums": None,
        }  # fmt: skip
        for name in ("x", "dy", "residual", "y", "dx", "dresidual", "dgamma", "dbeta"):
            self.arguments[name] = getattr(self, name).ctypes.data
        for name in ("saved", "moments", "sums", "mask", "workspace", "plan"):
            self.arguments[name] = getattr(self, name).ctypes.data

    def call(self, verb: str, **changed: Any) -> int:
        """The verb with these arguments; structures are those of this object as they are now."""
        structs = {"parameters": self.parameters, "statistics": self.statistics, "running": self.running}
        arguments = {**self.arguments, **structs, **changed}
        for name, absent in (("parameters", c_api.Parameters()), ("running", c_api.Running())):
            arguments[name] = absent if arguments[name] is None else arguments[name]
        args = c_api.ARGS[verb](**{name: arguments[name] for name in c_api.FIELDS[verb].split()})
        args.size = changed.get("size", ct.sizeof(args))
        room = arguments["plan" if verb.startswith("plan") else "workspace"]
        pointer = ct.byref(args) if changed.get("args", True) else None
        status: int = getattr(self.api, verb)(arguments["problem"], pointer, room)
        return status

    def contents(self) -> bytes:
        """All that a verb might write, but for its workspace."""
        arrays = self.y, self.dx, self.dresidual, self.mean, self.var, self.dgamma, self.dbeta, self.saved
        return b"".join(array.tobytes() for array in (*arrays, self.moments, self.sums, self.plan, self.x))


ARGUMENTS = {
    verb: f"problem args {fields} {'plan' if verb.startswith('plan') else 'workspace'}"
    for verb, fields in c_api.FIELDS.items()
}
OPTIONAL = {"residual", "mask", "parameters", "running", "dgamma", "dbeta", "given_sums"}
VALUES = {"eps", "from_y", "count", "frozen", "statistics"}


def needed(verb: str) -> list[str]:
    names = [name for name in ARGUMENTS[verb].split() if name not in OPTIONAL | VALUES]
    return [name for name in names if (verb, name) != ("infer", "saved")]


def pointers(verb: str) -> list[str]:
    """Those to arrays of more than bytes."""
    others = {"problem", "args", "parameters", "running", "mask", "workspace", "plan"} | VALUES
    return [name for name in ARGUMENTS[verb].split() if name not in others]


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_a_valid_call(api: c_api.Api, verb: str) -> None:
    memory = Memory(api)
    if verb == "plan_run":
        assert memory.call("plan_set") == OK
    assert memory.call(verb) == OK


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_what_is_optional_may_be_null(api: c_api.Api, verb: str) -> None:
    memory = Memory(api)
    assert memory.call("plan_set") == OK
    assert memory.call(verb, **dict.fromkeys(OPTIONAL)) == OK


def test_dresidual_without_a_residual(api: c_api.Api) -> None:
    """It is neither checked nor written."""
    memory = Memory(api)
    assert memory.call("backward", residual=None, mask=None) == OK
    assert (memory.dresidual == 7).all()
    assert memory.call("backward", residual=None, mask=None, dresidual=3) == OK


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb in ARGUMENTS for name in needed(verb)])
def test_null(api: c_api.Api, verb: str, name: str) -> None:
    memory = Memory(api)
    before = memory.contents()
    assert memory.call(verb, **{name: None}) == NULL_POINTER
    assert memory.contents() == before


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb in ARGUMENTS for name in pointers(verb)])
def test_misaligned(api: c_api.Api, verb: str, name: str) -> None:
    memory = Memory(api)
    before = memory.contents()
    address = memory.arguments[name] or memory.arguments["sums"]
    assert memory.call(verb, **{name: address + 1}) == MISALIGNED
    assert memory.contents() == before


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_size(api: c_api.Api, verb: str) -> None:
    """A struct of another size is of another version, or its size was forgotten."""
    memory = Memory(api)
    before = memory.contents()
    assert memory.call(verb, size=0) == memory.call(verb, size=ct.sizeof(c_api.ARGS[verb]) + 8) == BAD_SIZE
    assert memory.contents() == before


def test_misaligned_parameters(api: c_api.Api) -> None:
    memory = Memory(api)
    memory.parameters.beta += 2
    assert [memory.call(verb) for verb in ("forward", "infer", "plan_set")] == [MISALIGNED] * 3


BAD_PROBLEMS: list[tuple[str, Any, int]] = [
    ("dtype", -1, BAD_DTYPE), ("dtype", 4, BAD_DTYPE), ("activation", -1, BAD_ACTIVATION),
    ("activation", 7, BAD_ACTIVATION), ("outer", -1, BAD_SHAPE), ("channels", -1, BAD_SHAPE),
    ("inner", -1, BAD_SHAPE), ("outer", 2**62, BAD_SHAPE), ("channels", 2**63 - 1, BAD_SHAPE),
    ("inner", 2**48, BAD_SHAPE), ("threads", 0, BAD_THREADS), ("threads", -2, BAD_THREADS),
    ("threads", 1025, BAD_THREADS),
]  # fmt: skip


@pytest.mark.parametrize("verb", ARGUMENTS)
@pytest.mark.parametrize(("field", "value", "status"), BAD_PROBLEMS)
def test_bad_problem(api: c_api.Api, verb: str, field: str, value: int, status: int) -> None:
    """But what plan_set ignores."""
    memory = Memory(api)
    setattr(memory.problem, field, value)
    before = memory.contents()
    if verb == "plan_set" and field not in ("dtype", "channels"):
        assert memory.call(verb) == OK
        return
    assert memory.call(verb) == status
    assert memory.contents() == before
    assert api.workspace_bytes(ct.byref(memory.problem)) == 0


def test_sizes_of_invalid_problems(api: c_api.Api) -> None:
    assert api.workspace_bytes(None) == 0
    assert api.plan_bytes(-1) == api.plan_bytes(2**62) == 0
    assert api.plan_bytes(0) > 0


@pytest.mark.parametrize("where", ["machine", "kernels"])
@pytest.mark.parametrize("verb", ARGUMENTS)
def test_no_machine(api: c_api.Api, verb: str, where: str) -> None:
    memory = Memory(api)
    if where == "machine":
        memory.problem.machine = ct.POINTER(c_api.Machine)()
    else:
        memory.machine.kernels = None
    assert memory.call(verb) == NULL_POINTER


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_slopes(api: c_api.Api, slope: float) -> None:
    """leaky_relu's must be finite; that of others is nobody's business."""
    memory = Memory(api, activation=3)
    memory.problem.slope = slope
    assert memory.call("forward") == BAD_ACTIVATION
    memory.problem.activation = 1
    assert memory.call("forward") == OK


@pytest.mark.parametrize("verb", ["forward", "infer", "plan_set"])
@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf])
def test_eps(api: c_api.Api, verb: str, eps: float) -> None:
    memory = Memory(api)
    before = memory.contents()
    assert memory.call(verb, eps=eps) == BAD_EPS
    assert memory.contents() == before


@pytest.mark.parametrize("verb", ["forward", "infer", "plan_set"])
@pytest.mark.parametrize("dtype", [-1, 4, 9])
def test_dtype_of_parameters(api: c_api.Api, verb: str, dtype: int) -> None:
    memory = Memory(api)
    memory.parameters.dtype = dtype
    assert memory.call(verb) == BAD_DTYPE


@pytest.mark.parametrize(
    ("momentum", "correction"), [(-0.1, 1), (1.1, 1), (math.nan, 1), (0.1, -1), (0.1, math.nan), (0.1, math.inf)]
)
def test_momentum(api: c_api.Api, momentum: float, correction: float) -> None:
    memory = Memory(api)
    memory.running.momentum, memory.running.correction = momentum, correction
    before = memory.contents()
    assert memory.call("forward") == BAD_MOMENTUM
    assert memory.contents() == before


@pytest.mark.parametrize("absent", ["mean", "var"])
def test_one_running_statistic_alone(api: c_api.Api, absent: str) -> None:
    memory = Memory(api)
    setattr(memory.running, absent, None)
    assert memory.call("forward") == NULL_POINTER


def test_statistics_of_no_values(api: c_api.Api) -> None:
    """Without any, or with a mask that leaves none."""
    memory = Memory(api)
    before = memory.contents()
    memory.mask[...] = 0
    assert memory.call("forward") == memory.call("moments") == TOO_FEW_VALUES
    memory.mask[...] = 1
    memory.problem.outer = 0
    assert memory.call("forward") == memory.call("moments") == memory.call("backward", count=0) == TOO_FEW_VALUES
    assert memory.contents() == before


def test_no_values_in_inference(api: c_api.Api) -> None:
    """Nothing to do, and no array needed for it."""
    memory = Memory(api)
    memory.problem.outer = 0
    assert memory.call("infer", x=None, y=None, residual=None) == OK
    assert memory.call("backward", dy=None, x=None, dx=None, residual=None, frozen=1) == OK
    assert not memory.dgamma.any()


def test_one_value(api: c_api.Api) -> None:
    """Is beta, whatever it is; but it has no unbiased variance."""
    memory = Memory(api, activation=0)
    memory.problem.outer = memory.problem.inner = 1
    assert memory.call("forward") == TOO_FEW_VALUES
    memory.running.correction = 0
    assert memory.call("forward", residual=None, mask=None) == OK
    assert memory.y.ravel()[:CHANNELS].tolist() == memory.beta.tolist()
    assert memory.call("backward", residual=None, count=1) == OK
    terms = memory.gamma * memory.dy.ravel()[:CHANNELS] / np.sqrt(1e-5)
    assert (abs(memory.dx.ravel()[:CHANNELS]) <= 2 * np.finfo(np.float32).eps * abs(terms)).all()


@pytest.mark.parametrize("inner", [1, 5, 40, 600, 70_000])
def test_no_channels(api: c_api.Api, inner: int) -> None:
    """Whatever the kernels would get of planes of this size."""
    memory = Memory(api)
    memory.problem.channels, memory.problem.inner = 0, inner
    memory.mask = np.ones((OUTER, inner), np.uint8)
    memory.arguments["mask"] = memory.mask.ctypes.data
    nothing = dict.fromkeys([*OPTIONAL, "x", "dy", "y", "dx", "dresidual", "saved", "moments", "sums"])
    for verb in ("forward", "infer", "apply", "plan_set", "plan_run", "moments", "backward_sums", "backward"):
        assert memory.call(verb, statistics=c_api.Statistics(), **nothing) == OK, verb


OVERLAPS: list[tuple[str, str, str, int]] = [
    ("forward", "y", "x", 4), ("forward", "y", "residual", 0), ("infer", "y", "x", -4), ("infer", "y", "residual", 8),
    ("plan_run", "y", "x", 4), ("backward", "dx", "dy", 4), ("backward", "dx", "x", 0),
    ("backward", "dx", "residual", 4), ("backward", "dresidual", "dy", -8), ("backward", "dresidual", "dx", 0),
    ("backward", "dx", "dresidual", 4),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "result", "other", "bytes_off"), OVERLAPS)
def test_overlap(api: c_api.Api, verb: str, result: str, other: str, bytes_off: int) -> None:
    memory = Memory(api)
    before = memory.contents()
    assert memory.call(verb, **{result: memory.arguments[other] + bytes_off}) == OVERLAP
    assert memory.contents() == before


@pytest.mark.parametrize("verb", ["forward", "infer", "plan_run"])
def test_y_may_be_x(api: c_api.Api, verb: str) -> None:
    memory = Memory(api)
    assert memory.call("plan_set") == OK
    assert memory.call(verb, y=memory.arguments["y"]) == OK
    wanted = memory.y.copy()
    memory.mean[...], memory.var[...] = 1, 1
    assert memory.call(verb, y=memory.arguments["x"]) == OK
    if verb != "infer":
        assert memory.x.tobytes() == wanted.tobytes()


def test_inputs_may_be_one_array(api: c_api.Api) -> None:
    memory = Memory(api)
    assert memory.call("forward", residual=memory.arguments["x"]) == OK
    assert memory.call("backward", dy=memory.arguments["x"], residual=memory.arguments["x"]) == OK


@pytest.mark.parametrize("verb", ["backward", "backward_sums"])
@pytest.mark.parametrize(
    ("activation", "slope", "status"), [(0, 0.0, OK), (3, 0.1, OK), (3, 0.0, BAD_ACTIVATION), (1, 0.0, BAD_ACTIVATION)]
)
def test_from_y(api: c_api.Api, verb: str, activation: int, slope: float, status: int) -> None:
    memory = Memory(api, activation)
    memory.problem.slope = slope
    assert memory.call("forward", y=memory.arguments["x"]) == OK
    assert memory.call(verb, from_y=1) == status


@pytest.mark.parametrize("count", [0, -1, 0.5, math.nan, math.inf])
def test_count(api: c_api.Api, count: float) -> None:
    assert Memory(api).call("backward", count=count) == TOO_FEW_VALUES


def _never_set(memory: Memory) -> None:
    pass


def _other_channels(memory: Memory) -> None:
    assert memory.call("plan_set") == OK
    memory.problem.channels = 2


def _other_dtype(memory: Memory) -> None:
    assert memory.call("plan_set") == OK
    memory.problem.dtype, memory.problem.outer = 1, 2


def _other_kernels(memory: Memory) -> None:
    assert memory.call("plan_set") == OK
    memory.machine.kernels = memory.api.kernels_at(1)


def _moved(memory: Memory) -> None:
    assert memory.call("plan_set") == OK
    memory.plan = memory.plan.copy()
    memory.arguments["plan"] = memory.plan.ctypes.data


@pytest.mark.parametrize("mistake", [_never_set, _other_channels, _other_dtype, _other_kernels, _moved])
def test_plan(api: c_api.Api, mistake: Callable[[Memory], None]) -> None:
    memory = Memory(api)
    if mistake is _other_kernels and not api.kernels_at(1):
        pytest.skip("this processor runs one instruction set alone")
    mistake(memory)
    before = memory.y.tobytes()
    assert memory.call("plan_run") == BAD_PLAN
    assert memory.y.tobytes() == before


def test_status_texts(api: c_api.Api) -> None:
    """Each has its own, and other numbers have one, too."""
    texts = [api.status_text(status) for status in range(BAD_SIZE + 1)]
    assert all(texts)
    assert len(set(texts)) == len(texts)
    assert api.status_text(-1) == api.status_text(BAD_SIZE + 1) == b"no such status"


def test_this_machine(api: c_api.Api) -> None:
    machine = api.this_machine()
    assert machine.kernels == api.kernels_at(0)
    assert machine.core_cache == (api.cache_bytes(2) or 1 << 20)
    assert machine.shared_cache == (api.cache_bytes(3) or 8 << 20)
    assert api.cache_bytes(0) == api.cache_bytes(4) == 0
    assert api.kernels_at(-1) is None
    assert api.kernels_name(None) is None


@pytest.mark.skipif(not HEADER.exists(), reason="src_c is not beside the tests: no checkout")
def test_header(api: c_api.Api) -> None:
    """The numbers of this file and the declarations of c_api are those of the header, which is the installed one."""
    text = HEADER.read_text(encoding="utf-8")
    listed = text[: text.index("} fbn_status;")]
    statuses = {name: int(value) for name, value in re.findall(r"FBN_(\w+) = (\d+),? +/\*", listed)}
    assert statuses == {name: getattr(c_api, name) for name in statuses}
    assert len(statuses) == BAD_SIZE
    declared = set(re.findall(r"\bfbn_(\w+)\([^)]*\)[^;{]*;", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)))
    assert declared == set(c_api._SIGNATURES)
    assert f"#define FBN_ABI_VERSION {api.abi_version()}\n" in text


def test_installed_header_is_the_source() -> None:
    installed = (cases.Path(fastbn.get_include()) / "fastbn.h").read_bytes()
    assert not HEADER.exists() or installed == HEADER.read_bytes()


# Rows in streams -----------------------------------------------------------------------------------------------------

WIDTHS = (64, 100, 256, 300, 512)
WALKS = ((8, 3, 512), (8, 2, 1024), (8, 4, 256), (1, 8, 128), (3, 5, 768))
"""Habits: streams, row_streams and turn."""


def rows_mapped(api: c_api.Api, dtype: str, channels: int, activation: int, walk: tuple[int, ...]) -> list[bytes]:
    """What calls write for rows that are beyond the caches, which are said to be small."""
    memory = Memory(api, activation, shape=(131_072 // channels + 3, channels, 1), dtype=dtype)
    memory.machine.core_cache, memory.machine.shared_cache = 1 << 16, 1 << 17
    memory.machine.habits = c_api.Habits(*walk, 1024, 1 << 16, 0)
    memory.workspace = np.zeros(api.workspace_bytes(ct.byref(memory.problem)), np.uint8)
    memory.arguments["workspace"] = memory.workspace.ctypes.data
    found = []
    for verb in ("infer", "forward", "backward"):
        for residual in (memory.arguments["residual"], None):
            assert memory.call(verb, residual=residual) == OK
            found.append(memory.contents())
    return found


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("channels", WIDTHS)
def test_streams_of_rows_change_no_bit(api: c_api.Api, dtype: str, channels: int) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs it")
    for activation in (0, 1):
        wanted = rows_mapped(api, dtype, channels, activation, (1, 1, 512))
        for walk in WALKS:
            assert rows_mapped(api, dtype, channels, activation, walk) == wanted, f"{walk}, activation {activation}"
