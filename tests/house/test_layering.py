"""Do imports and includes go down only, and do the lists that must agree agree?"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import cases
import pytest

import fastbn
from fastbn._backends import SAVED_ROWS
from fastbn.call import activations, dtypes
from fastbn.config import environment

PACKAGE = Path(fastbn.__file__).parent
SRC_C = cases.CHECKOUT / "src_c"
in_checkout = pytest.mark.skipif(not SRC_C.is_dir(), reason="src_c is not beside the tests: no checkout")

# Python --------------------------------------------------------------------------------------------------------------

FLOORS = (
    {
        "_pyinstaller",
        "_pyinstaller.hook-fastbn",
        "call.activations",
        "call.dtypes",
        "call.shape",
        "config.built",
        "config.cgroup",
        "config.cache_dir",
    },
    {"call.dlpack"},
    {"call.checks"},
    {"call.record", "call.pickles", "config.environment"},
    {"config.thread_count", "config.habits"},
    {"_backends", "_check_layer"},
    {"call.check_parts"},
    {"_moments"},
    {"_backends.jit"},
    {"_backends.jit_calls", "_backends.numba_loops"},
    {"_backends.c", "_backends.c.bridge", "_backends.numba_backend", "_backends.numpy_backend"},
    {"config.info", "config.embed", "numba"},
    {"call.results"},
    {"call.blocks"},
    {"call.batch"},
    {"call.ghost"},
    {"ops"},
    {"dask", "inference", "torch.formulas", "torch.source", "torch.watchers"},
    {"layer", "torch.tensors"},
    {"_ranks"},
    {"_recalibrate", "_smoke", "_tune", "mpi", "onnx"},
    {"torch.autograd"},
    {"torch.layers"},
    {"torch.sync"},
    {"torch.others"},
    {"torch.proof"},
    {"torch.follow"},
    {"torch.syntax"},
    {"torch.pending"},
    {"torch.fuse"},
    {"torch.convert"},
    {"call", "config", "demo", "torch"},
    {""},
    {"demo.networks", "bench"},
    {"demo.precision"},
    {"demo.report"},
    {"demo.plot"},
    {"demo.run"},
    {"cli"},
    {"__main__"},
)
"""Modules of fastbn, from the ground up. One imports from the floors below its own; "" is fastbn itself.

Below the backends: what is asked of them (call.record). Above, up to the front desk: what can be added up (_moments),
what is kept for the gradient (call.results), arrays of any strides (call.blocks), one batch (call.batch), several in
one call (call.ghost).
"""

FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def modules() -> dict[str, Path]:
    """Every module of fastbn, by its name below it; bench is its own house."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "bench":
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """The modules of fastbn that a module imports, anywhere in it, by their names below fastbn."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {_below(imported) for imported in names if imported.split(".")[0] == "fastbn"}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                up = package.split(".")[: len(package.split(".")) - (node.level - 1)] if package else []
                origin = ".".join([*up, *((node.module or "").split(".") if node.module else [])])
            elif (node.module or "").split(".")[0] == "fastbn":
                origin = _below(str(node.module))
            else:
                continue
            below = {f"{origin}.{alias.name}".strip(".") for alias in node.names}
            found |= {module for module in below if module in FLOOR} or {origin}
    return found


def _below(name: str) -> str:
    return name.removeprefix("fastbn").removeprefix(".")


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "fastbn")
def test_imports_go_down(name: str) -> None:
    assert name in FLOOR, f"{name} has no floor yet: give it one in FLOORS"
    upward = {imported for imported in imports(name, MODULES[name]) if FLOOR[imported] >= FLOOR[name]}
    assert not upward, f"fastbn.{name} imports {upward}"


def test_imports_are_seen() -> None:
    """The test above would pass if nothing were found."""
    assert {"call.checks", "call.batch", "call.ghost", "_backends"} <= imports("ops", MODULES["ops"])
    assert {"call.checks", "config.environment"} <= imports("_backends", MODULES["_backends"])
    assert "call.activations" in imports("_backends.numpy_backend", MODULES["_backends.numpy_backend"])
    assert {"layer", "ops"} <= imports("", MODULES[""])


HEAVY = (
    "numba",
    "torch",
    "keras",
    "onnx",
    "matplotlib",
    "rich",
    "sklearn",
    "scipy",
    "pytest",
    "ml_dtypes",
    "dask",
    "distributed",
    "zarr",
    "h5py",
    "fastbn.demo",
    "fastbn.bench",
    "fastbn.dask",
    "mpi4py",
    "fastbn.mpi",
    "fastbn.onnx",
    "fastbn.numba",
    "fastbn.torch",
)


@pytest.mark.parametrize("use", ["pass", "fastbn.forward(np.ones((3, 2)), backend='numpy')", "fastbn.BatchNorm(3)"])
def test_import_is_light(use: str, tmp_path: Path) -> None:
    """`import fastbn` brings NumPy alone, and so does using another backend than Numba's."""
    script = f"import sys, numpy as np, fastbn; {use}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = cases.run_python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_bridge_is_imported_with_fastbn(tmp_path: Path) -> None:
    """So that it knows what OpenMP's own number of threads was then."""
    script = "import sys, fastbn; print('fastbn._backends.c.bridge' in sys.modules)"
    assert cases.run_python(script, tmp_path).stdout.strip() == str("c" in fastbn.backends())


# C -------------------------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(path for path in SRC_C.rglob("*") if path.suffix in (".c", ".h"))


def code_of(path: Path) -> str:
    """A source without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def where(pattern: str) -> set[str]:
    """The sources with a match, by their paths below src_c."""
    return {path.relative_to(SRC_C).as_posix() for path in sources() if re.search(pattern, code_of(path))}


@in_checkout
def test_intrinsics_are_in_simd_alone() -> None:
    found = where(r"immintrin|arm_neon|\b_mm\d*_|\b__m\d+|\bv(ld1|st1|add|mul|fma)q?_f\d\d")
    assert {path for path in found if not path.startswith("simd/")} <= {"processor.h"}
    assert {"simd/avx2.h", "simd/avx512.h"} <= found
    assert not re.search(r"\b_mm\d*_|\b__m\d+", code_of(SRC_C / "processor.h"))


@in_checkout
@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"\bomp_|<omp\.h>|#\s*pragma\s+omp|_OPENMP", "run.c"),
        (r"sysconf|sysctl|/sys/", "machine.c"),
        (r"<cpuid\.h>|\b__cpuid|__builtin_cpu", "processor.h"),
    ],
    ids=["omp", "caches", "instruction sets"],
)
def test_one_home(pattern: str, home: str) -> None:
    assert where(pattern) == {home}


@in_checkout
@pytest.mark.parametrize(
    "banned", [r"\b(m|c|re)alloc\b|\bfree\b", r"\bgetenv\b", r"Python\.h", r"\b[f]?printf\b", r"#\s*if\s+0"]
)
def test_nowhere(banned: str) -> None:
    assert where(banned) == set()


@in_checkout
def test_macros_bind_names() -> None:
    """None ends in a backslash."""
    assert where(r"\\\n") == set()


@in_checkout
def test_functions_are_short() -> None:
    """None has more than 40 lines. A function ends with the first brace at the left margin after its own."""
    lengths = {}
    for path in sources():
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(
            r"^(?!typedef|enum|struct|extern)[\w ]+[*\w]+\([^;{}]*\) ?\{\n.*?^\}", text, re.DOTALL | re.MULTILINE
        ):
            name = found.group().partition("(")[0].split()[-1]
            lengths[path.name, name] = found.group().count("\n") + 1
    assert len(lengths) > 200
    assert {where: length for where, length in lengths.items() if length > 40} == {}


ALLOWED_INCLUDES = {
    "fastbn.h": set(),
    "kernels.h": {"fastbn.h"},
    "values.h": {"fastbn.h"},
    "values.c": {"values.h"},
    "dispatch.h": {"kernels.h"},
    "processor.h": set(),
    "dispatch.c": {"dispatch.h", "processor.h"},
    "machine.h": {"fastbn.h"},
    "machine.c": {"machine.h", "dispatch.h", "processor.h"},
    "check.h": {"fastbn.h"},
    "check.c": {"check.h", "values.h"},
    "split.h": {"walk.h"},
    "split.c": {"split.h", "values.h"},
    "walk.h": {"kernels.h"},
    "walk.c": {"walk.h"},
    "panel.c": {"job.h"},
    "job.h": {"split.h"},
    "finish.c": {"job.h", "values.h"},
    "run.c": {"job.h"},
    "mixed.h": {"job.h"},
    "mixed.c": {"mixed.h"},
    "tile.c": {"mixed.h"},
    "verbs.c": {"check.h", "job.h"},
}


@in_checkout
@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(SRC_C).as_posix())
def test_includes_go_down(path: Path) -> None:
    """kernels/ and dtypes/ include nothing: isa/ puts them together with simd/."""
    name = path.relative_to(SRC_C).as_posix()
    found = {
        (path.parent / included).resolve().relative_to(SRC_C).as_posix()
        for included in re.findall(r'#\s*include\s+"([^"]+)"', code_of(path))
    }
    folder = name.partition("/")[0]
    if folder in ("kernels", "dtypes"):
        assert found == set()
    elif folder == "simd":
        assert found <= {"kernels.h"}
    elif folder == "isa":
        assert {included.partition("/")[0] for included in found} <= {"simd", "dtypes", "kernels", "isa"}
    else:
        assert found <= ALLOWED_INCLUDES[name]


# Lists that must agree -----------------------------------------------------------------------------------------------


def enum_of(pattern: str) -> dict[str, int]:
    """The names and numbers of the enum in fastbn.h whose text has `pattern`."""
    for body in re.findall(r"enum\s*\w*\s*\{([^}]*)\}", code_of(SRC_C / "fastbn.h")):
        if pattern in body:
            found: dict[str, int] = {}
            for member in body.split(","):
                name, _, value = (part.strip() for part in member.partition("="))
                found[name] = int(value) if value else len(found)
            return found
    raise AssertionError(f"no enum with {pattern} in fastbn.h")


@in_checkout
def test_activations() -> None:
    wanted = {f"FBN_{activation.name}": activation.value for activation in activations.Activation}
    assert enum_of("FBN_RELU") == {**wanted, "FBN_ACTIVATIONS": len(wanted)}
    assert list(activations.BY_NAME.values()) == list(range(len(wanted)))


@pytest.mark.parametrize("function", [fastbn.forward, fastbn.BatchNorm, fastbn.InferencePlan])
def test_activations_that_are_documented(function: Any) -> None:
    names = ["None", *(f'"{name}"' for name in activations.BY_NAME if name)]
    pairs = " or ".join(f'("{name}", slope)' for name in activations.DEFAULT_SLOPES)
    assert f"activation : {', '.join(names)} or {pairs}" in function.__doc__


@in_checkout
def test_rows_of_saved() -> None:
    wanted = {f"FBN_{name.upper()}": row for row, name in enumerate((*SAVED_ROWS, "saved_rows"))}
    assert enum_of("FBN_MEAN_LOW") == wanted


@in_checkout
def test_dtypes() -> None:
    short = {f"FBN_{name.upper().replace('FLOAT', 'F')}" for name in dtypes.KINDS}
    assert set(enum_of("FBN_F32")) == short
    headers = {path.stem for path in (SRC_C / "dtypes").glob("*.h")} - {"unbind"}
    assert {f"FBN_{name.upper()}" for name in headers} == short
    assert set(cases.DTYPES) <= set(dtypes.KINDS)


@in_checkout
def test_dtype_headers_bind_the_same_names() -> None:
    """And unbind.h frees all of them, and those of two vectors, which only some instruction sets have."""
    bound = {
        path.stem: set(re.findall(r"#\s*(?:define|undef)\s+(\w+)", code_of(path)))
        for path in (SRC_C / "dtypes").glob("*.h")
    }
    mixed, pairs = {"vload_two", "vstore_two"}, {"vload_pair", "vstore_pair"}
    more = {"f32": set(), "f64": set(), "f16": pairs, "bf16": mixed, "unbind": mixed | pairs}
    assert bound == {name: bound["f32"] | names for name, names in more.items()}


@in_checkout
def test_instruction_sets() -> None:
    """In the configuration, the kernels, their vocabularies, and the build."""
    assert {path.stem for path in (SRC_C / "isa").glob("*.c")} == set(environment.ISAS)
    assert {path.stem for path in (SRC_C / "simd").glob("*.h")} == set(environment.ISAS)
    setup = (cases.CHECKOUT / "setup.py").read_text(encoding="utf-8")
    assert set(re.findall(r'ISAS\["(\w+)"\]', setup)) | set(re.findall(r'ISAS = \{"(\w+)"', setup)) == set(
        environment.ISAS
    )
    dispatched = set(re.findall(r"fbn_kernels_(\w+)", code_of(SRC_C / "dispatch.h")))
    assert dispatched == set(environment.ISAS)


@in_checkout
def test_simd_headers_have_the_same_vocabulary() -> None:
    """But for their own helpers and F16_PAIRS, every instruction set defines what the baseline does."""
    names = {
        path.stem: set(re.findall(r"FBN_INLINE\s+[\w ]+?\**\s*(\w+)\s*\(", code_of(path)))
        for path in (SRC_C / "simd").glob("*.h")
    }
    everywhere = names["baseline"] - {"f16_load_pair", "f16_store_pair"}
    for isa, defined in names.items():
        assert everywhere - defined == set(), f"{isa} lacks operations of baseline.h"


@in_checkout
def test_declarations_for_cython() -> None:
    """cfastbn.pxd declares the functions of fastbn.h, each with as many arguments."""
    header, pxd = (
        code_of(SRC_C / "fastbn.h"),
        (cases.CHECKOUT / "fastbn/cfastbn.pxd").read_text(encoding="utf-8"),
    )

    def functions(text: str) -> dict[str, int]:
        found = re.findall(r"\b(fbn_\w+)\(([^()]*)\)", text)
        return {name: 0 if arguments.strip() in ("", "void") else arguments.count(",") + 1 for name, arguments in found}

    assert functions(header)
    assert functions(pxd) == functions(header)


@in_checkout
def test_structs_for_cython() -> None:
    """cfastbn.pxd declares the structs of fastbn.h, each with its fields, and the members of its enums."""
    header = code_of(SRC_C / "fastbn.h")
    structs = {
        name: re.findall(r"(\w+)(?=\s*[,;])", body)
        for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", header, flags=re.DOTALL)
    }
    members = set(re.findall(r"\bFBN_\w+", " ".join(re.findall(r"enum \{(.*?)\}", header, flags=re.DOTALL))))
    pxd = (cases.CHECKOUT / "fastbn/cfastbn.pxd").read_text(encoding="utf-8")
    declared = {
        name: re.findall(r"(\w+)$", body, flags=re.MULTILINE)
        for name, body in re.findall(r"ctypedef struct (\w+):\n((?:        .*\n)+)", pxd)
    }
    assert len(structs) > 10
    assert {name: fields for name, fields in declared.items() if fields != ["pass"]} == structs
    assert members <= set(re.findall(r"\bFBN_\w+", pxd))


def test_backends() -> None:
    assert tuple(importlib.import_module("fastbn._backends")._MODULES) == environment.BACKENDS


@in_checkout
def test_version() -> None:
    project = tomllib.loads((cases.CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fastbn.__version__ == project["version"]
