"""How is Cython code compiled against an installed fastbn? With its header and its static library."""

import shlex
import subprocess
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

import fastbn

libs = subprocess.check_output([sys.executable, "-m", "fastbn", "info", "--libs"], text=True)

layer = Extension(
    "layer", ["layer.pyx"], include_dirs=[fastbn.get_include()], extra_link_args=shlex.split(libs, posix=True)
)
setup(name="layer", ext_modules=cythonize([layer]))
