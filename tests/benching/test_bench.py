"""Does the bench measure and check as it says? On fake clocks and small arrays."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("rich", reason='needs pip install "fastbn[bench]"')
pytest.importorskip("matplotlib", reason='needs pip install "fastbn[bench]"')


def _part(name: str) -> ModuleType:
    """A module of the bench: fastbn.bench where fastbn is installed, bench in a checkout."""
    try:
        return importlib.import_module(f"fastbn.bench.{name}")
    except ModuleNotFoundError:
        return importlib.import_module(f"bench.{name}")


copies, limit, ours, problem, rivals = map(_part, ("copies", "limit", "ours", "problem", "rivals"))
rows, runner, shapes, targets, timing = map(_part, ("rows", "runner", "shapes", "targets", "timing"))

# ---- timing


class FakeClock:
    """Time passes only when a contestant or a pause says so."""

    def __init__(self) -> None:
        self.now = 0
        self.trace: list[str] = []

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)
        self.trace.append("pause")

    def contestant(self, name: str, nanoseconds: int):
        def call() -> None:
            self.now += nanoseconds
            self.trace.append(name)

        return problem.Contestant(name=name, call=call, results=lambda _: ())


def race(clock: FakeClock, *speeds: int, seconds: float, least: int = 5, pause: float = 0.0):
    contestants = [clock.contestant(chr(ord("a") + i), speed) for i, speed in enumerate(speeds)]
    budget = timing.Budget(seconds, least)
    return timing.race(contestants, budget, clock=clock, pause=pause, sleep=clock.sleep)


def test_race_finds_each_contestants_time_per_call():
    a, b = race(FakeClock(), 2_000, 30_000_000, seconds=1.0)
    assert a.median == pytest.approx(2e-6)
    assert b.median == pytest.approx(30e-3)
    assert b.over(a) == pytest.approx(15_000)
    assert a.spread == b.spread == 0


def test_slow_contestants_get_the_least_samples_and_the_yardstick_is_in_every_round():
    a, b, c = race(FakeClock(), 1_000_000, 2_000_000, 900_000_000, seconds=0.3)
    assert len(c.by_round) == 5
    assert len(b.by_round) > 10
    assert set(a.by_round) >= set(b.by_round) | set(c.by_round)
    assert max(c.by_round) - min(c.by_round) > len(a.by_round) / 2, "samples are spread over the race"


def test_race_keeps_to_its_budget():
    clock = FakeClock()
    race(clock, 1_000_000, 1_000_000, seconds=0.1)
    assert 0.05e9 < clock.now < 0.2e9


def test_each_turn_starts_with_a_pause_and_an_untimed_call():
    clock = FakeClock()
    race(clock, 5_000_000, 5_000_000, seconds=0.01, pause=1e-3)
    turns = "".join(word[0] for word in clock.trace).split("p")[1:]
    assert {turn for turn in turns if turn} == {"aa", "bb"}


def test_the_order_changes_between_rounds():
    clock = FakeClock()
    race(clock, 5_000_000, 5_000_000, seconds=0.01, least=20)
    rounds = ["".join(clock.trace[-80 + 4 * i :][:4]) for i in range(20)]
    assert set(rounds) == {"aabb", "bbaa"}


def test_samples_report_median_spread_and_paired_ratio():
    slow = timing.Samples({0: 2.0, 1: 4.0, 2: 6.0, 3: 8.0, 4: 10.0})
    fast = timing.Samples({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0})
    assert slow.median == 6.0
    assert slow.spread == pytest.approx(4.0 / 6.0)
    assert slow.over(fast) == 2.0, "drift strikes both alike"
    assert timing.Samples({0: 1.0}).spread == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_yardstick_copies_everything(threads):
    p = problem.Problem((3, 8, 91, 31), "nchw", "float32")
    with copies.yardstick(p, threads) as copy:
        copy.call()
        assert copy.seconds(3, timing.time.perf_counter_ns) > 0
    np.testing.assert_array_equal(p.out, p.x)


# ---- shapes and arrays


def test_parse_shapes():
    assert shapes.parse("2x3x4") == ((2, 3, 4),)
    assert shapes.parse("8x64, targets")[0] == (8, 64)
    assert len(shapes.parse("resnet50")) == 12
    assert shapes.parse("resnet50", 4)[0] == (4, 64, 112, 112)
    assert shapes.parse("inference")[0][0] == 1
    assert len(shapes.parse("targets,targets")) == len(shapes.parse("targets"))
    assert len(shapes.parse("densenet121")) == 65
    assert {len(shape) for shape in shapes.parse("unet3d")} == {5}
    for name in shapes.NAMES:
        assert shapes.parse(name)


def test_sizes_are_read_as_people_write_them():
    for text in ("2X3X4", " 2x3x4", "2*3*4", "2\u00d73\u00d74", [(2, 3, 4)], ["2x3x4", (2, 3, 4)], "ResNet50"):
        assert shapes.parse(text)[0] in ((2, 3, 4), (32, 64, 112, 112))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("resnet51", "did you mean resnet50?"),
        ("32", "got '32', one size; allowed: examples x channels, and sizes of space, such as 32x64 or"),
        ("2x0x4", "'0' is not a positive integer"),
        ("2x-3", "'-3' is not a positive integer"),
        ("", "sizes such as 32x64x56x56"),
        ("axb", "allowed: resnet50, vgg16"),
        ("2x3;4x5", "with commas between shapes"),
        ((32, 64), "one size"),
    ],
)
def test_parse_says_what_is_wrong(text, names):
    with pytest.raises(ValueError, match=re.escape(names)):
        shapes.parse(text if isinstance(text, str) else [(32,)])


def test_targets_are_of_shapes_in_the_targets_set():
    known = set(shapes.parse("targets"))
    assert set(targets.TABLE) | {shape for _, shape, _, _ in targets.SMALL} <= known


def test_layouts_are_one_set_of_values_in_two_orders():
    p = problem.Problem((2, 3, 4, 5), "nhwc", "float32")
    assert p.x.shape == (2, 4, 5, 3)
    assert p.channels_first(p.x).shape == (2, 3, 4, 5)
    assert p.axes == (0, 1, 2)
    np.testing.assert_allclose(p.batch[0], p.x.mean((0, 1, 2)), rtol=1e-5)


def test_plan_counts_its_races():
    plan = runner.Plan(
        ((1, 64), (8, 64), (2, 3, 4, 5)), problem.PASSES, problem.LAYOUTS, (problem.Variant(),), (1, 2), {}, None
    )
    assert plan.races == 2 * (1 + 3 + 6), "a batch of one value has inference alone, a matrix one layout"
    varied = dataclasses.replace(plan, variants=[problem.Variant(strides=strides) for strides in problem.STRIDES])
    assert varied.races == 2 * ((1 + 3) * 4 + 6 * 6), "a matrix has no middle, and is not broadcast"


def test_variants_are_held_against_what_they_would_be_without():
    variant = problem.Variant("float16", "relu", "cropped")
    assert str(variant) == "float16 relu cropped"
    assert list(map(str, variant.bases().values())) == ["float32 relu cropped", "float16 cropped", "float16 relu"]
    assert list(variant.bases()) == ["float32", "unfused", "dense"]
    asked = problem.Variant(result="fresh", mask=True, residual=True)
    assert str(asked) == "float32 fresh mask residual"
    assert list(map(str, asked.bases().values())) == [
        "float32 mask residual",
        "float32 fresh residual",
        "float32 fresh mask",
    ]
    assert not problem.Variant().bases()


@pytest.mark.parametrize("strides", problem.STRIDES)
@pytest.mark.parametrize("layout", problem.LAYOUTS)
def test_strides_are_another_place_for_the_same_values(strides, layout):
    dense, other = (problem.Problem((3, 4, 5, 6), layout, "float32", s) for s in ("dense", strides))
    for name in ("x", "dy", "out"):
        ours, theirs = getattr(other, name), getattr(dense, name)
        np.testing.assert_array_equal(
            ours, theirs if strides != "broadcast" else np.broadcast_to(theirs[:1], ours.shape)
        )
        is_dense = strides == "dense" or (strides, name) == ("broadcast", "out")
        assert (ours.strides == theirs.strides) is is_dense
    once = 1 if strides != "broadcast" else 1 / 3
    assert other.bytes_moved("infer") == dense.x.nbytes * (1 + once)
    assert other.bytes_moved("backward") == dense.x.nbytes * (1 + 2 * once)


def test_an_activation_shares_the_arrays():
    plain = problem.Problem((3, 4), "nc", "float32")
    activated = plain.varied(problem.Variant(activation="silu"))
    assert activated.x is plain.x
    assert (plain.activation, activated.activation) == ("none", "silu")


def test_variants_race_beside_their_bases():
    variants = (problem.Variant("float16", "relu"), problem.Variant(strides="reversed"), problem.Variant())
    entrants = {"fastbn numpy": ("numpy", None)}
    plan = runner.Plan(
        ((4, 3, 2),), ("forward", "backward"), ("nchw",), variants, (1,), entrants, timing.Budget(0.001, 1)
    )
    running = runner.Runner(plan, rivals.load(["numpy"]).rivals)
    measured = [row for row in running.run() if row.kind == rows.FASTBN]
    assert [(str(row.variant), set(row.against)) for row in measured] == [
        *[("float16 relu", {"float32", "unfused"})] * 2,
        *[("float32 reversed", {"dense"})] * 2,
        *[("float32", set())] * 2,
    ]
    assert all(ratio > 0 for row in measured for ratio in row.against.values())
    assert [bool(row.over) for row in measured] == [False] * 4 + [True] * 2
    assert [note.split(" (")[0] for note in running.notes] == [
        "NumPy is not timed with activations",
        "NumPy is not timed with arrays that are not dense",
    ]


@pytest.mark.parametrize("activation", problem.ACTIVATIONS[1:])
def test_torchs_activations_agree_with_fastbn(activation):
    loaded = rivals.load(["torch"])
    if loaded.missing:
        pytest.skip(loaded.missing[0])
    variants, entrants = (problem.Variant(activation=activation),), {"fastbn numpy": ("numpy", None)}
    plan = runner.Plan(((3, 5, 4),), problem.PASSES, ("nhwc",), variants, (1,), entrants, timing.Budget(0.001, 1))
    running = runner.Runner(plan, loaded.rivals)
    peers = [row for row in running.run() if row.kind == rows.PEER]
    assert {row.pass_ for row in peers} == set(problem.PASSES)
    assert all(row.difference < 1e-5 for row in peers)
    assert not running.notes


@pytest.mark.parametrize("pass_", problem.PASSES)
def test_torchs_memory_is_reused(pass_):
    """In the calls that are timed, no page of a result is touched for the first time."""
    loaded = rivals.load(["torch"])
    if loaded.missing:
        pytest.skip(loaded.missing[0])
    glibc = _part("rivals.glibc")
    if not glibc.available():
        pytest.skip("needs glibc")
    (torch,) = loaded.rivals.values()
    torch.set_threads(1)
    p = problem.Problem((8, 256, 56, 56), "nchw", "float32")
    (reused,) = (one for one in torch.prepare(p, pass_) if one.name == "torch reused")
    for _ in range(3):
        with reused.within():
            faults = [glibc.page_faults(reused.call) for _ in range(4)]
            assert sorted(faults)[2] <= p.x.nbytes // 4096 // 10, f"in one call at most: {faults}"


@pytest.mark.parametrize("pass_", problem.PASSES)
@pytest.mark.parametrize("layout", problem.LAYOUTS)
def test_numpys_rows_agree_with_fastbn(pass_, layout):
    p = problem.Problem((4, 6, 5, 3), layout, "float64")
    loaded = rivals.load(["numpy"])
    assert not loaded.missing
    contestant = ours.prepare(p, pass_, "fastbn numpy", "numpy", None)
    reference = tuple(a.copy() for a in contestant.results(contestant.call()))
    others = loaded.rivals["NumPy"].prepare(p, pass_)
    assert [other.name for other in others] == ["NumPy naive", "NumPy careful"]
    for other in others:
        assert problem.disagreement(other.results(other.call()), reference) < 1e-12


@pytest.mark.parametrize("title", ["PyTorch", "oneDNN", "ONNX Runtime"])
@pytest.mark.parametrize("layout", problem.LAYOUTS)
def test_installed_peers_agree_with_fastbn(title, layout):
    """A channel count that is no multiple of 8 or 16 has oneDNN's blocked layout pad."""
    name = next(name for name, entry in rivals.ENTRIES.items() if entry.title == title)
    loaded = rivals.load([name])
    if loaded.missing:
        pytest.skip(loaded.missing[0])
    plan = runner.Plan(
        shapes=((3, 20, 5, 4), (3, 20), (2, 20, 3, 4, 2)),
        passes=problem.PASSES,
        layouts=(layout,),
        variants=(problem.Variant(),),
        threads=(1,),
        entrants={"fastbn numpy": ("numpy", None)},
        budget=timing.Budget(0.001, 1),
    )
    running = runner.Runner(plan, loaded.rivals)
    peers = [row for row in running.run() if row.kind == rows.PEER]
    assert peers
    assert all(row.agrees for row in peers)
    assert not running.notes


def test_a_wrong_result_is_told():
    right = (np.ones((2, 3)),)
    assert problem.disagreement((np.ones((2, 3)),), right) == 0
    assert problem.disagreement((np.full((2, 3), 1.5),), right) == pytest.approx(0.5)
    assert problem.disagreement((np.full((2, 3), np.nan),), right) == math.inf


class Liar:
    """A peer that is quick, and wrong; and one that fails."""

    version, notes = "0", ()

    def set_threads(self, threads):
        pass

    def prepare(self, p, pass_):
        if pass_ == "forward":
            raise RuntimeError("not today")
        return [problem.Contestant(name="torch", call=lambda: p.x, results=lambda x: (p.channels_first(x),))]


def test_peers_that_fail_or_differ_are_noted_and_do_not_stop_the_run():
    budget = timing.Budget(0.001, 1)
    entrants = {"fastbn numpy": ("numpy", None)}
    plan = runner.Plan(((4, 3),), ("forward", "infer"), ("nchw",), (problem.Variant(),), (1,), entrants, budget)
    running = runner.Runner(plan, {"Liar": Liar()})
    measured = list(running.run())
    assert [row.contestant for row in measured] == ["copy", "fastbn numpy", "copy", "fastbn numpy", "torch"]
    assert not measured[-1].agrees
    refusal, difference = running.notes
    assert refusal == "Liar does not run: RuntimeError: not today (in forward 4x3 nc float32, threads: 1)"
    assert difference.startswith("torch: its result differs (in infer 4x3")


def test_missing_peers_are_named_with_the_way_to_have_them(monkeypatch):
    def nothing(*_):
        raise ImportError("No module named 'jax'")

    monkeypatch.setattr(rivals.importlib, "import_module", nothing)
    loaded = rivals.load(["jax"])
    assert not loaded.rivals
    assert loaded.missing == ["JAX (No module named 'jax'); pip install jax"]


# ---- where results go, and the limit


@pytest.mark.parametrize("pass_", problem.PASSES)
@pytest.mark.parametrize("layout", problem.LAYOUTS)
def test_each_way_to_call_gives_the_same(pass_, layout):
    """In place again and again as well, and with a mask and a residual."""
    plain = problem.Problem((4, 6, 5, 3), layout, "float64")
    for mask, residual in ((False, False), (pass_ != "infer", True)):
        answers = []
        for result in problem.RESULTS:
            # The parameters are those of what works in place, where y is x but for the residual.
            asked = plain.varied(problem.Variant("float64", result="inplace", mask=mask, residual=residual))
            asked = asked.varied(problem.Variant("float64", result=result, mask=mask, residual=residual))
            contestant = ours.prepare(asked, pass_, "fastbn numpy", "numpy", None)
            before = asked.x.copy(), asked.dy.copy()
            for _ in range(2):
                with contestant.within():
                    answers.append([a.copy() for a in contestant.results(contestant.call())])
            for now, then in zip((asked.x, asked.dy), before, strict=True):
                np.testing.assert_array_equal(now, then)
        for answer in answers[1:]:
            assert problem.disagreement(tuple(answer), tuple(answers[0])) < 1e-12


@pytest.mark.parametrize("pass_", problem.PASSES)
def test_values_neither_grow_nor_vanish_in_place(pass_):
    asked = problem.Problem((8, 16), "nc", "float32").varied(problem.Variant(result="inplace"))
    contestant = ours.prepare(asked, pass_, "fastbn numpy", "numpy", None)
    with contestant.within():
        for _ in range(1000):
            value = contestant.results(contestant.call())[0]
    assert 0.1 < np.abs(value).max() < 10


def test_what_is_refused_in_place_is_noted():
    variants = (problem.Variant(activation="silu", result="inplace"),)
    entrants = {"fastbn numpy": ("numpy", None)}
    plan = runner.Plan(((4, 6),), ("forward",), ("nchw",), variants, (1,), entrants, timing.Budget(0.001, 1))
    running = runner.Runner(plan, {})
    assert list(running.run()) == []
    assert running.notes[0].startswith("fastbn numpy does not run: NotImplementedError: in place: ")


def test_the_limit_is_timed_beside_the_copy():
    if limit.missing():
        pytest.skip(limit.missing())
    shape, entrants = (16, 64, 16, 16), {"fastbn numpy": ("numpy", None)}
    variants, budget = (problem.Variant(),), timing.Budget(0.001, 1)
    plan = runner.Plan((shape, (8, 64)), problem.PASSES, ("nchw",), variants, (1,), entrants, budget)
    found = list(runner.Runner(plan, {}).run())
    limits = [row for row in found if row.kind == rows.LIMIT]
    assert [(row.pass_, row.shape) for row in limits] == [(pass_, shape) for pass_ in problem.PASSES]
    ours_ = [row for row in found if row.kind == rows.FASTBN]
    assert ["limit" in row.others for row in ours_] == [True] * 3 + [False] * 3, "small arrays have none"
    for mine, least in zip(ours_[:3], limits, strict=True):
        assert 0 < mine.others["limit"] < 1, "NumPy is slower than the plainest loops"
        assert least.seconds > 0
    assert not limit.contestants(problem.Problem(shape, "nchw", "float32"), "infer", 2)


def test_the_loops_of_the_limit_move_what_they_say():
    if limit.missing():
        pytest.skip(limit.missing())
    p = problem.Problem((16, 64, 16, 16), "nchw", "float32")
    words = {one: getattr(p, one).reshape(-1).view(np.uint64) for one in ("x", "dy", "out")}
    start = -p.out.ctypes.data % limit.LINE // 8
    end = start + (words["x"].size - start) // 32 * 32
    for name, expected in (
        ("map", words["x"] + np.uint64(1)),
        ("map around", words["x"] + np.uint64(1)),
        ("map2", words["x"] + words["dy"]),
        ("map2 around", words["x"] + words["dy"]),
    ):
        words["out"][:] = 0
        pass_ = "backward" if "2" in name else "infer"
        loops = {loop.name: loop for loop in limit.contestants(p, pass_, 1)}
        loops[name].call()
        np.testing.assert_array_equal(words["out"][start:end], expected[start:end])


def test_without_a_compiler_there_is_no_limit(monkeypatch):
    limit._library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler -x")
    try:
        assert limit.missing() == 'no column "limit": there is no C compiler no-such-compiler -x (CC names another)'
        assert not limit.contestants(problem.Problem((16, 64, 16, 16), "nchw", "float32"), "infer", 1)
        monkeypatch.setenv("CC", "false")
        assert "false cannot compile it: no message" in limit.missing()
    finally:
        limit._library.cache_clear()


@pytest.mark.filterwarnings("ignore")  # the compiler's own modules warn
def test_torch_compiled_agrees_and_is_for_activations():
    loaded = rivals.load(["torch.compile"])
    if loaded.missing:
        pytest.skip(loaded.missing[0])
    variants, entrants = (problem.Variant(), problem.Variant(activation="relu")), {"fastbn numpy": ("numpy", None)}
    plan = runner.Plan(((3, 5, 4),), problem.PASSES, ("nchw",), variants, (1,), entrants, timing.Budget(0.001, 1))
    running = runner.Runner(plan, loaded.rivals)
    peers = [row for row in running.run() if row.kind == rows.PEER]
    assert [(row.contestant, row.activation, row.pass_) for row in peers] == [
        ("torch.compile", "relu", pass_) for pass_ in problem.PASSES
    ]
    assert all(row.difference < 1e-5 for row in peers)
    (note,) = running.notes
    assert note.startswith("torch.compile is not timed with a norm alone")


def test_onednn_of_libdnnl_is_taken_first(monkeypatch):
    monkeypatch.setenv("LIBDNNL", "/no/such/libdnnl.so")
    loaded = rivals.load(["onednn"])
    assert not loaded.rivals
    assert loaded.missing[0].startswith("oneDNN (/no/such/libdnnl.so: cannot open shared object")
