"""Does the C core hold under random calls? core/driver.c under sanitizers of addresses, undefined behavior, threads.

The kernels are compiled as setup.py compiles them, but for -O1 and the sanitizers; that takes minutes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import c_api
import cases
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (cases.CHECKOUT / "src_c").is_dir(), reason="src_c is not beside the tests: no checkout"),
]
DRIVER = Path(__file__).with_name("driver.c")
Flags = Callable[[str], list[str]]
PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


def works(compiler: str, flags: list[str], folder: Path) -> bool:
    """Can this compiler link a program with these flags, and does that run?"""
    source, program = folder / "probe.c", folder / "probe"
    source.write_text(PROBE, encoding="utf-8")
    command = [compiler, *flags, str(source), "-o", str(program)]
    return all(
        subprocess.run(part, capture_output=True, check=False).returncode == 0 for part in (command, [str(program)])
    )


def build(compiler: str, flags: Flags, folder: Path) -> Path:
    """The driver and the core in one program; `flags` adds to each source's."""
    own = c_api.setup_lists()

    def all_flags(source: str) -> list[str]:
        return ["-O1", "-g1", *flags(source)]

    objects = c_api.build_core([compiler], own, all_flags, folder)
    objects.append(c_api.compile_source([compiler], DRIVER, [*own["FLAGS"], *all_flags(str(DRIVER))], folder))
    program = folder / "driver"
    c_api.run([compiler, *flags(""), *objects, "-lm", "-o", program])
    return program


def test_addresses_and_undefined_operations(tmp_path: Path) -> None:
    """Thousands of calls. In the kernels undefined operations are looked for in the baseline's, for time's sake."""
    both = ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    found = [name for name in ("clang", "gcc") if shutil.which(name) and works(name, both, tmp_path)]
    if not found:
        pytest.skip("needs clang or gcc with AddressSanitizer, UndefinedBehaviorSanitizer and OpenMP")

    def flags(source: str) -> list[str]:
        if "/isa/" not in source:
            return both
        if "baseline" not in source:
            return ["-fsanitize=address"]
        # A trap where others print what is wrong: for a fifth of the time.
        trap = "-fsanitize-trap=undefined" if found[0] == "clang" else "-fsanitize-undefined-trap-on-error"
        return ["-fsanitize=address,undefined", trap]

    program = build(found[0], flags, tmp_path)
    for seed in range(1, 4):
        c_api.run([program, seed, 0, 4000, 200], OMP_NUM_THREADS="4")


def archer() -> Path:
    """The library by which ThreadSanitizer knows what OpenMP orders."""
    places = sorted(Path("/usr/lib").glob("llvm-*/lib/libarcher.so"))
    if not places:
        pytest.skip("needs libarcher.so, of LLVM's OpenMP (Debian: libomp-dev)")
    return places[-1]


def test_threads(tmp_path: Path) -> None:
    """Calls that two to four threads share. Reports of races come from all of the core and its kernels."""
    library = archer()
    flags = ["-fopenmp", "-fsanitize=thread"]
    clang = c_api.compiler("clang")
    if not works(clang, flags, tmp_path):
        pytest.skip("needs clang's ThreadSanitizer and OpenMP (Debian: libclang-rt-dev, libomp-dev)")
    program = build(clang, lambda source: flags[1:] if "/isa/" in source else flags, tmp_path)
    options = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1", "OMP_TOOL_LIBRARIES": str(library)}
    c_api.run([program, 1, 0, 400, 1], **options)
