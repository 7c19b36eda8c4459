"""Does every platform give the bits of this one? tests/platforms/hashes.c, compiled for others and run by emulators.

What is compared is the output of the same program here, with the first compiler of cc, gcc and clang: that of the best
kernels for all instruction sets with a fused multiply-add, that of the baseline for the baseline. AVX-512's operations
are emulated, too (avx512.h), so that its kernels are tried on every x86-64 processor with AVX2. Cross compiling takes
ziglang from PyPI, whose clang needs no files of the target; running takes qemu-user and the target's C library (Debian:
libc6-arm64-cross and so on), wasmtime from PyPI, or wine. docs/platforms.md tells what was found.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import c_api
import cases
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (cases.CHECKOUT / "src_c").is_dir(), reason="src_c is not beside the tests: no checkout"),
]
HASHES, DRIVER = Path(__file__).with_name("hashes.c"), cases.CHECKOUT / "tests/core/driver.c"
Lines = dict[str, list[str]]


class Platform(NamedTuple):
    """How the core is compiled and run for it, and the kernels that it must have beside the baseline."""

    compiler: str
    name: str = ""  # as Python has it, in which setup.py looks for the instruction sets; "" is this platform
    bits: int = 64
    runner: str = ""
    kernels: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    layers: int = 400
    suffix: str = ""
    imitates: str = ""  # an instruction set whose operations a header in this folder computes with AVX2's


def emulated(target: str, name: str, emulator: str, debian: str, *kernels: str, bits: int = 64) -> Platform:
    """A Linux platform that zig compiles for and qemu-user runs."""
    runner = f"qemu-{emulator} -L /usr/{debian}"
    return Platform(f"zig {target}.2.36", f"linux-{name}", bits, runner, kernels)


X86 = ("avx512", "avx2")
PLATFORMS = {
    # A compiler for another processor does not know -m64, so that the test is skipped there.
    "AVX-512": Platform("gcc -m64", "linux-x86_64", kernels=X86, layers=2000, imitates="avx512"),
    "clang": Platform("clang", layers=2000),
    "musl-gcc": Platform("musl-gcc", flags=("-static",), layers=2000),
    # What a compiler without vectors in its C, such as Visual Studio's, makes of the baseline.
    "one number a vector": Platform("gcc", "linux-other", flags=("-D__has_builtin(name)=0",), layers=2000),
    "32 bits": Platform("gcc -m32", "linux-i686", 32, layers=2000),
    "aarch64": emulated("aarch64-linux-gnu", "aarch64", "aarch64", "aarch64-linux-gnu", "neon"),
    "s390x": emulated("s390x-linux-gnu", "s390x", "s390x", "s390x-linux-gnu"),
    "riscv64": emulated("riscv64-linux-gnu", "riscv64", "riscv64", "riscv64-linux-gnu"),
    "ppc64le": emulated("powerpc64le-linux-gnu", "ppc64le", "ppc64le", "powerpc64le-linux-gnu"),
    "armv7": emulated("arm-linux-gnueabihf", "armv7l", "arm", "arm-linux-gnueabihf", bits=32),
    "wasm": Platform("zig wasm32-wasi", "wasi-wasm32", 32, "wasmtime", suffix=".wasm"),
    "Windows": Platform("zig x86_64-windows-gnu", "mingw_x86_64", runner="wine", kernels=X86, suffix=".exe"),
    "macOS": Platform("zig aarch64-macos", "macosx-11.0-arm64", runner="a Mac", kernels=("neon",)),
}


def command_of(compiler: str, folder: Path) -> list[str]:
    """The command line, or a skip. zig is Python's package ziglang."""
    name, *rest = compiler.split()
    if name != "zig":
        command = [c_api.compiler(name), *rest]
        probe = folder / "probe.c"
        probe.write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n', encoding="utf-8")
        done = subprocess.run([*command, probe, "-o", folder / "probe"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{compiler} links no program here: {done.stderr.strip().splitlines()[-1]}")
        return command
    if not find_spec("ziglang"):
        pytest.skip("needs ziglang (python -m pip install --group platforms)")
    return [sys.executable, "-m", "ziglang", "cc", f"--target={rest[0]}"]


def runner_of(runner: str) -> list[str] | None:
    """The emulator's command line; None where it, or the C library that it needs, is missing."""
    name, *rest = runner.split() or [""]
    if name == "wasmtime" and find_spec("wasmtime"):
        return [sys.executable, str(Path(__file__).with_name("wasm.py"))]
    found = shutil.which(name) if name else ""
    return None if found is None or (rest and not Path(rest[-1]).is_dir()) else [*filter(None, [found]), *rest]


def lists_of(platform: Platform) -> dict[str, Any]:
    """What setup.py compiles for it, and how; zig knows no -fPIC for Windows."""
    lists = c_api.setup_lists(platform.name or None, platform.bits)
    if platform.imitates:
        header, tables = (HASHES.with_name(name) for name in (f"{platform.imitates}.h", "emulated.c"))
        lists["ISAS"][platform.imitates] = [*lists["ISAS"]["avx2"], "-Wno-psabi", "-include", header]
        lists["CORE"] = [tables if source == "src_c/dispatch.c" else source for source in lists["CORE"]]
    if "mingw" in platform.name:
        lists["FLAGS"].remove("-fPIC")
    return lists


def build(platform: Platform, folder: Path) -> Callable[[Path], Path]:
    """Compiles the core, and returns how a source is compiled and linked with it."""
    command, lists = command_of(platform.compiler, folder), lists_of(platform)
    flags = list(platform.flags)
    objects = c_api.build_core(command, lists, lambda source: flags, folder)

    def program(source: Path) -> Path:
        made = folder / f"{source.stem}_program{platform.suffix}"
        main = c_api.compile_source(command, source, [*lists["FLAGS"], *flags], folder)
        c_api.run([*command, *lists["FLAGS"], *flags, main, *objects, "-lm", "-o", made])
        return made

    return program


def hashes(command: list[Any], layers: int) -> Lines:
    """What the program prints, by the kernels that it has."""
    return {name: c_api.run([*command, name, 0, layers]).splitlines() for name in c_api.run(command).split()}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """The lines that all others are compared with."""
    native = Platform(c_api.compiler("cc", "gcc", "clang"))
    return hashes([build(native, tmp_path_factory.mktemp("here"))(HASHES)], max(p.layers for p in PLATFORMS.values()))


def check(found: list[str], wanted: list[str]) -> None:
    """As many lines as were made, alike, and so many that every verb, dtype and layout is among them."""
    others = [f"{line} instead of {right}" for line, right in zip(found, wanted, strict=True) if line != right]
    assert not others, f"{len(others)} of {len(found)} lines, such as {others[:5]}"
    assert len(found) > 3000


def of_layers(lines: list[str], layers: int) -> list[str]:
    return [line for line in lines if int(line.split()[0]) < layers]


def test_instruction_sets(here: Lines) -> None:
    """Those with a fused multiply-add give the same bits; the baseline, which rounds twice, does not."""
    first, *others = (lines for name, lines in here.items() if name != "baseline")
    for lines in others:
        check(lines, first)
    assert first != here["baseline"]


@pytest.mark.parametrize("name", PLATFORMS)
def test_platform(name: str, here: Lines, tmp_path: Path) -> None:
    """The same bits as here; and the driver's random calls, half of them with something wrong, end as they must."""
    platform = PLATFORMS[name]
    if platform.imitates and "avx2" not in here:
        pytest.skip("needs a processor with AVX2")
    program, runner = build(platform, tmp_path), runner_of(platform.runner)
    built, driver = program(HASHES), program(DRIVER)
    if runner is None:
        pytest.skip(f"compiled and linked, but not run: needs {platform.runner}")
    found = hashes([*runner, built], platform.layers)
    assert set(found) == ({*platform.kernels, "baseline"} if platform.name else set(here))
    for kernels, lines in found.items():
        like = kernels if kernels in here else next(iter(here))
        check(lines, of_layers(here[like], platform.layers))
    c_api.run([*runner, driver, 1, 0, 300, 1000])
