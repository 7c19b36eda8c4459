"""Is the smallest plausible cache believed, are containers' quotas seen, and do sizes fit a size_t of 32 bits?"""

from __future__ import annotations

import ctypes as ct
import subprocess
from pathlib import Path

import c_api
import cases
import pytest

from fastbn.config import cgroup

SRC_C = cases.CHECKOUT / "src_c"
pytestmark = pytest.mark.skipif(not SRC_C.is_dir(), reason="src_c is not beside the tests: no checkout")
KB, MB, GB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> ct.CDLL:
    """machine.c alone, with its inner functions."""
    folder = tmp_path_factory.mktemp("machine")
    stub = folder / "stub.c"
    stub.write_text(
        "const void *fbn_kernels_at(int index) { (void)index; return 0; }\n"
        'const char *fbn_kernels_name(const void *kernels) { (void)kernels; return ""; }\n',
        encoding="utf-8",
    )
    library = folder / "machine.so"
    c_api.run([c_api.compiler("cc", "gcc", "clang"), "-shared", "-fPIC", SRC_C / "machine.c", stub, "-o", library])
    loaded = ct.CDLL(str(library))
    for name in ("fbn_cache_of_leaf", "fbn_cache_of_folder", "fbn_believed_cache", "fbn_cache_bytes"):
        getattr(loaded, name).restype = ct.c_int64
    return loaded


def leaf(kind: int, level: int, ways: int, partitions: int, line: int, sets: int) -> ct.Array[ct.c_uint32]:
    """An answer of CPUID's leaf 4 (Intel) or 0x8000001D (AMD)."""
    ebx = (ways - 1) << 22 | (partitions - 1) << 12 | (line - 1)
    return (ct.c_uint32 * 4)(kind | level << 5, ebx, sets - 1, 0)


# Zen 5: L1 48 KiB of data, L2 1 MiB, L3 32 MiB. Ice Lake: L1 48 KiB, L2 1.25 MiB, L3 54 MiB.
LEAVES = [
    (leaf(1, 1, 12, 1, 64, 64), 1, 48 * KB),
    (leaf(2, 1, 8, 1, 64, 64), 1, 0),  # of instructions
    (leaf(3, 2, 16, 1, 64, 1024), 2, MB),
    (leaf(3, 2, 16, 1, 64, 1024), 3, 0),
    (leaf(3, 3, 16, 1, 64, 32768), 3, 32 * MB),
    (leaf(3, 2, 20, 1, 64, 1024), 2, 5 * MB // 4),
    (leaf(3, 3, 12, 1, 64, 73728), 3, 54 * MB),
    (leaf(3, 3, 1024, 1024, 4096, 1 << 20), 3, 1 << 52),  # whatever it is, it does not wrap
    ((ct.c_uint32 * 4)(0, 0, 0, 0), 3, 0),  # hidden by a virtual machine
]


@pytest.mark.parametrize(("answer", "level", "size"), LEAVES)
def test_leaves(machine: ct.CDLL, answer: ct.Array[ct.c_uint32], level: int, size: int) -> None:
    assert machine.fbn_cache_of_leaf(answer, level) == size


BELIEFS = [
    ([32 * MB, 384 * MB], 3, 32 * MB),  # glibc up to 2.36 on AMD
    ([0, 32 * MB], 3, 32 * MB),  # a virtual machine whose leaf is all zeros
    ([1 << 40, 32 * MB], 3, 32 * MB),  # or says 1 TiB
    ([1 << 40, 0], 3, 0),
    ([32 * MB, 0], 3, 32 * MB),
    ([32 * MB, -1], 3, 32 * MB),
    ([12, 32 * MB], 3, 32 * MB),  # too small for a last cache
    ([504 * MB, 600 * MB], 3, 504 * MB),
    ([MB, 2 * MB], 2, MB),
    ([1 << 30, MB], 2, MB),
    ([48 * KB, 32 * KB], 1, 32 * KB),
    ([0, 0], 2, 0),
    ([], 2, 0),
    ([MB], 0, 0),
    ([MB], 4, 0),
]


@pytest.mark.parametrize(("answers", "level", "size"), BELIEFS, ids=str)
def test_the_smallest_plausible_answer(machine: ct.CDLL, answers: list[int], level: int, size: int) -> None:
    assert machine.fbn_believed_cache(level, (ct.c_int64 * len(answers))(*answers), len(answers)) == size


def sysfs(folder: Path, *caches: tuple[str, str, str]) -> Path:
    """A folder like /sys/devices/system/cpu/cpu0/cache, of (level, type, size)."""
    for index, values in enumerate(caches):
        (folder / f"index{index}").mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / f"index{index}" / name).write_text(value + "\n", encoding="ascii")
    return folder


def test_the_files_of_linux(machine: ct.CDLL, tmp_path: Path) -> None:
    caches = ("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32M")
    folder = str(sysfs(tmp_path, *caches)).encode()
    assert [machine.fbn_cache_of_folder(folder, level) for level in (1, 2, 3)] == [48 * KB, MB, 32 * MB]


@pytest.mark.parametrize("size", ["", "none", "-1", "K"])
def test_files_that_make_no_sense(machine: ct.CDLL, tmp_path: Path, size: str) -> None:
    folder = str(sysfs(tmp_path, ("3", "Unified", size))).encode()
    assert machine.fbn_cache_of_folder(folder, 3) == 0
    assert machine.fbn_cache_of_folder(str(tmp_path / "nowhere").encode(), 3) == 0
    assert machine.fbn_cache_of_folder(b"/" + b"x" * 5000, 3) == 0


def test_this_machine_is_plausible(machine: ct.CDLL) -> None:
    sizes = [machine.fbn_cache_bytes(level) for level in (1, 2, 3)]
    assert all(size == 0 or 4 * KB <= size <= GB for size in sizes), sizes


# Containers ----------------------------------------------------------------------------------------------------------


def files(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


V1 = "12:pids:/job\n4:cpu,cpuacct:/job/inner\n1:name=systemd:/job\n"
QUOTAS: dict[str, tuple[dict[str, str], int | None]] = {
    "none": ({}, None),
    "v2 max": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "v2 in its own namespace": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    "v2 half a processor": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "v2 exactly": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "400000 100000\n"}, 4),
    "v2 of a group around": (
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            "sys/fs/cgroup/a/b/c/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "v2 the smallest": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "700000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
        },
        3,
    ),
    "v2 the host's path": ({"proc/self/cgroup": "0::/host/x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "v1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/job/inner/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/inner/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "v1 without a quota": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "v1 in a container": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "no sense": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "lots 0\n"}, None),
    "a period of 0": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
    "lines of no form": ({"proc/self/cgroup": "what\n::\n\n"}, None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_quotas(name: str, tmp_path: Path) -> None:
    texts, processors = QUOTAS[name]
    assert cgroup.quota(files(tmp_path, texts)) == processors


# Kernels -------------------------------------------------------------------------------------------------------------


def test_the_preferred_table(tmp_path: Path) -> None:
    """It may have the sums of AVX2 and the maps of AVX-512: each alone gives the same bits."""
    if "avx512" not in cases.isas():
        pytest.skip("the processor has no AVX-512")
    assert c_api.run([c_api.build(Path(__file__).with_name("tables.c"), tmp_path / "tables")]) == "the same\n"


# 32 bits -------------------------------------------------------------------------------------------------------------


def test_sizes_of_32_bits(tmp_path: Path) -> None:
    """A workspace or a plan that a size_t cannot count is refused, not wrapped."""
    compiler, program = c_api.compiler("cc", "gcc", "clang"), tmp_path / "sizes"
    core = [path for path in SRC_C.glob("*.c") if path.stem != "dispatch"]
    flags = ["-m32", "-msse2", "-mfpmath=sse", "-std=c11", "-O1"]
    command = [compiler, *flags, Path(__file__).with_name("sizes.c"), *core, "-lm", "-o", program]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode and (
        "bits/libc-header-start.h" in done.stderr or "cannot find" in done.stderr or "-m32" in done.stderr
    ):
        pytest.skip("this compiler has no libraries of 32 bits")
    assert done.returncode == 0, done.stderr
    assert c_api.run([program]) == "right\n"


# Other processors ----------------------------------------------------------------------------------------------------


def test_any_nan_that_a_processor_computes(tmp_path: Path) -> None:
    """The baseline must not round one of SPARC's to -0."""
    compiler, program = c_api.compiler("cc", "gcc", "clang"), tmp_path / "nans"
    source = Path(__file__).with_name("nans.c")
    for more in ([], ["-D__has_builtin(name)=0"]):
        c_api.run([compiler, "-std=c11", "-O1", "-w", *more, source, "-lm", "-o", program])
        assert c_api.run([program]) == "right\n"
