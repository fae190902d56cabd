"""Drives CMake over csrc/ to build vitkernels._C; everything else about the package is in pyproject.toml.

VITKERNELS_BUILD_CUDA: auto (default) builds the CUDA part when nvcc is found, 1 insists on it, 0 leaves it out.
CUDAARCHS: the architectures to build it for, as CMake has them ("90", "80;90"); default: all of sm_80 to sm_120.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"


def fail(reason: str) -> NoReturn:
    # SystemExit, not an exception: setuptools and pip would bury the line under a traceback.
    raise SystemExit(f"vitkernels: {reason}")


def find_compiler(variable: str, names: tuple[str, ...]) -> str | None:
    """The first of `names` on the PATH; a compiler the user named in `variable` must be there."""
    if named := shlex.split(os.environ.get(variable, "")):
        return shutil.which(named[0]) or fail(f"{variable} names {named[0]!r}, which was not found")
    return next(filter(None, map(shutil.which, names)), None)


def find_nvcc(cxx: str | None) -> str | None:
    mode = os.environ.get("VITKERNELS_BUILD_CUDA") or "auto"
    if mode not in ("auto", "1", "0"):
        fail(f"VITKERNELS_BUILD_CUDA is {mode!r}; accepted: auto, 1, 0")
    nvcc = find_compiler("CUDACXX", ("nvcc",)) if mode != "0" else None
    if mode == "1" and nvcc is None:
        fail("VITKERNELS_BUILD_CUDA=1, but nvcc was not found on the PATH")
    if mode == "1" and cxx is None:
        fail("VITKERNELS_BUILD_CUDA=1, but no C++ compiler was found on the PATH")
    return nvcc


def build_tool(name: str, folder: str) -> str:
    # The wheel's tool first: while its virtual environment is not activated, the PATH has the system's, maybe too old.
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(name), folder))
    except (ImportError, AttributeError):
        path = None
    return path or shutil.which(name) or fail(f"{name} was not found; `pip install {name}` provides it")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        pybind11 = importlib.import_module("pybind11")
        cmake, ninja = build_tool("cmake", "CMAKE_BIN_DIR"), build_tool("ninja", "BIN_DIR")
        folder = Path(self.build_temp).resolve() / "csrc"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if NVCC:
            options["CMAKE_CUDA_COMPILER"] = NVCC
        # --fresh: under build isolation the paths in the cache of an earlier build are gone.
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", CSRC, "-B", folder]
        try:
            subprocess.run(configure + [f"-D{key}={value}" for key, value in options.items()], check=True)
            subprocess.run([cmake, "--build", folder], check=True)
        except subprocess.CalledProcessError:
            hint = "; VITKERNELS_BUILD_CUDA=0 builds without CUDA" if NVCC else ""
            fail(f"building vitkernels._C failed, see the messages above{hint}")


CXX = find_compiler("CXX", ("c++", "g++", "clang++", "cl"))
NVCC = find_nvcc(CXX)
if CXX is None and not {"egg_info", "dist_info", "sdist"}.intersection(sys.argv):
    print("vitkernels: warning: no C++ compiler was found, installing without vitkernels._C", file=sys.stderr)

setup(ext_modules=[Extension("vitkernels._C", sources=[])] if CXX else [], cmdclass={"build_ext": CMakeBuild})
