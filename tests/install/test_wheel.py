"""Does the wheel that would be published work in fresh environments, and leave them as they were?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
from installing import Environment, run

NewEnvironment = Callable[..., Environment]
TRAIN = "import numpy as np, fastbn; print(fastbn.forward(np.array([[1.0], [3.0]]), eps=0.0).y.tolist()); "
TRAINED = "[[-1.0], [1.0]]"
WELL = re.compile(r"all \d+ checks passed")


def replaced(wheel: Path, folder: Path, version: str, **extra: str) -> Path:
    """The wheel as it would have been in another version, with further files."""
    tag = wheel.name.split("-", 2)[2]
    other = folder / f"fastbn-{version}-{tag}"
    before = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/METADATA"):
                content = content.replace(f"Version: {before}".encode(), f"Version: {version}".encode(), 1)
            if name.endswith("/RECORD"):
                content = content.replace(f"fastbn-{before}.dist-info".encode(), f"fastbn-{version}.dist-info".encode())
                content += "".join(f"{path},,\n" for path in extra).encode()
            target.writestr(name.replace(f"fastbn-{before}.dist-info", f"fastbn-{version}.dist-info"), content)
        for path, text in extra.items():
            target.writestr(path, text)
    return other


@pytest.fixture(scope="module")
def installed(wheel: Path, new_environment: NewEnvironment) -> Environment:
    """The wheel and NumPy."""
    return new_environment(str(wheel))


# The wheel -----------------------------------------------------------------------------------------------------------

FILES = (
    r"\.(py|pyi|pxd|typed)$",
    r"^fastbn/_backends/c/bridge\.[\w-]+\.(so|pyd)$",
    r"^fastbn/include/fastbn\.h$",
    r"^fastbn/bench/limit\.c$",  # which the bench compiles for the machine
    r"^fastbn/lib/(libfastbn\.a|fastbn\.lib|link-flags\.txt)$",
    r"^fastbn(\.libs|/\.dylibs)/(libgomp|libomp|vcomp140|vcruntime140)[\w.-]*\.(so[.\d]*|dylib|dll)$",
    r"^fastbn-[\d.]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|entry_points\.txt|licenses/.*|sboms/.*)$",
)


def test_what_is_in_it(wheel: Path) -> None:
    """No sources in C or Cython, no tests, an OpenMP, and licences; a megabyte or two."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    assert [name for name in names if not any(re.search(pattern, name) for pattern in FILES)] == []
    assert not [name for name in names if "test" in Path(name).name]
    assert [name for name in names if re.search("gomp|libomp|vcomp", name) and not name.endswith(".txt")]
    assert {"LICENSE", "libgomp.txt", "libomp.txt"} <= {Path(name).name for name in names}
    assert wheel.stat().st_size < 2_000_000
    print(wheel.name, wheel.stat().st_size, *(name for name in names if ".libs/" in name))


def test_checkers(built: Path, wheel: Path, tools: Environment) -> None:
    """The second gets the wheel as it was built: it takes the folder that auditwheel adds for a package."""
    tools.run("-m", "twine", "check", "--strict", wheel)
    checker = tools.python.parent / "check-wheel-contents"
    # W004: PyInstaller wants its hook in a file of this name, which cannot be imported: hook-fastbn.py.
    assert "OK" in run(checker, "--ignore", "W004", built, folder=tools.folder)


# Fresh environments ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="the search path has the system's libraries there")
def test_without_a_compiler(wheel: Path, new_environment: NewEnvironment) -> None:
    """Nothing is found on the search path, and the compiler's name is that of a program that fails."""
    environment = new_environment(str(wheel), "pytest", "hypothesis", "ml_dtypes")
    nothing = {"PATH": "/nonexistent", "CC": "/bin/false", "CXX": "/bin/false"}
    assert WELL.search(environment.run("-m", "fastbn", "test", **nothing))
    shutil.copytree(cases.CHECKOUT / "tests", environment.folder / "tests")
    shutil.copy(cases.CHECKOUT / "pyproject.toml", environment.folder)
    some = ["tests/call/test_ops.py", "tests/call/test_layouts.py", "tests/layers/test_inference.py"]
    printed = environment.run("-P", "-m", "pytest", "-q", *some, **nothing)
    assert re.search(r"^\d+ passed", printed.splitlines()[-1]), printed


def test_uninstalled(wheel: Path, new_environment: NewEnvironment) -> None:
    """Nothing is left, although it was used."""
    environment = new_environment("numpy")
    before = environment.files()
    environment.pip("install", wheel)
    environment.run("-c", TRAIN, FASTBN_CACHE_DIR=str(environment.folder / "cache"))
    assert len(environment.files() - before) > 100
    environment.pip("uninstall", "--yes", "fastbn")
    assert environment.files() == before
    assert not list(environment.packages.glob("fastbn*"))


def test_upgraded(wheel: Path, installed: Environment, tmp_path: Path) -> None:
    """An older version goes, with the modules that the newer one has no more."""
    older = replaced(wheel, tmp_path, "0.0.9", **{"fastbn/former.py": "", "fastbn/former/__init__.py": ""})
    installed.pip("install", "--no-deps", "--force-reinstall", older)
    show = "import fastbn; print(fastbn.__version__)"
    assert installed.run("-c", show).strip() == "0.0.9"
    assert (installed.packages / "fastbn/former").is_dir()
    installed.pip("install", "--no-deps", "--upgrade", wheel)
    assert installed.run("-c", show).strip() == wheel.name.split("-")[1]
    assert not list((installed.packages / "fastbn").glob("former*"))
    assert installed.run("-c", TRAIN).strip() == TRAINED


def test_editable_and_back(wheel: Path, checkout: Path, new_environment: NewEnvironment) -> None:
    """An editable installation takes the place of the wheel, and the wheel its place again."""
    build = ["setuptools>=77", "wheel", "Cython>=3.1", "numpy>=2.0"]
    environment = new_environment(str(wheel), *build)
    before = environment.files()
    where = TRAIN + "print(fastbn.__file__, fastbn.get_include(), fastbn.get_backend())"
    installed = environment.run("-c", where)
    environment.pip("install", "--no-build-isolation", "--no-deps", "--editable", checkout)
    package = checkout / "fastbn"
    assert environment.run("-c", where).split("\n")[:2] == [
        TRAINED,
        f"{package / '__init__.py'} {package / 'include'} c",
    ]
    environment.pip("install", "--no-deps", "--force-reinstall", wheel)
    assert environment.run("-c", where) == installed
    assert environment.files() == before


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="needs a second user, who may not write")
def test_nothing_can_be_written(installed: Environment, tmp_path: Path) -> None:
    """Neither into the package nor into a home folder, by a user who has none."""
    os.chmod(installed.folder, 0o755)
    for folder in installed.folder.parents:
        if not os.stat(folder).st_mode & 0o001:
            os.chmod(folder, os.stat(folder).st_mode | 0o011)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", installed.python, "-m", "fastbn"]
    printed = run(*nobody, "test", folder=Path("/"), HOME="/nonexistent", XDG_CACHE_HOME="/nonexistent")
    assert WELL.search(printed), printed
    assert "version" in run(*nobody, "info", folder=Path("/"), HOME="/nonexistent", XDG_CACHE_HOME="/nonexistent")


GROUPS = Path("/sys/fs/cgroup/cpu")


@pytest.mark.parametrize(("quota", "threads"), [(50_000, 1), (100_000, 1), (150_000, 2)])
def test_quota(quota: int, threads: int, installed: Environment) -> None:
    """A real control group of version 1, as a container of one processor and a half has it."""
    group = GROUPS / f"fastbn-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text(str(quota))
        script = TRAIN + "print(fastbn.get_num_threads())"
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        printed = run("sh", "-c", enter, "sh", installed.python, "-c", script, folder=installed.folder)
    finally:
        group.rmdir()
    assert printed.split("\n")[:2] == [TRAINED, str(min(threads, len(os.sched_getaffinity(0))))]


def test_in_an_archive(wheel: Path, installed: Environment, tmp_path: Path) -> None:
    """Python loads no compiled extension from an archive: the error says so, and what helps."""
    application = tmp_path / "application.pyz"
    shutil.copy(wheel, application)
    with zipfile.ZipFile(application, "a") as archive:
        archive.writestr("__main__.py", TRAIN)
    with pytest.raises(
        AssertionError, match=r"(?s)ImportError: fastbn was imported from .*an archive.*pip install fastbn"
    ):
        installed.run(application)


def test_frozen(wheel: Path, new_environment: NewEnvironment, tmp_path: Path) -> None:
    """PyInstaller's program runs, without the environment it was made in."""
    environment = new_environment(str(wheel), "pyinstaller")
    backends = "[print(name, fastbn.forward(x, eps=0.0, backend=name).y.tolist()) for name in fastbn.backends()]"
    script = f"{TRAIN}x = np.array([[1.0], [3.0]]); {backends}; print(fastbn.__version__)"
    (tmp_path / "program.py").write_text(script)
    places = ["--distpath", tmp_path, "--workpath", tmp_path / "work", "--specpath", tmp_path]
    environment.run("-m", "PyInstaller", "--onedir", *places, tmp_path / "program.py")
    shutil.rmtree(environment.folder / "env")
    lines = run(tmp_path / "program/program", folder=tmp_path).splitlines()
    assert lines == [TRAINED, f"c {TRAINED}", f"numpy {TRAINED}", wheel.name.split("-")[1]]


# Its neighbours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numpy", ["numpy==1.26.*", "numpy"])
def test_numpy(numpy: str, wheel: Path, new_environment: NewEnvironment) -> None:
    """The oldest that is allowed, and the newest."""
    if numpy != "numpy" and sys.version_info >= (3, 13):
        pytest.skip("there is no such NumPy for this Python")
    assert WELL.search(new_environment(str(wheel), numpy).run("-m", "fastbn", "test"))


def test_openmp_of_torch(wheel: Path, tmp_path: Path) -> None:
    """Torch has an OpenMP runtime of its own: both work in one process, in turns and at once."""
    pytest.importorskip("torch")
    run(
        sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", tmp_path / "site", wheel, folder=tmp_path
    )
    script = Path(__file__).with_name("beside_torch.py")
    printed = run(sys.executable, script, folder=tmp_path, PYTHONPATH=str(tmp_path / "site"), FASTBN_NUM_THREADS="2")
    assert str(tmp_path / "site") in printed
    assert printed.strip().endswith("right"), printed


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14", "3.15", "3.14t", "3.15t"])
def test_python(version: str, built: Path, new_environment: NewEnvironment) -> None:
    """The sdist is compiled for each Python that is found on the search path."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"python{version} is not on the search path")
    if python.endswith(f"python{sys.version_info[0]}.{sys.version_info[1]}"):
        pytest.skip("all other tests use it")
    [sdist] = built.parent.glob("*.tar.gz")
    assert WELL.search(new_environment(str(sdist), python=python).run("-m", "fastbn", "test"))
