"""How is the compiled extension built? With a table of instruction sets, and a build_ext command that follows it.

The objects that the extension links also go into a static library, which is installed with its header.
"""

import hashlib
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

PLATFORM = sysconfig.get_platform().lower()
MSVC = PLATFORM.startswith("win")
BITS_64 = sys.maxsize > 2**32  # a Python of 32 bits may run on a system of 64
X86 = ("x86_64" in PLATFORM or "amd64" in PLATFORM) and "universal" not in PLATFORM and BITS_64
X86_32 = not BITS_64 and PLATFORM.endswith(("i386", "i486", "i586", "i686", "x86_64"))
ARM = "aarch64" in PLATFORM or "arm64" in PLATFORM

# The names of the files in src_c/isa, and the compiler flags that each needs. As to the flag for baseline: GCC 12's SLP
# vectorizer drops the rounding to float32 between two operations in float64, as in an f32_fma of an f32_fma.
ISAS = {"baseline": [] if MSVC else ["-fno-tree-slp-vectorize"]}
if X86:
    ISAS["avx2"] = ["/arch:AVX2"] if MSVC else ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = (
        ["/arch:AVX512"]
        if MSVC
        else ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
    )
elif ARM:
    ISAS["neon"] = []

# GCC would copy all loops for each value of a flag that they test, which takes a sixth more code. src_c/kernels/map.h
# does so itself for the few loops that are faster for it.
# Tables that unwind the stack, which only debuggers read here, would be another hundredth of the wheel.
FLAGS = (
    ["/O2", "/std:c11", "/fp:precise"]
    if MSVC
    else [
        "-std=c11",
        "-O3",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-unswitch-loops",
        "-fvisibility=hidden",
        "-fno-asynchronous-unwind-tables",
        "-g0",
    ]
)
if len(ISAS) == 1 and not MSVC:  # such as in a universal build for macOS, which compiles each file for two processors
    FLAGS.append("-DFBN_BASELINE_ALONE")
if X86_32 and not MSVC:  # whose own arithmetic has excess precision, which kernels.h refuses
    FLAGS += ["-msse2", "-mfpmath=sse"]
# Names of functions that are not exported, which only debuggers read, would be a hundredth of the wheel.
WITHOUT_NAMES = [] if MSVC else ["-Wl,-x" if sys.platform == "darwin" else "-Wl,-s"]
CORE = sorted(path.as_posix() for path in Path("src_c").glob("*.c"))
FOR_EMBEDDERS = (
    "fastbn/include/fastbn.h",
    "fastbn/lib/fastbn.lib" if MSVC else "fastbn/lib/libfastbn.a",
    "fastbn/lib/link-flags.txt",
)
HEADERS = [str(path) for path in Path("src_c").rglob("*.h")]

# Tried in order: (compiler flags, linker flags).
OPENMP = [(["/openmp"], [])] if MSVC else [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]


def openmp_flags(compiler):
    """The compiler's and the linker's flags for OpenMP, or none.

    FASTBN_OPENMP=0 builds without OpenMP, and FASTBN_OPENMP=1 fails where there is none.
    """
    asked = os.environ.get("FASTBN_OPENMP", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"FASTBN_OPENMP: got {asked!r}; 0 builds without OpenMP, and 1 fails where there is none")
    if asked == "0":
        return [], []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.c")
        probe.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
        for compile_flags, link_flags in OPENMP:
            try:
                objects = compiler.compile([str(probe)], output_dir=folder, extra_postargs=compile_flags)
                # LDFLAGS, with which a library may be found, are otherwise for shared libraries only.
                flags = shlex.split("" if MSVC else os.environ.get("LDFLAGS", "")) + link_flags
                compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=flags)
                return compile_flags, link_flags
            except (CompileError, LinkError):
                continue
    if asked == "1":
        raise SystemExit("FASTBN_OPENMP is 1, but the compiler finds no OpenMP")
    print("fastbn: no OpenMP found; building for one thread", file=sys.stderr)
    return [], []


def read_by_compiler(source):
    """A source file and the files that it includes, and these."""
    found, waiting = set(), [os.path.normpath(source)]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            # A macro may name a file that is included by that name.
            text = Path(file).read_text(encoding="utf-8")
            names = re.findall(r'^ *# *(?:include|define \w+) "(.+\.h)"', text, flags=re.MULTILINE)
            waiting += [os.path.normpath(Path(file).parent / name) for name in names]
    return sorted(found)


def fingerprint(source, command):
    """What an object file depends on. Times of files do not tell: archives and copies keep those of older builds."""
    digest = hashlib.sha256(repr(command).encode())
    for file in read_by_compiler(source):
        digest.update(file.encode() + b"\0" + Path(file).read_bytes())
    return digest.hexdigest()


class BuildPy(build_py):
    """Removes what an earlier build has left in the folder that is installed, such as modules that are no more."""

    def run(self):
        made = {Path(path).resolve() for path in self.get_finalized_command("build_ext").get_outputs()}
        for path in [] if self.editable_mode else Path(self.build_lib).rglob("*"):
            if path.is_file() and path.resolve() not in made:
                path.unlink()
        super().run()


class BuildExt(build_ext):
    """Compiles each instruction set with its own flags, and the core with OpenMP if it is found, all in parallel."""

    def build_extension(self, ext):
        compile_flags, link_flags = openmp_flags(self.compiler)
        units = [(source, FLAGS + compile_flags) for source in CORE]
        units += [(f"src_c/isa/{isa}.c", FLAGS + flags) for isa, flags in ISAS.items()]

        def compiled(unit):
            source, flags = unit
            made = self.compiler.object_filenames([source], output_dir=self.build_temp)
            key = Path(made[0]).with_suffix(".key")
            wanted = fingerprint(source, [getattr(self.compiler, "compiler_so", []), flags])
            if self.force or not Path(made[0]).exists() or not key.exists() or key.read_text() != wanted:
                key.unlink(missing_ok=True)
                self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
                key.write_text(wanted)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [path for objects in pool.map(compiled, units) for path in objects]
        ext.depends = [*ext.depends, *ext.extra_objects]
        ext.extra_link_args = link_flags + WITHOUT_NAMES
        super().build_extension(ext)
        self.build_for_embedders(ext.extra_objects, link_flags)

    def build_for_embedders(self, objects, link_flags):
        """Puts the static library, its header and its linker flags where fastbn/config/embed.py looks for them."""
        library = Path(self.build_temp, self.compiler.library_filename("fastbn"))
        library.unlink(missing_ok=True)  # or it would keep the objects of sources that have been deleted
        self.compiler.create_static_lib(objects, "fastbn", output_dir=self.build_temp)
        flags = Path(self.build_temp, "link-flags.txt")
        flags.write_text(" ".join(link_flags + ([] if MSVC else ["-lm"])) + "\n", encoding="utf-8")
        copy_files([Path("src_c/fastbn.h"), library, flags], self.for_embedders())

    def for_embedders(self):
        return [Path(self.build_lib, path) for path in FOR_EMBEDDERS]

    def get_outputs(self):
        return sorted({*super().get_outputs(), *map(str, self.for_embedders())})

    def get_output_mapping(self):
        """The built files and their places in the sources, for editable installs."""
        sources = zip(map(str, self.for_embedders()), FOR_EMBEDDERS, strict=True)
        return {**super().get_output_mapping(), **(dict(sources) if self.inplace else {})}

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        copy_files(self.for_embedders(), FOR_EMBEDDERS)


def copy_files(sources, targets):
    for source, target in zip(sources, targets, strict=True):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def description():
    """README.md for package indexes: its addresses of files of this project lead to this version's files."""
    version = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    text = Path("README.md").read_text(encoding="utf-8")
    for home in ("https://github.com/fastbn/fastbn/blob", "https://raw.githubusercontent.com/fastbn/fastbn"):
        text = text.replace(f"{home}/main/", f"{home}/v{version}/")
    return text


extension = Extension(
    "fastbn._backends.c.bridge",
    ["fastbn/_backends/c/bridge.pyx"],
    include_dirs=["src_c", np.get_include()],
    # Python's own flags have -O3, with which it compiles longer and runs no faster. Nor does it with aligned jumps,
    # which take room, as do tables that unwind the stack (see FLAGS).
    extra_compile_args=[]
    if MSVC
    else ["-g0", "-O2", "-fno-asynchronous-unwind-tables", "-falign-jumps=1", "-falign-labels=1"],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION")],
    depends=[f"fastbn/_backends/c/{part}.pxi" for part in ("express", "flat", "memory", "plan", "tensors")]
    + HEADERS
    + CORE
    + [f"src_c/isa/{isa}.c" for isa in ISAS],
)

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=cythonize([extension]),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
