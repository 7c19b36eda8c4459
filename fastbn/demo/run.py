"""What does `fastbn demo` do? It trains, prints, draws, and keeps its figures.

    fastbn demo              # or python -m fastbn demo; needs pip install "fastbn[demo]"

Seeds are fixed. What varies with the machine are the times, and the last digits of NumPy's matrix products, which may
move single accuracies: a product is summed in an order that depends on the processor.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import numpy as np

from .._backends import get_num_threads
from ..call import checks
from .networks import KINDS, Array, executor, extra, load_data
from .plot import plot
from .precision import Precision, measure
from .report import CHANCE, FULL, QUICK, SMALL_BATCH, Comparison, Experiment, Plan, report


def figures(
    comparisons: list[Comparison], plan: Plan, small: tuple[Array, Array], precision: list[Precision]
) -> dict[str, Any]:
    """All that was found, as JSON takes it. Keys stay; new ones may come, and `schema` counts the changes of others.

    - schema: 1
    - chance: the accuracy of a guess. This and all other accuracies are in percent.
    - plan: seeds, rates, scales, small_batch_rates and the other fields of `Plan`
    - networks: "shallow", "deep" and "conv", each with checkpoints (steps), plain, same_rate and own_rate (rate,
      curves by seed and checkpoint, and, over the seeds, accuracy, steps_to_good, steps_to_plain and times_fewer as
      median, low and high), and without and with_norm (by_rate and by_scale, each by seed; largest_rate,
      gradient_norm, seconds_per_step)
    - small_batches: batch, rates, and without and with_norm by rate and seed
    - precision: for each offset, ulp (median), largest_ulp and seconds by formula: "one pass", "two passes", "fastbn"

    null is what is not finite: steps to what was never reached, and the error of a formula that gives no numbers.
    """
    networks = {}
    for kind, c in zip(KINDS, comparisons, strict=True):
        networks[kind] = {f.name: _plain(getattr(c, f.name)) for f in fields(c) if f.name != "kind"}
    without, with_norm = small
    by_rate = {"batch": SMALL_BATCH, "rates": plan.small_batch_rates, "without": without, "with_norm": with_norm}
    found = {
        "schema": 1,
        "chance": CHANCE,
        "plan": asdict(plan),
        "networks": networks,
        "small_batches": by_rate,
        "precision": [asdict(one) for one in precision],
    }
    return dict(_plain(found))


def _plain(value: Any) -> Any:
    """The same of lists, dicts and numbers alone; None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_file(name: str, path: str, ending: str) -> None:
    if not path.endswith(ending) or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"{name}: got {path!r}; allowed: a file name that ends in {ending}, in a folder that exists")


def run(plan: Plan, output: str, workers: int, keep: str | None = None) -> None:
    """Runs the plan in `workers` processes, prints the table and the conclusions, and writes picture and figures."""
    _check_file("output", output, ".png")
    if keep is not None:
        _check_file("keep", keep, ".json")
    extra("matplotlib.figure")
    rich = extra("rich.progress")
    console = extra("rich.console").Console()
    experiment = Experiment(plan, load_data())
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    with (
        rich.Progress(*columns, rich.TimeElapsedColumn(), console=console) as progress,
        executor(experiment.data, workers) as execute,
    ):
        for title, jobs in (("Learning rates", experiment.rate_jobs), ("Curves, weights", experiment.other_jobs)):
            wanted = jobs()
            task = progress.add_task(title, total=len(wanted))
            for job, found in execute(wanted):
                experiment.runs[job] = found
                progress.advance(task)
    comparisons = [experiment.comparison(kind) for kind in KINDS]
    precision = measure()
    small = experiment.small_batches_by_rate()
    report(comparisons, plan, experiment.small_batches(), precision, console)
    plot(comparisons, plan, small, precision, output)
    console.print(f"\nThe picture is in {output}. On another machine times differ, and single accuracies by a little.")
    if keep is not None:
        with open(keep, "w", encoding="utf-8") as file:
            json.dump(figures(comparisons, plan, small, precision), file, indent=1, allow_nan=False)
        console.print(f"The figures are in {keep}.")


def main(
    quick: bool = False, seeds: int | None = None, output: str = "fastbn-demo.png", keep: str | None = None
) -> None:
    """The command `fastbn demo`. Quick runs use one process, since they take less time than others need to start."""
    plan = QUICK if quick else FULL
    if seeds is not None:
        plan = replace(plan, seeds=checks.count("seeds", seeds))
    run(plan, output, 1 if quick else min(get_num_threads(), 8), keep)
