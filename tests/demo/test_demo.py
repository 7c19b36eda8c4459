"""Are the demo's networks right, do its numbers come from its runs, and does it say what they show?"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import fastbn
from fastbn import cli
from fastbn.demo import networks, plot, precision, report, run
from fastbn.demo.networks import KINDS, Conv, Data, Dense, Job, build, cross_entropy, perform

TINY = report.Plan(2, 0.05, (0.1, 1.0), (1.0, 3.0), (0.003,), 8)


def slope(value, array, direction, step=1e-5):
    """The derivative of value() along a direction of an array that it depends on."""
    start = array.copy()
    array[...] = start + step * direction
    above = value()
    array[...] = start - step * direction
    below = value()
    array[...] = start
    return (above - below) / (2 * step)


def check_slopes(value, arrays, gradients, rng):
    for array, gradient in zip(arrays, gradients, strict=True):
        assert array.shape == gradient.shape
        noise = rng.standard_normal(array.shape)
        direction = gradient / np.linalg.norm(gradient) + noise / np.linalg.norm(noise)
        np.testing.assert_allclose((gradient * direction).sum(), slope(value, array, direction), rtol=1e-5)


def conv_by_loops(x, weight, bias, stride):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    y = np.empty((len(x), len(rows), len(columns), weight.shape[1]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            y[:, i, j] = padded[:, row : row + 3, column : column + 3].reshape(len(x), -1) @ weight + bias
    return y


@pytest.mark.parametrize("bias", [True, False])
def test_dense_has_the_gradient_of_its_output(bias):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((5, 4)), rng.standard_normal((5, 3))
    layer = Dense(rng.standard_normal((4, 3)), bias)
    layer(x)
    dx = layer.backward(dy)
    arrays, gradients = [x, *layer.parameters().values()], [dx, *layer.gradients().values()]
    assert len(arrays) == 2 + bias
    check_slopes(lambda: (layer(x) * dy).sum(), arrays, gradients, rng)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_conv_is_a_convolution_with_its_gradient(stride, size):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, *size, 3))
    layer = Conv(rng.standard_normal((27, 4)), True, stride)
    layer.parameters()["bias"][...] = rng.standard_normal(4)
    expected = conv_by_loops(x, *layer.parameters().values(), stride)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-12)
    dy = rng.standard_normal(expected.shape)
    dx = layer.backward(dy)
    arrays, gradients = [x, *layer.parameters().values()], [dx, *layer.gradients().values()]
    check_slopes(lambda: (layer(x) * dy).sum(), arrays, gradients, rng)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_network_has_the_gradient_of_its_loss(kind, norm):
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((32, 64)), rng.integers(0, 10, 32)
    network = build(kind, norm, dtype="float64")
    network.backward(cross_entropy(network(x), labels)[1])
    gradients = [gradient.copy() for gradient in network.gradients()]
    check_slopes(lambda: cross_entropy(network(x), labels)[0], network.parameters(), gradients, rng)


def test_the_pair_of_networks_differs_in_batch_norm_alone():
    for kind in KINDS:
        plain, norm = build(kind, False), build(kind, True)
        weights = [[p for p in network.parameters() if p.ndim == 2] for network in (plain, norm)]
        for a, b in zip(*weights, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def data() -> Data:
    pytest.importorskip("sklearn", reason='needs pip install "fastbn[demo]"')
    return networks.load_data()


def test_the_parts_of_the_data_are_apart(data):
    images = np.concatenate([part[0] for part in (data.train, data.validation, data.test)])
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [1024, 273, 500]
    assert len(np.unique(images, axis=0)) == len(images)


def test_a_run_depends_on_its_seed_and_on_nothing_else(data):
    job = Job("shallow", True, 0.1, 12)
    run, again, other = perform(job, data), perform(job, data), perform(replace(job, seed=1), data)
    np.testing.assert_array_equal(run.curve, again.curve)
    assert run.gradient_norm == again.gradient_norm
    assert run.gradient_norm != other.gradient_norm
    assert not np.array_equal(run.curve, other.curve)


def test_training_learns_and_a_run_that_diverges_ends_at_chance(data):
    assert perform(Job("shallow", True, 0.1, 60), data).curve[-1] > 0.9
    diverged = perform(Job("shallow", False, 1e20, 60), data)
    assert diverged.curve.shape == perform(Job("shallow", False, 0.1, 60), data).curve.shape
    assert diverged.curve[-1] < 0.2


def test_two_processes_give_what_one_gives(data):
    jobs = [Job("shallow", norm, 0.1, 5, seed=seed) for norm in (False, True) for seed in (0, 1)]
    found = []
    for workers in (1, 2):
        with networks.executor(data, workers) as execute:
            found.append(dict(execute(jobs)))
    assert found[0].keys() == found[1].keys() == set(jobs)
    for job in jobs:
        np.testing.assert_array_equal(found[0][job].curve, found[1][job].curve)


@pytest.fixture(scope="module")
def comparison(data):
    experiment = report.Experiment(TINY, data)
    with networks.executor(data, 1) as execute:
        for jobs in (experiment.rate_jobs, experiment.other_jobs):
            experiment.runs.update(execute(jobs()))
    return experiment.comparison("shallow")


def test_the_comparison_is_read_off_the_runs(comparison):
    plain, own = comparison.plain, comparison.own_rate
    for seed, target in enumerate(plain.curves[:, -1]):
        first = comparison.checkpoints[np.flatnonzero(plain.curves[seed] >= target)[0]]
        assert plain.steps_to_plain.low <= first <= plain.steps_to_plain.high
    assert own.accuracy.low == own.curves[:, -1].min()
    assert own.accuracy.high == own.curves[:, -1].max()
    assert plain.times_fewer == report.Spread(1.0, 1.0, 1.0)
    assert comparison.without.gradient_norm.low < comparison.without.gradient_norm.high
    assert comparison.without.seconds_per_step > 0


def test_targets_that_are_not_reached_are_reported_so():
    steps = report._first_reached([3, 5, 9], np.array([[10.0, 60, 50], [10, 20, 30]]), np.array([55.0, 55]))
    assert steps.tolist() == [5, np.inf]
    assert report.Spread.of(steps).text(report._steps_text) == "5 (5-never)"


def told(lines) -> str:
    return "\n".join(lines)


def test_the_sentences_follow_the_numbers(comparison):
    spread = report.Spread

    def with_numbers(plain, own, fewer):
        return replace(
            comparison,
            plain=replace(comparison.plain, rate=0.1, accuracy=plain),
            own_rate=replace(comparison.own_rate, rate=1.0, accuracy=own, times_fewer=fewer),
            with_norm=replace(comparison.with_norm, seconds_per_step=2.0),
            without=replace(comparison.without, seconds_per_step=1.0, by_rate=np.full((2, 2), plain.median)),
        )

    small = spread(90, 90, 90), spread(80, 80, 80)
    better = with_numbers(spread(90, 89, 91), spread(97, 96, 98), spread(8, 7, 9))
    assert "8.0 times fewer at" in told(report.effects([better]))
    assert "8.0 times fewer of them, 4.0 times faster by the clock" in told(report.limits([better], TINY, small))
    assert "at the end" not in told(report.limits([better], TINY, small))
    worse = with_numbers(spread(97, 96, 98), spread(96, 95, 97), spread(0.5, 0.4, 0.6))
    assert "2.0 times more at" in told(report.effects([worse]))
    assert "no gain" in told(report.limits([worse], TINY, small))
    assert "no faster by the clock" in told(report.limits([worse], TINY, small))
    alike = replace(better, plain=replace(better.plain, rate=1.0))
    assert "whose best learning rate is the same" in told(report.effects([alike]))
    slower = replace(better, same_rate=replace(better.same_rate, times_fewer=spread(0.5, 0.4, 0.6)))
    assert "at plain's learning rate: 2.0 times more" in told(report.limits([slower], TINY, small))
    lost = with_numbers(spread(97, 96, 98), spread(90, 90, 91), spread(0, 0, 0))
    assert "not reached at" in told(report.effects([lost]))
    chance = with_numbers(spread(10, 9, 11), spread(97, 96, 98), spread(1, 1, 1))
    assert "stays at chance (10 %)" in told(report.effects([chance]))
    guess = with_numbers(spread(8, 8, 8), spread(97, 96, 98), spread(1, 1, 1))
    assert "stays at chance (10 %)" in told(report.effects([guess]))
    assert "times fewer" not in told(report.effects([chance])).split("Published")[0]
    assert "does harm" in told(report.limits([better], TINY, small))
    assert "no harm" in told(report.limits([better], TINY, small[::-1]))


def test_the_demo_prints_its_table_and_draws_its_picture(tmp_path, capsys, monkeypatch):
    for module in ("sklearn", "rich", "threadpoolctl"):
        pytest.importorskip(module, reason='needs pip install "fastbn[demo]"')
    image = pytest.importorskip("matplotlib.image", reason='needs pip install "fastbn[demo]"')
    colors = pytest.importorskip("matplotlib.colors")
    path, kept = tmp_path / "curves.png", tmp_path / "figures.json"
    monkeypatch.setattr(run, "QUICK", TINY)
    with fastbn.use_num_threads(1):
        assert cli.main(["demo", "--quick", "--seeds", "1", "--output", str(path), "--keep", str(kept)]) == 0
    printed = capsys.readouterr().out
    for kind in KINDS.values():
        assert kind.title in printed
    assert "seeds: 1," in printed
    for words in (
        "test accuracy",
        "times fewer",
        "microseconds",
        "Where it did not help",
        "Batches of 2",
        "Mean 1e+06: ",
    ):
        assert words in printed
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1000
    for colour in (plot.COLOURS[name] for name in ("plain", "own", "two passes", "fastbn")):
        assert (np.abs(pixels - colors.to_rgb(colour)).max(axis=2) < 0.02).sum() > 500

    check_figures(json.loads(kept.read_text(encoding="utf-8")))


def check_figures(found):
    """The keys that are documented, and numbers of these runs."""
    assert list(found) == ["schema", "chance", "plan", "networks", "small_batches", "precision"]
    assert (found["schema"], found["chance"], found["plan"]["seeds"]) == (1, 10.0, 1)
    assert list(found["networks"]) == list(KINDS)
    for network in found["networks"].values():
        assert {"checkpoints", "plain", "same_rate", "own_rate", "without", "with_norm"} == network.keys()
        for side in ("plain", "same_rate", "own_rate"):
            (curve,) = network[side]["curves"]
            assert len(curve) == len(network["checkpoints"])
            assert network[side]["accuracy"] == dict.fromkeys(("median", "low", "high"), curve[-1])
        for variant in ("without", "with_norm"):
            assert len(network[variant]["by_rate"]) == len(TINY.rates)
            assert len(network[variant]["by_scale"]) == len(TINY.scales)
            assert network[variant]["seconds_per_step"] > 0
    small = found["small_batches"]
    assert (small["batch"], small["rates"]) == (2, list(TINY.small_batch_rates))
    assert 0 <= small["without"][0][0] <= 100
    assert 0 <= small["with_norm"][0][0] <= 100
    assert [one["offset"] for one in found["precision"]] == list(precision.OFFSETS)
    for one in found["precision"]:
        assert one["ulp"].keys() == one["largest_ulp"].keys() == one["seconds"].keys() == precision.METHODS.keys()


def test_errors_are_those_of_the_formulas():
    """Right to the last place at each mean with fastbn; the others lose more the farther it is from zero."""
    found = precision.measure(turns=1)
    for one in found:
        assert one.ulp["fastbn"] < 0.5
        assert one.largest_ulp["fastbn"] < 2.5
        assert one.ulp["fastbn"] <= min(one.ulp.values())
        assert all(seconds > 0 for seconds in one.seconds.values())
    for name in ("one pass", "two passes"):
        assert all(one.ulp[name] > 1000 for one in found[1:])
    exact = np.array([1.0, -2.0, 0.0])
    y = np.array([1.0, -2.0, 0.0], np.float32)
    assert precision._ulps(y, exact) == (0, 0)
    y[1] = np.nextafter(y[1], np.float32(-3))
    assert precision._ulps(y, exact) == (0, 1)
    y[0] = np.nan
    assert precision._ulps(y, exact) == (np.inf, np.inf)


@pytest.mark.parametrize("keep", ["figures.txt", "no/such/folder/figures.json"])
def test_figures_that_cannot_be_kept_are_refused_before_the_runs(keep, tmp_path):
    with pytest.raises(ValueError, match="keep"):
        run.run(TINY, str(tmp_path / "curves.png"), workers=1, keep=keep)


@pytest.mark.parametrize("module", ["matplotlib.figure", "rich.progress", "rich.console", "sklearn.datasets"])
def test_a_missing_extra_is_named(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "fastbn\[demo\]"'):
        run.run(TINY, str(tmp_path / "curves.png"), workers=1)


@pytest.mark.parametrize("output", ["curves.jpg", "no/such/folder/curves.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_the_runs(output):
    with pytest.raises(ValueError, match="output"):
        run.run(TINY, output, workers=1)
