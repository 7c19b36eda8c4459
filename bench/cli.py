"""Which arguments does `fastbn bench` take, and what does it do with them?"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product, starmap
from pathlib import Path

from . import compare, ours, plots, ranks, report, rivals, rows, shapes
from .problem import ACTIVATIONS, DTYPES, LAYOUTS, PASSES, STRIDES, Variant
from .run import Plan, Runner
from .timing import Budget

QUICK_SHAPES = "8x64,2x32x14x14"
QUICK_BUDGET = Budget(seconds=0.05, least=3)


def _words(option: str, allowed: Sequence[str], text: str) -> tuple[str, ...]:
    words = tuple(allowed) if text == "all" else tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    unknown = [word for word in words if word not in allowed]
    if unknown:
        raise ValueError(f"{option}: got {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{option}: got {text!r}; allowed: positive integers such as 1,{os.cpu_count()}")
    return tuple(dict.fromkeys(map(int, words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastbn bench", description="Times fastbn, its installed peers and a plain copy, side by side."
    )
    add = parser.add_argument
    add("--shapes", metavar="LIST", help=f"of {', '.join(shapes.NAMES)}, and sizes such as 32x64x56x56 (targets)")
    add("--batch", type=int, metavar="N", help="the batch of the networks' shapes (32; unet3d 1)")
    add("--passes", default=",".join(PASSES), metavar="LIST", help="%(default)s")
    add("--layouts", default=",".join(LAYOUTS), metavar="LIST", help="%(default)s; a matrix has only one")
    add("--dtypes", metavar="LIST", help=f"all, or of {', '.join(DTYPES)} (float32)")
    add("--activations", metavar="LIST", help=f"all, or of {', '.join(ACTIVATIONS)} (none)")
    add("--strides", metavar="LIST", help=f"all, or of {', '.join(STRIDES)} (dense)")
    add(
        "--operation",
        action="store_true",
        help="all dtypes, activations and strides, one at a time, not combined, on shapes larger than any cache",
    )
    add("--backends", default="c", metavar="LIST", help="all, or of c, numba, numpy (%(default)s)")
    add("--isa", default="", metavar="LIST", help="all, or instruction sets for the c backend (the one it chooses)")
    add("--threads", default="1", metavar="LIST", help="numbers of threads (%(default)s)")
    add(
        "--peers",
        nargs="?",
        const="all",
        default="",
        metavar="LIST",
        help=f"time peers, too: all that are installed, or of {', '.join(rivals.ENTRIES)}",
    )
    add("--seconds", type=float, metavar="S", help="about how long each race lasts (2)")
    add("--quick", action="store_true", help="a few seconds on tiny shapes, to see whether it runs")
    add("--output", type=Path, default=Path("bench-results"), metavar="FOLDER", help="(%(default)s)")
    add("--save", type=Path, metavar="FILE", help="save the rows for a later --compare")
    add("--torch", action="store_true", help="time fastbn.torch instead: a layer, and the training of a network")
    add("--ranks", metavar="LIST", help="time synchronized norms instead, on these numbers of ranks, such as 1,2")
    add("--compare", type=Path, nargs="+", metavar="FILE", help="compare this run, or a second file, with a saved one")
    return parser


def _variants(options: argparse.Namespace) -> tuple[Variant, ...]:
    """Every combination of the options; with --operation, the plain variant with one option changed at a time."""
    usual = ("all", "all", "all") if options.operation else (DTYPES[0], ACTIVATIONS[0], STRIDES[0])
    dtypes = _words("--dtypes", DTYPES, options.dtypes or usual[0])
    activations = _words("--activations", ACTIVATIONS, options.activations or usual[1])
    strides = _words("--strides", STRIDES, options.strides or usual[2])
    if not options.operation:
        return tuple(starmap(Variant, product(dtypes, activations, strides)))
    alone = [Variant(dtype=dtype) for dtype in dtypes]
    alone += [Variant(activation=activation) for activation in activations]
    alone += [Variant(strides=one) for one in strides]
    return tuple(dict.fromkeys(alone))


def _budget(options: argparse.Namespace) -> Budget:
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch: got {options.batch}; allowed: a positive integer")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds: got {options.seconds}; allowed: more than 0")
    budget = QUICK_BUDGET if options.quick else Budget()
    return Budget(options.seconds or budget.seconds, budget.least)


def _plan(options: argparse.Namespace) -> Plan:
    budget = _budget(options)
    usual = QUICK_SHAPES if options.quick else "operation" if options.operation else "targets"
    return Plan(
        shapes=shapes.parse(options.shapes or usual, options.batch),
        passes=_words("--passes", PASSES, options.passes),
        layouts=_words("--layouts", LAYOUTS, options.layouts),
        variants=_variants(options),
        threads=_numbers("--threads", options.threads),
        entrants=ours.entrants(options.backends.split(","), [isa for isa in options.isa.split(",") if isa]),
        budget=budget,
    )


def _run(options: argparse.Namespace, plan: Plan, command: str) -> rows.Run:
    """Runs the plan. An interrupt ends the run early; the rows measured so far are kept."""
    loaded = rivals.load([name for name in options.peers.split(",") if name])
    notes = [f"not installed: {sentence}" for sentence in loaded.missing]
    notes += [note for rival in loaded.rivals.values() for note in rival.notes]
    versions = {title: rival.version for title, rival in loaded.rivals.items()}
    backends = dict.fromkeys(backend for backend, _ in plan.entrants.values())
    run = rows.Run(rows.describe_machine(backends, versions, command), [], notes)
    runner = Runner(plan, loaded.rivals)
    where = report.console()
    try:
        with report.progress(where, plan.races) as progress:
            run.rows.extend(runner.run(progress))
    except KeyboardInterrupt:
        run.notes.append("interrupted: the rest was not measured")
    run.notes.extend(runner.notes)
    report.show(where, run)
    return run


def _write(run: rows.Run, options: argparse.Namespace) -> None:
    if not run.rows:
        return
    written = [options.output / "rows.jsonl", *([options.save] if options.save else [])]
    for path in written:
        rows.save(run, path)
    pictures = plots.draw(run, options.output)
    report.console().print("written: " + ", ".join(map(str, [*written, *pictures])), soft_wrap=True)


def _ranks(options: argparse.Namespace) -> None:
    """Prints what synchronization costs, and keeps the rows."""
    numbers = _numbers("--ranks", options.ranks)
    chosen = shapes.parse(options.shapes or (QUICK_SHAPES if options.quick else "resnet50"), options.batch)
    found, notes = ranks.measure(numbers, chosen, _budget(options))
    where = report.console()
    where.print(ranks.table(found))
    where.print(f"[dim]{ranks.KEY}[/]\n", soft_wrap=True)
    for note in notes:
        where.print(f"• {note}", soft_wrap=True, markup=False)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "ranks.jsonl"
    path.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in found), encoding="utf-8")
    where.print(f"written: {path}", soft_wrap=True)


def _compare(options: argparse.Namespace, run: rows.Run | None) -> None:
    old = rows.load(options.compare[0])
    new = rows.load(options.compare[1]) if run is None else run
    report.show_changes(report.console(), compare.changes(old.rows, new.rows))


def main(argv: Sequence[str]) -> int:
    """Runs the bench, and returns 0 whatever the figures are. Arguments that are not valid end the process with 2."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.torch:
            training = importlib.import_module(".torch_training", __package__)
            training.run(options.quick, options.output / "torch.png")
            return 0
        if options.ranks:
            _ranks(options)
            return 0
        if options.compare and len(options.compare) > 2:
            raise ValueError(f"--compare: got {len(options.compare)} files; allowed: 1 or 2")
        if options.compare and len(options.compare) == 2:
            _compare(options, None)
            return 0
        run = _run(options, _plan(options), shlex.join(["fastbn", "bench", *argv]))
        _write(run, options)
        if options.compare:
            _compare(options, run)
    except (ValueError, ImportError, FileNotFoundError) as error:
        parser.exit(2, f"fastbn bench: {error}\n")
    return 0
