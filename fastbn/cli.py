"""Which commands does the command line have? fastbn demo, fastbn bench, fastbn info, fastbn test, fastbn tune."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import fastbn

from .config import embed
from .config.info import __version__, show_config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train on handwritten digits, with and without batch norm")
    demo.add_argument("--quick", action="store_true", help="a few seconds instead of about half a minute")
    demo.add_argument("--seeds", type=int, metavar="N", help="how many seeds to take the median of")
    demo.add_argument("--output", default="fastbn-demo.png", metavar="PNG", help="the picture (default: %(default)s)")
    demo.add_argument("--keep", metavar="JSON", help="a file for the figures; fastbn.demo.run.figures lists its keys")
    commands.add_parser("bench", help="time the backends, and the peers that are installed, side by side")
    info = commands.add_parser("info", help="show the version, the backends, the instruction set, threads and caches")
    info.add_argument("--cflags", action="store_true", help="print the flags that compile C, C++ or Cython against it")
    info.add_argument("--libs", action="store_true", help="print the flags that link it: a static library")
    commands.add_parser("test", help="test the installation on this machine: backends, instruction sets, bits")
    tune = commands.add_parser("tune", help="measure in half a minute how memory is used best here, and keep it")
    tune.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # for tests: two seconds, mostly noise
    return parser


def _run(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:
        return int(importlib.import_module("fastbn.bench.cli").main(argv[1:]))
    arguments = _parser().parse_args(argv)
    if arguments.command == "info" and (arguments.cflags or arguments.libs):
        print(*[embed.cflags()] * arguments.cflags, *[embed.libs()] * arguments.libs)
    elif arguments.command == "info":
        show_config()
    elif arguments.command == "test":
        return 0 if fastbn.test() else 1
    elif arguments.command == "tune":
        fastbn.tune(quick=arguments.quick)
    else:
        demo_of = importlib.import_module("fastbn.demo.run")
        demo_of.main(arguments.quick, arguments.seeds, arguments.output, arguments.keep)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2, with a line on stderr, for an error of the user's."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here rather than at exit, so that an error can be handled
        return status
    except BrokenPipeError:  # the reader has closed the pipe, as in fastbn info | grep -q OpenMP
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"fastbn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
