"""Does the bench measure, check, report and compare as it says? On fake clocks and made-up rows; one real run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from pathlib import Path
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


cli, compare, copies, ours, plots = map(_part, ("cli", "compare", "copies", "ours", "plots"))
problem, report, rivals, rows, run = map(_part, ("problem", "report", "rivals", "rows", "run"))
shapes, targets, timing = map(_part, ("shapes", "targets", "timing"))

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


@pytest.mark.parametrize("text", ["resnet51", "32", "2x0x4", "2x-3", "", "axb"])
def test_parse_refuses_and_lists_the_names(text):
    with pytest.raises(ValueError, match="resnet50"):
        shapes.parse(text)


def test_targets_are_of_shapes_in_the_targets_set():
    known = set(shapes.parse("targets"))
    assert {shape for shape, _ in targets.TABLE} | {shape for _, shape, _, _ in targets.SMALL} <= known


def test_layouts_are_one_set_of_values_in_two_orders():
    p = problem.Problem((2, 3, 4, 5), "nhwc", "float32")
    assert p.x.shape == (2, 4, 5, 3)
    assert p.channels_first(p.x).shape == (2, 3, 4, 5)
    assert p.axes == (0, 1, 2)
    np.testing.assert_allclose(p.batch[0], p.x.mean((0, 1, 2)), rtol=1e-5)


def test_plan_counts_its_races():
    plan = run.Plan(
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
    activated = plain.activated("silu")
    assert activated.x is plain.x
    assert (plain.activation, activated.activation) == ("none", "silu")


def test_variants_race_beside_their_bases():
    variants = (problem.Variant("float16", "relu"), problem.Variant(strides="reversed"), problem.Variant())
    entrants = {"fastbn numpy": ("numpy", None)}
    plan = run.Plan(((4, 3, 2),), ("forward", "backward"), ("nchw",), variants, (1,), entrants, timing.Budget(0.001, 1))
    runner = run.Runner(plan, rivals.load(["numpy"]).rivals)
    measured = [row for row in runner.run() if row.kind == rows.FASTBN]
    assert [(str(row.variant), set(row.against)) for row in measured] == [
        *[("float16 relu", {"float32", "unfused"})] * 2,
        *[("float32 reversed", {"dense"})] * 2,
        *[("float32", set())] * 2,
    ]
    assert all(ratio > 0 for row in measured for ratio in row.against.values())
    assert [bool(row.over) for row in measured] == [False] * 4 + [True] * 2
    assert [note.split(" (")[0] for note in runner.notes] == [
        "NumPy is not timed with activations",
        "NumPy is not timed with arrays that are not dense",
    ]


@pytest.mark.parametrize("activation", problem.ACTIVATIONS[1:])
def test_torchs_activations_agree_with_fastbn(activation):
    loaded = rivals.load(["torch"])
    if loaded.missing:
        pytest.skip(loaded.missing[0])
    variants, entrants = (problem.Variant(activation=activation),), {"fastbn numpy": ("numpy", None)}
    plan = run.Plan(((3, 5, 4),), problem.PASSES, ("nhwc",), variants, (1,), entrants, timing.Budget(0.001, 1))
    runner = run.Runner(plan, loaded.rivals)
    peers = [row for row in runner.run() if row.kind == rows.PEER]
    assert {row.pass_ for row in peers} == set(problem.PASSES)
    assert all(row.difference < 1e-5 for row in peers)
    assert not runner.notes


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
    """A channel count that is no multiple of 16 has oneDNN's blocked layout pad."""
    name = next(name for name, entry in rivals.ENTRIES.items() if entry.title == title)
    loaded = rivals.load([name])
    if loaded.missing:
        pytest.skip(loaded.missing[0])
    plan = run.Plan(
        shapes=((3, 20, 5, 4), (3, 20), (2, 20, 3, 4, 2)),
        passes=problem.PASSES,
        layouts=(layout,),
        variants=(problem.Variant(),),
        threads=(1,),
        entrants={"fastbn numpy": ("numpy", None)},
        budget=timing.Budget(0.001, 1),
    )
    runner = run.Runner(plan, loaded.rivals)
    peers = [row for row in runner.run() if row.kind == rows.PEER]
    assert peers
    assert all(row.agrees for row in peers)
    assert not runner.notes


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
    plan = run.Plan(((4, 3),), ("forward", "infer"), ("nchw",), (problem.Variant(),), (1,), entrants, budget)
    runner = run.Runner(plan, {"Liar": Liar()})
    measured = list(runner.run())
    assert [row.contestant for row in measured] == ["copy", "fastbn numpy", "copy", "fastbn numpy", "torch"]
    assert not measured[-1].agrees
    refusal, difference = runner.notes
    assert refusal == "Liar does not run: RuntimeError: not today (in forward 4x3 nc float32, threads: 1)"
    assert difference.startswith("torch: its result differs (in infer 4x3")


def test_missing_peers_are_named_with_the_way_to_have_them(monkeypatch):
    def nothing(*_):
        raise ImportError("No module named 'jax'")

    monkeypatch.setattr(rivals.importlib, "import_module", nothing)
    loaded = rivals.load(["jax"])
    assert not loaded.rivals
    assert loaded.missing == ["JAX (No module named 'jax'); pip install jax"]


# ---- rows, tables, pictures, comparison


def made_up(pass_="forward", layout="nchw", shape=(32, 256, 56, 56), threads=1, ours=1.25, peer=6.0):
    """The rows of one race: a copy, fastbn and torch."""
    size = math.prod(shape) * 4
    common = {"pass_": pass_, "layout": layout, "dtype": "float32", "shape": shape, "threads": threads, "samples": 9}
    copy = size / 5e9

    def row(name, kind, ratio, **more):
        moved = 2 * size
        times = {"seconds": ratio * copy, "spread": 0.05, "to_copy": ratio, "gb_per_s": moved / (ratio * copy) / 1e9}
        return rows.Row(contestant=name, kind=kind, bytes_moved=moved, **times, **common, **more)

    return [
        row("copy", rows.COPY, 1.0),
        row("fastbn c", rows.FASTBN, ours, over={"torch reused": peer / ours}),
        row("torch reused", rows.PEER, peer),
    ]


def made_up_run(**more):
    table = [
        row
        for pass_ in problem.PASSES
        for layout in problem.LAYOUTS
        for shape in ((32, 64, 112, 112), (32, 256, 56, 56), (32, 2048, 7, 7))
        for row in made_up(pass_, layout, shape, **more)
    ]
    return rows.Run({"processor": "A processor"}, table, ["not installed: JAX; pip install jax"])


def shown(function, *arguments) -> str:
    console = report.extra("rich.console").Console(width=report.WIDTH, highlight=False, color_system=None, record=True)
    function(console, *arguments)
    return console.export_text()


def test_rows_survive_saving(tmp_path):
    before = made_up_run()
    rows.save(before, tmp_path / "folder" / "rows.jsonl")
    assert rows.load(tmp_path / "folder" / "rows.jsonl") == before
    lines = (tmp_path / "folder" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines[:3]] == ["machine", "notes", "copy"]


def test_the_table_shows_ratios_targets_and_what_is_missing():
    text = shown(report.show, made_up_run())
    assert "Training forward, float32, 1 thread" in text
    assert "32x256x56x56" in text
    assert "1.25x" in text
    assert "4.80x" in text
    assert "1.3 ✓" in text
    assert "0.85 ✗" in text
    assert "pip install jax" in text
    assert max(map(len, text.splitlines()[:20])) <= report.WIDTH


def test_the_summary_has_geometric_means_over_the_shapes():
    small, large = made_up(shape=(32, 64, 56, 56), ours=1.0, peer=2.0), made_up(ours=4.0, peer=32.0)
    text = shown(report.show, rows.Run({}, [*small, *large], []))
    summary = text[text.index("In short") :].splitlines()
    words = next(line for line in summary if "forward nchw float32, 1 thread" in line).split()
    assert words[-3:] == ["2", "2.00x", "4.00x"]


def test_verdicts_name_each_missed_cell():
    verdicts = {verdict.target: verdict for verdict in targets.verdicts(made_up_run().rows)}
    table = verdicts["ratio to a copy within the table's bounds"]
    assert not table.met
    assert "infer 32x256x56x56 nhwc, 1 thread: 1.25 > 0.85" in table.measured
    assert "backward" not in table.measured
    assert verdicts["no peer is faster"].met
    means = [verdict for target, verdict in verdicts.items() if target.startswith("torch reused over fastbn")]
    assert [verdict.measured for verdict in means] == ["4.80", "4.80"]
    assert all(verdict.met for verdict in means)


def test_a_faster_peer_is_named():
    verdicts = targets.verdicts(made_up(peer=1.0))
    verdict = next(verdict for verdict in verdicts if verdict.target == "no peer is faster")
    assert not verdict.met
    assert "torch reused in 1 of 1 rows, at best 0.80 of ours for forward 32x256x56x56 nchw" in verdict.measured


def test_small_calls_are_judged_against_their_peer():
    small = made_up("forward", "nc", (8, 64))
    fastbn = dataclasses.replace(small[1], over={"torch": 1.6})
    verdict = next(v for v in targets.verdicts([small[0], fastbn]) if v.target.startswith("forward 8x64"))
    assert not verdict.met
    assert verdict.measured == "0.62"


def test_two_threads_are_judged_where_a_copy_gains():
    one = made_up(threads=1)
    two = [dataclasses.replace(row, threads=2, seconds=row.seconds / 1.9) for row in one]
    slow = [dataclasses.replace(two[0]), dataclasses.replace(two[1], seconds=one[1].seconds / 1.2)]

    def verdict(measured):
        return next(v for v in targets.verdicts(measured) if v.target.startswith("two threads"))

    assert verdict(one + two).met
    assert not verdict(one + slow).met
    assert "1.20" in verdict(one + slow).measured
    unhelped = [dataclasses.replace(row, threads=2) for row in one]
    assert not any(v.target.startswith("two threads") for v in targets.verdicts(one + unhelped))


def operation_rows(dtype="float32", activation="none", shape=(32, 256, 56, 56), **against):
    """Made-up rows of that variant, one a pass."""
    return [
        dataclasses.replace(row, dtype=dtype, activation=activation, over={}, against=against)
        for pass_ in problem.PASSES
        for row in made_up(pass_, shape=shape)
        if row.kind != rows.PEER
    ]


def test_dtypes_and_activations_are_judged_against_their_bases():
    measured = [
        *operation_rows("float16", float32=0.6),
        *operation_rows("bfloat16", float32=0.7),
        *operation_rows("float16", "sigmoid", float32=0.6, unfused=1.4),
        *operation_rows("float32", "relu", unfused=1.2)[2:4],  # backward
        *operation_rows("float32", "silu", shape=(8, 64), unfused=9.0),
    ]
    verdicts = {verdict.target: verdict for verdict in targets.verdicts(measured)}
    assert set(verdicts) == {
        "float16 at most 0.65 of float32",
        "bfloat16 at most 0.65 of float32",
        "sigmoid at most 1.5 of unfused",
    }, "a small shape has no limit, nor has an activation's backward"
    met, missed, sigmoid = verdicts.values()
    assert met.met
    assert met.measured.startswith("6 of 6 rows; forward at most 0.60")
    assert not missed.met
    assert missed.measured.startswith("0 of 3 rows")
    assert "backward 32x256x56x56 nchw bfloat16, 1 thread: 0.70" in missed.measured
    assert sigmoid.met
    assert "backward at most 1.40 (no limit)" in sigmoid.measured
    assert sigmoid.measured.startswith("2 of 2 rows")


def test_the_table_has_a_column_for_each_base():
    table = operation_rows() + operation_rows(activation="relu", unfused=1.11)
    text = shown(report.show, rows.Run({}, table, []))
    assert "unfused" in text
    assert "1.11x" in text
    assert any("relu" in line and "1.11x" in line for line in text.splitlines())
    assert "dense" not in text.split("time: median")[0], "no column without a figure"


def test_compare_flags_a_regression_and_nothing_else():
    old = made_up_run(ours=1.25).rows
    new = made_up_run(ours=1.28).rows
    slower = [i for i, row in enumerate(new) if row.kind == rows.FASTBN][4]
    new[slower] = dataclasses.replace(new[slower], to_copy=1.6)
    changes = compare.changes(old, new)
    assert len(changes) == 18
    assert [change.new for change in changes if change.slower] == [new[slower]]
    text = shown(report.show_changes, changes)
    assert "1 of 18 rows slower" in text
    flagged = [line for line in text.splitlines() if line.rstrip().endswith("slower")]
    assert len(flagged) == 1
    assert "1.60x" in flagged[0]
    assert "No row" in shown(report.show_changes, [])


def test_pictures_are_drawn(tmp_path):
    both = made_up_run()
    both.rows.extend(made_up_run(threads=2).rows + made_up("forward", "nc", (256, 1024)))
    both.rows.extend(row for name in problem.ACTIVATIONS[1:] for row in operation_rows(activation=name, unfused=1.1))
    both.rows.extend(operation_rows("bfloat16", float32=0.6))
    written = plots.draw(both, tmp_path)
    assert [path.name for path in written] == ["bars.png", "roofline.png"]
    image = importlib.import_module("matplotlib.image")
    for path in written:
        pixels = image.imread(path)
        assert pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.05, "something is drawn"


# ---- the command


def bench(*arguments, folder: Path) -> int:
    return cli.main([*arguments, "--output", str(folder)])


def test_quick_run_saves_and_compares(tmp_path, capsys):
    quick = ("--quick", "--shapes", "8x64,2x8x3x3", "--peers", "numpy", "--backends", "numpy")
    assert bench(*quick, "--save", str(tmp_path / "old.jsonl"), folder=tmp_path) == 0
    saved = rows.load(tmp_path / "old.jsonl")
    assert {row.pass_ for row in saved.rows} == set(problem.PASSES)
    assert {row.contestant for row in saved.rows} == {"copy", "fastbn numpy", "NumPy naive", "NumPy careful"}
    assert all(row.agrees and row.seconds > 0 and row.to_copy > 0 for row in saved.rows)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "old.jsonl", "bars.png", "roofline.png"}
    assert bench("--compare", *[str(tmp_path / "old.jsonl")] * 2, folder=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "NumPy" in printed
    assert "0 of 9 rows slower by more than the spread" in printed


def variants_of(*arguments) -> list[str]:
    return list(map(str, cli._variants(cli._parser().parse_args(arguments))))


def test_torchs_layers_and_training(tmp_path, capsys):
    """The converted network trains to torch's losses, which are drawn."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    assert cli.main(["--torch", "--quick", "--output", str(tmp_path)]) == 0
    found = re.findall(r"converted at most (\S+) apart", capsys.readouterr().out)
    assert len(found) == 2
    assert all(float(apart) < 0.01 for apart in found)
    assert (tmp_path / "torch.png").stat().st_size > 10_000


def test_whole_models(capsys):
    """The converted ones give what the model gives in float64."""
    torch = pytest.importorskip("torch")
    models = importlib.import_module("fastbn.bench.torch_models")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    models.measure("small", model, torch.randn(2, 3, 16, 16), [1, 2], 2)
    printed = capsys.readouterr().out
    assert "small: 1 of 1 norms converted, 1 of them fused" in printed
    found = re.findall(r"(float\d+), .* (\S+) from float64", printed)
    assert len(found) == 12
    assert all(float(far) < (1e-12 if dtype == "float64" else 1e-4) for dtype, far in found)
    assert len(re.findall(r"\d threads, .*fused +\S+ ms +\S+x", printed)) == 4
    with pytest.raises(ValueError, match="model: got 'resnet50'; allowed: timm/ or torchvision/"):
        models.build("resnet50")


def test_variants_are_combined_or_of_the_operation_one_by_one():
    assert variants_of() == ["float32"]
    assert variants_of("--dtypes", "float16,float32", "--activations", "none,relu") == [
        "float16",
        "float16 relu",
        "float32",
        "float32 relu",
    ]
    assert len(variants_of("--dtypes", "all", "--activations", "all", "--strides", "all")) == 4 * 7 * 6
    assert len(variants_of("--operation")) == 4 + 6 + 5
    assert variants_of("--operation", "--dtypes", "float16", "--activations", "silu", "--strides", "dense") == [
        "float16",
        "float32 silu",
        "float32",
    ]


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    calls = []

    def interrupted(contestants, *_, **__):
        calls.append(len(contestants))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [timing.Samples({0: 1e-6}) for _ in contestants]

    monkeypatch.setattr(run, "race", interrupted)
    assert bench("--quick", "--shapes", "8x64", "--backends", "numpy", folder=tmp_path) == 0
    assert "interrupted" in capsys.readouterr().out
    assert len(rows.load(tmp_path / "rows.jsonl").rows) == 2


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--shapes", "nothing"), "resnet50"),
        (("--passes", "sideways"), "backward"),
        (("--layouts", "chwn"), "nhwc"),
        (("--dtypes", "int8"), "float32"),
        (("--activations", "gelu"), "hardswish"),
        (("--strides", "wide"), "cropped"),
        (("--threads", "0"), "positive"),
        (("--backends", "cuda"), "numpy"),
        (("--backends", "numpy", "--isa", "avx2"), "c backend"),
        (("--peers", "cudnn"), "onednn"),
        (("--batch", "0"), "positive"),
        (("--seconds", "0"), "more than 0"),
        (("--compare", "no-such-file", "nor-this"), "no-such-file"),
        (("--compare", "a", "b", "c"), "1 or 2"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(arguments, names, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        bench("--quick", *arguments, folder=tmp_path)
    assert refused.value.code == 2
    assert names in capsys.readouterr().err
