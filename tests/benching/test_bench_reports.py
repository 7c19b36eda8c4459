"""Does the bench report, compare, draw and answer as it says? On made-up rows; a few real runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from pathlib import Path

import pytest

import fastbn

pytest.importorskip("rich", reason='needs pip install "fastbn[bench]"')
pytest.importorskip("matplotlib", reason='needs pip install "fastbn[bench]"')
bench = importlib.import_module("fastbn.bench")
PARTS = ("cli", "compare", "options", "plots", "problem", "report", "rows", "runner", "summary", "targets", "timing")
cli, compare, options, plots, problem, report, rows, runner, summary, targets, timing = (
    importlib.import_module(f"fastbn.bench.{name}") for name in PARTS
)


def made_up(pass_="forward", layout="nchw", shape=(32, 256, 56, 56), threads=1, ours=1.25, peer=6.0, spread=0.05):
    """The rows of one race: a copy, fastbn and torch."""
    size = math.prod(shape) * 4
    common = {"pass_": pass_, "layout": layout, "dtype": "float32", "shape": shape, "threads": threads, "samples": 9}
    copy = size / 5e9

    def row(name, kind, ratio, **others):
        moved, others = 2 * size, {"copy": 1 / ratio, **others}
        times = {"seconds": ratio * copy, "spread": spread, "others": others, "gb_per_s": moved / (ratio * copy) / 1e9}
        return rows.Row(contestant=name, kind=kind, bytes_moved=moved, **times, **common)

    return [
        row("copy", rows.COPY, 1.0),
        row("fastbn c", rows.FASTBN, ours, **{"limit": 1 / ours, "torch reused": peer / ours}),
        row("torch reused", rows.PEER, peer),
        row("limit", rows.LIMIT, 1.0),
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
    assert json.loads(lines[0])["schema"] == rows.SCHEMA


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "old.jsonl").write_text('{"kind": "machine"}\n')
    with pytest.raises(ValueError, match=r"old.jsonl has no rows of fastbn bench: got rows of schema None; allowed: 1"):
        rows.load(tmp_path / "old.jsonl")


def test_the_table_shows_ratios_and_what_is_missing():
    text = shown(report.show, made_up_run())
    tables = text.split("Ratios are times over fastbn's in the same row")
    assert len(tables) == 1 + 3 + 1, "each table says so"
    assert "Training forward, float32, 1 thread" in text
    line = next(line for line in text.splitlines() if "32x256x56x56" in line)
    assert line.split()[-3:] == ["0.80x", "0.80x", "4.80x"], "limit, copy, torch: all are times over fastbn's"
    assert "pip install jax" in text
    assert "target" not in text
    assert "✗" not in text
    assert max(map(len, text.splitlines()[:20])) <= report.WIDTH


def test_noisy_rows_are_marked_and_compared_with_nothing():
    noisy, steady = made_up(spread=0.4), made_up(shape=(32, 64, 56, 56), ours=2.0, peer=6.0)
    text = shown(report.show, rows.Run({}, [*noisy, *steady], []))
    line = next(line for line in text.splitlines() if "32x256x56x56" in line)
    assert "~40%" in line
    assert line.split()[-3:] == ["~", "~", "~"]
    assert "1 of 2 rows of fastbn are too noisy" in text
    summary_line = next(
        line for line in text.splitlines() if line.lstrip().startswith("training forward, channels-first")
    )
    assert summary_line.split()[-7:] == ["2", "0.50x", "(1)", "0.50x", "(1)", "3.00x", "(1)"]


def test_targets_are_for_developers():
    text = shown(report.show, made_up_run(), True)
    assert "1.25 of 1.25 ✓" in text, "forward, channels-last"
    assert "1.25 of 1.15 ✗" in text, "forward, channels-first"
    assert "1.25 of 1.6 ✓" in text, "small planes"


def test_the_summary_has_geometric_means_over_the_shapes():
    small, large = made_up(shape=(32, 64, 56, 56), ours=1.0, peer=2.0), made_up(ours=4.0, peer=32.0)
    text = shown(report.show, rows.Run({}, [*small, *large], []))
    summary = text[text.index("In short") :].splitlines()
    words = next(line for line in summary if "forward, channels-first, float32, 1 thread" in line).split()
    assert words[-4:] == ["2", "0.50x", "0.50x", "4.00x"]


def test_a_page_names_the_processor_and_the_command():
    run = made_up_run()
    run.machine.update({"system": "Linux", "date": "2026-11-28", "torch": "2.13"})
    run.machine["command"] = "fastbn bench --shapes resnet50"
    text = summary.page(run)
    assert text.startswith("# Batch norm on A processor\n")
    assert "By `fastbn bench --shapes resnet50`, on Linux, 2026-11-28." in text
    assert "| training forward, channels-last, float32, 1 thread | 0.80 | 0.80 | 4.8 |" in text
    assert "- torch: 2.13" in text
    assert "- date" not in text


def choices(**times):
    """Made-up rows of one array, by backend, threads and result."""
    common = made_up()[1]
    for name, (seconds, spread) in times.items():
        backend, threads, result = name.split("_")
        yield dataclasses.replace(
            common, contestant=f"fastbn {backend}", threads=int(threads), result=result, seconds=seconds, spread=spread
        )


def test_what_is_fastest_is_named_and_by_how_much():
    found = list(
        choices(c_1_out=(2e-3, 0.05), c_2_out=(1e-3, 0.05), c_2_fresh=(3e-3, 0.05), numba_2_out=(1.02e-3, 0.05),
                numba_2_fresh=(1.01e-3, 0.05), numba_1_out=(5e-3, 0.5), c_1_fresh=(4e-3, 0.05))
    )  # fmt: skip
    text = shown(report.show, rows.Run({}, found, []))
    assert "Fastest for 32x256x56x56 nchw float32" in text
    answer = next(line for line in text.splitlines() if line.startswith("  forward: "))
    assert (
        answer
        == "  forward: c, 2 threads, out=, 1 ms. With one change: numba ≈1.02x, 1 thread 2.00x, a fresh result 3.00x"
    )
    alone = shown(report.show, rows.Run({}, made_up()[:2], []))
    assert "Fastest" not in alone, "there was no choice"
    quick, slow = (dataclasses.replace(made_up()[2], threads=n, seconds=s) for n, s in ((1, 0.8e-3), (2, 0.9e-3)))
    peers = shown(report.show, rows.Run({}, [*found, quick, slow], []))
    assert f"{answer}. The fastest peer: torch reused, 1 thread 0.80x" in peers
    quick = dataclasses.replace(quick, spread=0.5)
    peers = shown(report.show, rows.Run({}, [*found, quick, slow], []))
    assert f"{answer}. The fastest peer: torch reused, 1 thread ~\n" in peers, "no other peer stands in for it"
    found[1] = dataclasses.replace(found[1], spread=0.5)
    noisy = shown(report.show, rows.Run({}, found, []))
    assert "forward: too noisy to say" in noisy


def test_no_row_stands_in_for_a_noisy_one(monkeypatch):
    """The one change is "fresh", not the reference on one thread that also is fresh, and quiet."""
    found = list(
        choices(c_1_out=(35e-6, 0.05), c_1_fresh=(58e-6, 0.5), c_1_inplace=(37e-6, 0.05), c_2_out=(28e-3, 0.9),
                numpy_2_fresh=(1.3e-3, 0.05), numpy_1_out=(1.2e-3, 0.05))
    )  # fmt: skip
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    text = shown(report.show, rows.Run({}, found, []))
    assert "forward: c, 1 thread, out=, 35 us. With one change: in place 1.06x, numpy 34.3x, a fresh result ~," in text
    assert "2 threads ~\n" in text
    assert "37.1x" not in text
    assert "2 of 6 rows of fastbn are too noisy to compare" in text
    assert "OMP_WAIT_POLICY=passive" in text
    assert "OMP_WAIT_POLICY" not in shown(report.show, rows.Run({}, [found[0], found[1]], []))


def test_noisy_rows_meet_no_target():
    noisy = made_up(peer=1.0, spread=0.5)
    assert not targets.verdicts(noisy), "neither within the bounds, nor without a faster peer"
    assert "✗" not in shown(report.show, rows.Run({}, noisy, []), True)


def test_the_operation_is_in_words():
    found = list(choices(c_1_out=(2e-3, 0.05), c_1_fresh=(1e-3, 0.05)))
    found.append(dataclasses.replace(found[0], activation="relu", mask=True, strides="cropped"))
    text = shown(report.show, rows.Run({}, found, []))
    cells = [re.split(r"  +", line.strip()) for line in text.splitlines() if "x56x56 nchw" in line and "ms" in line]
    words = [" ".join(row).split("nchw ")[1] for row in cells]
    assert [word.split(" 2 ms")[0].split(" 1 ms")[0] for word in words] == [
        "out=",
        "a fresh result",
        "relu, cropped, out=, mask",
    ]
    one = shown(report.show, rows.Run({}, [found[0], found[2]], []))
    assert "plain" in one


@pytest.mark.parametrize(
    ("races", "seconds", "text"),
    [
        (1, 2.0, "One race, timed for about 2 s; arrays, checks and slow calls come on top."),
        (3, 0.05, "3 races, timed for about 50 ms each, 150 ms in all; arrays, checks and slow calls come on top."),
        (36, 2.0, "36 races, timed for about 2 s each, 1 min 12 s in all; arrays, checks and slow calls come on top."),
        (
            3600,
            2.0,
            "3600 races, timed for about 2 s each, 2 h 0 min in all; arrays, checks and slow calls come on top.",
        ),
    ],
)
def test_a_run_says_beforehand_how_long_it_takes(races, seconds, text):
    assert report.beforehand(races, seconds) == text


def test_verdicts_name_each_missed_cell():
    verdicts = {verdict.target: verdict for verdict in targets.verdicts(made_up_run().rows)}
    table = verdicts["time over the limit within the table's bounds"]
    assert not table.met
    assert "infer 32x256x56x56 nhwc, 1 thread: 1.25 > 1.1" in table.measured
    assert "backward 32x256x56x56 nhwc, 1 thread: 1.25 > 1.2" in table.measured
    assert "forward 32x256x56x56 nhwc" not in table.measured, "1.25 is allowed"
    assert "7x7" not in table.measured
    assert verdicts["no peer is faster"].met
    means = [verdict for target, verdict in verdicts.items() if target.startswith("torch reused over fastbn")]
    assert [verdict.measured for verdict in means] == ["4.80 of 6 rows"] * 3
    assert all(verdict.met for verdict in means)


def test_a_faster_peer_is_named():
    verdicts = targets.verdicts(made_up(peer=1.0))
    verdict = next(verdict for verdict in verdicts if verdict.target == "no peer is faster")
    assert not verdict.met
    words = "torch reused in 1 of 1 rows that are not noisy, at best 0.80x"
    assert f"{words} for forward 32x256x56x56 nchw" in verdict.measured
    text = shown(report.show, rows.Run({}, made_up(peer=1.0), []))
    assert f"a peer is faster: {words}" in text
    assert "a peer is faster" not in shown(report.show, rows.Run({}, made_up(peer=1.0, spread=0.5), []))


def test_small_calls_are_judged_against_their_peer():
    small = made_up("forward", "nc", (8, 64))
    fastbn = dataclasses.replace(small[1], others={"copy": 1.0, "torch": 1.6})
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
        dataclasses.replace(
            row,
            dtype=dtype,
            activation=activation,
            others={
                "copy": row.others["copy"],
                **({name: 1 / ratio for name, ratio in against.items()} if row.kind == rows.FASTBN else {}),
            },
        )
        for pass_ in problem.PASSES
        for row in made_up(pass_, shape=shape)
        if row.kind in (rows.COPY, rows.FASTBN)
    ]


def test_dtypes_and_activations_are_judged_against_their_bases():
    measured = [
        *operation_rows("float16", float32=0.6),
        *operation_rows("bfloat16", float32=0.7),
        *operation_rows("float16", "sigmoid", float32=0.6, unfused=1.4),
        *operation_rows("float64", float32=2.1),
        *operation_rows("float32", "relu", unfused=1.06)[2:4],  # backward
        *operation_rows("float32", "hardswish", unfused=1.25),
        *operation_rows("float32", "silu", shape=(8, 64), unfused=9.0),
    ]
    verdicts = {verdict.target: verdict for verdict in targets.verdicts(measured)}
    assert {target: verdict.met for target, verdict in verdicts.items()} == {
        "float16 at most 0.65 of float32": True,
        "bfloat16 at most 0.65 of float32": False,
        "float64 at most 2.2 of float32": True,
        "relu at most 1.05 of unfused": False,
        "sigmoid at most 1.5 of unfused": True,
        "hardswish at most 1.3 of unfused": True,
    }, "a small shape has no limit"
    met, missed, *_ = verdicts.values()
    assert met.measured.startswith("6 of 6 rows; forward at most 0.60")
    assert missed.measured.startswith("0 of 3 rows")
    assert "backward 32x256x56x56 nchw bfloat16, 1 thread: 0.70" in missed.measured


@pytest.mark.parametrize(
    ("shape", "bounds"),
    [
        ((32, 512, 28, 28), (1.15, 1.15, 1.1)),
        ((32, 2048, 7, 7), (1.6, 1.6, 1.4)),
        ((4096, 64), (2.0, 2.0, 1.5)),
        ((64, 4096), (2.0, 2.0, 1.5)),
        ((1, 1, 512, 512), (2.0, 2.0, 1.5)),
        ((4095, 64), None),  # fewer than 2**18 values
        ((63, 4096, 1, 1), None),  # fewer than 64 values a channel
        ((64, 4097), None),  # more than 4096 channels
    ],
)
def test_large_shapes_have_bounds(shape, bounds):
    """Where the limit was timed, and for the C backend's plain calls alone."""
    rows = [made_up(pass_, shape=shape)[1] for pass_ in problem.PASSES]
    assert [targets.bound(row) for row in rows] == list(bounds or [None] * 3)
    for other in ({"others": {"copy": 1.0}}, {"contestant": "fastbn numba"}, {"activation": "relu"}):
        assert targets.bound(dataclasses.replace(rows[0], **other)) is None


def test_a_noisy_limit_judges_nothing():
    measured = made_up()
    measured[-1] = dataclasses.replace(measured[-1], spread=0.5)
    assert [verdict.target for verdict in targets.verdicts(measured) if "over the limit" in verdict.target] == []
    assert "✗" not in shown(report.show, rows.Run({}, measured, []), True)


def test_the_table_has_a_column_for_each_base():
    table = operation_rows() + operation_rows(activation="relu", unfused=1.11)
    text = shown(report.show, rows.Run({}, table, []))
    assert "unfused" in text
    assert any("relu" in line and line.split()[-1] == "0.90x" for line in text.splitlines())
    assert "dense" not in text.split("time: median")[0], "no column without a figure"


def test_compare_flags_a_regression_and_nothing_else():
    old = made_up_run(ours=1.25).rows
    new = made_up_run(ours=1.28).rows
    slower = [i for i, row in enumerate(new) if row.kind == rows.FASTBN][4]
    new[slower] = dataclasses.replace(new[slower], others={"copy": 1 / 1.6})
    changes = compare.changes(old, new)
    assert len(changes) == 18
    assert [change.new for change in changes if change.verdict != "equal"] == [new[slower]]
    text = shown(report.show_changes, changes)
    assert "Of 18 rows: 17 equal, 1 slower." in text
    flagged = [line for line in text.splitlines() if line.rstrip().endswith("slower")]
    assert len(flagged) == 1
    assert "1.28x" in flagged[0]
    assert "No row" in shown(report.show_changes, [])


def test_compare_says_what_can_be_said():
    old, noisy = made_up(), made_up(spread=0.4)
    found = {
        "equal": (noisy, noisy),
        "noisy": (old, noisy),
        "faster": (old, made_up(ours=1.0)),
        "slower": (old, made_up(ours=1.5)),
    }
    assert {verdict: compare.changes(*both)[0].verdict for verdict, both in found.items()} == {
        one: one for one in found
    }
    beside = [dataclasses.replace(old[0], spread=0.4), *made_up(ours=1.5)[1:]]
    assert compare.changes(old, beside)[0].verdict == "noisy", "the ratio is to a copy that is noisy"
    text = shown(report.show_changes, compare.changes(made_up_run().rows, made_up_run().rows))
    assert text.strip() == "Of 18 rows: 18 equal."


def test_pictures_are_drawn(tmp_path):
    both = made_up_run()
    both.rows.extend(made_up_run(threads=2).rows + made_up("forward", "nc", (256, 1024)))
    both.rows.extend(row for name in problem.ACTIVATIONS[1:] for row in operation_rows(activation=name, unfused=1.1))
    both.rows.extend(operation_rows("bfloat16", float32=0.6))
    written = plots.draw(both, tmp_path)
    assert [path.name for path in written] == ["bars.png", "roofline.png"]
    one = [*choices(c_1_out=(2e-3, 0.05), c_2_out=(1e-3, 0.05), c_2_fresh=(3e-3, 0.5)), *made_up()]
    written += plots.draw(rows.Run({"processor": "A processor"}, one, []), tmp_path / "one")
    assert [path.name for path in written[2:]] == ["bars.png"], "one size is no axis"
    others = {"float64": 2, "float16": 0.5}
    one += [dataclasses.replace(row, dtype=dtype, bytes_moved=int(row.bytes_moved * times))
            for row in made_up() for dtype, times in others.items()]  # fmt: skip
    written += plots.draw(rows.Run({"processor": "A processor"}, one, []), tmp_path / "three")
    assert [path.name for path in written[3:]] == ["bars.png"], "nor is one of each dtype"
    image = importlib.import_module("matplotlib.image")
    for path in written:
        pixels = image.imread(path)
        assert pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.05, "something is drawn"


def test_operations_are_drawn_over_the_plain_call():
    """Beside other contestants of the same operation, over fastbn's first row, as all others are."""
    relu = operation_rows(activation="relu", unfused=1.3)[:2]
    (alone,) = (bar for bar in plots._bars_of(relu, alone=False) if bar.contestant == "fastbn c")
    assert alone.value == pytest.approx(1.3)
    numba = dataclasses.replace(relu[1], contestant="fastbn numba", others={"copy": 1 / 2.5, "unfused": 1 / 1.2})
    beside = {bar.contestant: bar.value for bar in plots._bars_of([*relu, numba], alone=False)}
    assert beside == pytest.approx({"copy": 0.8, "fastbn c": 1.0, "fastbn numba": 2.0})
    (half,) = (b for b in plots._bars_of(operation_rows("float16", float32=0.6)[:2], alone=False) if b.name != "copy")
    assert half.value == 1


# ---- the command


def command(*arguments, folder: Path) -> int:
    return cli.main([*arguments, "--output", str(folder)])


def test_quick_run_saves_and_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    quick = ("--quick", "--shapes", "8x64,2x8x3x3", "--peers", "numpy", "--backends", "numpy", "--results", "out")
    quick += ("--threads", "1", "--layouts", "NCHW,nhwc")
    assert command(*quick, "--save", str(tmp_path / "old.jsonl"), folder=tmp_path) == 0
    saved = rows.load(tmp_path / "old.jsonl")
    assert saved.machine["command"].startswith("OMP_WAIT_POLICY=passive fastbn bench --quick --shapes 8x64,")
    assert {row.pass_ for row in saved.rows} == set(problem.PASSES)
    assert {row.contestant for row in saved.rows} == {"copy", "fastbn numpy", "NumPy naive", "NumPy careful"}
    assert all(row.agrees and row.seconds > 0 and row.to_copy > 0 for row in saved.rows)
    (dated,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", dated.name)
    assert {path.name for path in dated.iterdir()} == {"rows.jsonl", "bars.png"}
    assert rows.load(dated / "rows.jsonl") == saved
    assert command("--compare", *[str(tmp_path / "old.jsonl")] * 2, folder=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "NumPy" in printed
    assert "Of 9 rows: 9 equal." in printed


def variants_of(*arguments) -> list[str]:
    given = cli.options_of(cli._parser().parse_args(arguments))
    return list(map(str, options.variants(given, given.results or "out")))


def test_torchs_layers_and_training(tmp_path, capsys):
    """The converted network trains to torch's losses, which are drawn."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    assert cli.main(["--torch", "--quick", "--output", str(tmp_path)]) == 0
    found = re.findall(r"converted at most (\S+) apart", capsys.readouterr().out)
    assert len(found) == 2
    assert all(float(apart) < 0.01 for apart in found)
    (picture,) = tmp_path.glob("*/torch.png")
    assert picture.stat().st_size > 10_000


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
    assert variants_of("--results", "all", "--mask") == ["float32 mask", "float32 fresh mask", "float32 inplace mask"]
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

    monkeypatch.setattr(runner, "race", interrupted)
    assert command("--quick", "--shapes", "8x64", "--backends", "numpy", "--threads", "1", folder=tmp_path) == 0
    assert "interrupted" in capsys.readouterr().out
    (saved,) = tmp_path.glob("*/rows.jsonl")
    assert len(rows.load(saved).rows) == 2


def test_shapes_by_size_ask_for_all_settings_and_sets_do_not():
    asked = options.plan(options.Options(shapes="8x64", layouts="NHWC"))
    assert {variant.result for variant in asked.variants} == set(problem.RESULTS)
    assert len(asked.entrants) == len([name for name in fastbn.backends() if name != "numpy"])
    assert asked.threads == tuple(dict.fromkeys((1, fastbn.get_num_threads())))
    usual = options.plan(options.Options(shapes="latency"))
    assert ({variant.result for variant in usual.variants}, list(usual.threads)) == ({"out"}, [1])
    assert list(usual.entrants) == ["fastbn c"]


def test_no_file_is_missed_after_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("nothing is run"))
    (tmp_path / "text").write_text("no rows")
    for arguments, names in (
        (("--compare", "no-such-file"), "got no-such-file, which is no file"),
        (("--compare", str(tmp_path / "text")), "text has no rows of fastbn bench"),
        (("--save", str(tmp_path)), "which is a folder; allowed: a file"),
        (("--table", str(tmp_path)), "which is a folder; allowed: a file"),
        (("--save", str(tmp_path / "text" / "rows.jsonl")), "text"),
    ):
        with pytest.raises(SystemExit):
            command(*arguments, folder=tmp_path)
        assert names in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--shapes", "nothing"), "resnet50"),
        (("--passes", "sideways"), "backward"),
        (("--layouts", "chwn"), "nhwc"),
        (("--layouts", "nhcw"), "did you mean"),
        (("--results", "elsewhere"), "inplace"),
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
        command("--quick", *arguments, folder=tmp_path)
    assert refused.value.code == 2
    assert names in capsys.readouterr().err
