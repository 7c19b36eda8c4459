"""Which arguments does `fastbn bench` take, and what does it do with them?"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path

from . import compare, plots, ranks, report, rivals, rows, shapes, summary
from .api import prepared
from .options import QUICK_SHAPES, Options, budget, numbers, plan
from .problem import ACTIVATIONS, DTYPES, LAYOUTS, PASSES, RESULTS, STRIDES

SHAPES = (
    f"sizes such as 32x64x56x56; or a set by name, of {', '.join(shapes.NETWORKS)} (resnet50 with one image), "
    "dense (matrices), latency (small arrays), operation (two beyond any cache), and the usual one, targets: nine "
    "shapes from 1x64 to 32x64x112x112, of which the project's own targets are"
)

EXAMPLE = "fastbn bench --shapes 32x64x56x56 --layouts nhwc says what is fastest for that array."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastbn bench",
        description="Times fastbn, its installed peers and a plain copy, side by side.",
        epilog=f"Lists have commas and no blanks, in any case. {EXAMPLE} The same from Python: fastbn.bench.run.",
    )
    what, ours, others = map(
        parser.add_argument_group, ("what is timed", "how fastbn is called", "what it is held against")
    )
    add = what.add_argument
    add("--shapes", metavar="LIST", help=SHAPES)
    add("--batch", type=int, metavar="N", help="the batch of the networks' shapes (32; unet3d 1)")
    add("--passes", default=",".join(PASSES), metavar="LIST", help="all, or of %(default)s (all)")
    add(
        "--layouts",
        default=",".join(LAYOUTS),
        metavar="LIST",
        help="all, or of %(default)s (all); a matrix has only one",
    )
    add("--dtypes", metavar="LIST", help=f"all, or of {', '.join(DTYPES)} (float32)")
    add("--activations", metavar="LIST", help=f"all, or of {', '.join(ACTIVATIONS)} (none)")
    add("--strides", metavar="LIST", help=f"all, or of {', '.join(STRIDES)} (dense)")
    add("--mask", action="store_true", help="a quarter of all positions is masked: forward and backward")
    add("--residual", action="store_true", help="a residual is added")
    add(
        "--operation",
        action="store_true",
        help="all dtypes, activations and strides, one at a time, not combined, on shapes larger than any cache",
    )
    add = ours.add_argument
    add("--results", metavar="LIST", help=f"all, or of {', '.join(RESULTS)} (all for shapes given by sizes, else out)")
    add("--backends", metavar="LIST", help="all, or of c, numba, numpy (c and numba for shapes given by sizes, else c)")
    add("--isa", default="", metavar="LIST", help="all, or instruction sets for the c backend (the one it chooses)")
    add(
        "--threads",
        metavar="LIST",
        help="numbers, or all: 1 and as many as fastbn uses by itself (all for shapes given by sizes, else 1)",
    )
    add = others.add_argument
    add(
        "--peers",
        nargs="?",
        const="all",
        default="",
        metavar="LIST",
        help=f"time peers, too: all that are installed, or of {', '.join(rivals.ENTRIES)}",
    )
    add("--compare", type=Path, nargs="+", metavar="FILE", help="compare this run, or a second file, with a saved one")
    add("--targets", action="store_true", help="for developers: whether the project's own targets are met")
    _add_rest(parser)
    return parser


def _add_rest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the run, and what is kept").add_argument
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="about how long each race lasts: a pass of a shape in one way, for all contestants (2)",
    )
    add("--quick", action="store_true", help="tiny shapes, to see whether it runs; half a minute at most")
    add(
        "--output",
        type=Path,
        default=Path("bench-results"),
        metavar="FOLDER",
        help="where each run has a folder with its date, for rows and pictures (%(default)s)",
    )
    add("--save", type=Path, metavar="FILE", help="save the rows here as well, for a later --compare")
    add("--table", type=Path, metavar="FILE", help="write the geometric means as a page in Markdown")
    add("--torch", action="store_true", help="time fastbn.torch instead: a layer, and the training of a network")
    add("--ranks", metavar="LIST", help="time synchronized norms instead, on these numbers of ranks, such as 1,2")


def options_of(given: argparse.Namespace) -> Options:
    """The options that say what is run."""
    return Options(**{field.name: getattr(given, field.name) for field in fields(Options)})


def _folder(output: Path) -> Path:
    """A new folder with the date, so that no run overwrites another."""
    date = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for number in range(1000):
        folder = output / (f"{date}-{number}" if number else date)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if output.exists() and not output.is_dir():
                raise ValueError(f"--output: got {output}, which is a file; allowed: a folder") from None
        else:
            return folder
    raise ValueError(f"--output: got {output}, which has a thousand runs of this second")


def _check_files(given: argparse.Namespace) -> list[rows.Run]:
    """The runs to compare with. What cannot be read or written is told before a run, not after it."""
    for option, path in (("--save", given.save), ("--table", given.table)):
        if path is not None:
            if path.is_dir():
                raise ValueError(f"{option}: got {path}, which is a folder; allowed: a file")
            path.parent.mkdir(parents=True, exist_ok=True)
    compared = given.compare or []
    if len(compared) > 2:
        raise ValueError(f"--compare: got {len(compared)} files; allowed: 1 or 2")
    for path in compared:
        if not path.is_file():
            raise ValueError(f"--compare: got {path}, which is no file; allowed: what --save or a run has written")
    return [rows.load(path) for path in compared]


def _run(given: argparse.Namespace, command: str) -> rows.Run:
    """Runs the plan. An interrupt ends the run early; the rows measured so far are kept."""
    run, runner = prepared(plan(options_of(given)), given.peers, command)
    where = report.console()
    where.print(report.beforehand(runner.plan.races, runner.plan.budget.seconds), soft_wrap=True)
    try:
        with report.progress(where, runner.plan.races) as progress:
            run.rows.extend(runner.run(progress))
    except KeyboardInterrupt:
        run.notes.append("interrupted: the rest was not measured")
    run.notes.extend(runner.notes)
    report.show(where, run, given.targets)
    return run


def _write(run: rows.Run, given: argparse.Namespace) -> None:
    if not run.rows:
        return
    folder = _folder(given.output)
    written = [folder / "rows.jsonl", *([given.save] if given.save else [])]
    for path in written:
        rows.save(run, path)
    written += plots.draw(run, folder)
    if given.table:
        given.table.write_text(summary.page(run), encoding="utf-8")
        written.append(given.table)
    report.console().print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _ranks(given: argparse.Namespace) -> None:
    """Prints what synchronization costs, and keeps the rows."""
    counts = numbers("--ranks", given.ranks)
    chosen = shapes.parse(given.shapes or (QUICK_SHAPES if given.quick else "resnet50"), given.batch)
    found, notes = ranks.measure(counts, chosen, budget(options_of(given)))
    where = report.console()
    where.print(ranks.table(found))
    where.print(f"[dim]{ranks.KEY}[/]\n", soft_wrap=True)
    for note in notes:
        where.print(f"• {note}", soft_wrap=True, markup=False)
    path = _folder(given.output) / "ranks.jsonl"
    path.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in found), encoding="utf-8")
    where.print(f"written: {path}", soft_wrap=True)


def _main(given: argparse.Namespace, command: str) -> None:
    if given.torch:
        training = importlib.import_module(".torch_training", __package__)
        training.run(given.quick, _folder(given.output) / "torch.png")
        return
    if given.ranks:
        _ranks(given)
        return
    before = _check_files(given)
    if len(before) < 2:
        run = _run(given, command)
        _write(run, given)
        before.append(run)
    if given.compare:
        report.show_changes(report.console(), compare.changes(before[0].rows, before[1].rows))


def main(argv: Sequence[str]) -> int:
    """Runs the bench, and returns 0 whatever the figures are. Arguments that are not valid end the process with 2."""
    parser = _parser()
    given = parser.parse_args(argv)
    policy = os.environ.get("OMP_WAIT_POLICY")  # which belongs to the command, since figures depend on it
    words = [f"OMP_WAIT_POLICY={policy}"] if policy else []
    try:
        _main(given, shlex.join([*words, "fastbn", "bench", *argv]))
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"fastbn bench: {error}\n")
    return 0
