"""The package builds, and refuses to build, as setup.py says. Builds run on a copy of the tree and need no network."""

import email
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("benchmarks", "csrc", "tests", "vitkernels")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PIP_INSTALL = ("-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps", ".", "--target")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) and "CI" not in os.environ, reason="needs a C++ compiler"
)


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tree


def run(tree, *arguments, **variables):
    """Runs this Python in `tree`; what the machine's owner set for builds is left out."""
    owners = ("CXX", "CXXFLAGS", "CUDACXX", "CUDAARCHS", "VITKERNELS_BUILD_CUDA")
    environment = {k: v for k, v in os.environ.items() if k not in owners and not k.startswith("PIP_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True)


def empty(tmp_path):
    """A folder to use as the PATH, where neither nvcc nor a compiler is found."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def load_extension(path):
    spec = importlib.util.spec_from_file_location("vitkernels._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_compiler
def test_wheel_built_from_the_sdist_is_complete(tree, tmp_path):
    (tree / "vitkernels/kernels/table.json").write_text("{}")
    sources = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    built = run(tree, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", VITKERNELS_BUILD_CUDA="0")
    assert built.returncode == 0, built.stdout + built.stderr

    (sdist,) = tmp_path.glob("dist/*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert sources <= in_sdist, sorted(sources - in_sdist)

    (wheel,) = tmp_path.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        archive.extractall(tmp_path / "wheel")
    package = {name for name in sources if name.startswith("vitkernels/")}
    (extension,) = (name for name in in_wheel if name.startswith("vitkernels/_C."))
    info = {name for name in in_wheel if name.split("/")[0].endswith(".dist-info")}
    assert in_wheel - info == package | {extension}

    (info,) = tmp_path.glob("wheel/*.dist-info")
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "vitkernels = vitkernels.cli:main" in (info / "entry_points.txt").read_text()
    metadata = email.message_from_string((info / "METADATA").read_text())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    requirements = metadata.get_all("Requires-Dist")
    assert all(">=" in requirement and "<" in requirement for requirement in requirements), requirements

    code = f"""
import test_build
module = test_build.load_extension({str(tmp_path / "wheel" / extension)!r})
print(module.build_info(), module.cuda_versions(), [name for name in dir(module) if name.startswith("resample_forward")])
"""
    loaded = run(ROOT / "tests", "-c", code)  # in its own process: a module is loaded once
    assert loaded.returncode == 0, loaded.stderr
    assert "'cuda': None, 'architectures': []} (None, None) ['resample_forward_cpu']" in loaded.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_wheel_with_cuda_imports_and_fails_cleanly_without_a_driver(tree, tmp_path):
    options = ("--wheel", "--no-isolation", "--outdir", tmp_path / "dist")
    built = run(tree, "-m", "build", *options, VITKERNELS_BUILD_CUDA="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (extension,) = (name for name in archive.namelist() if name.startswith("vitkernels/_C."))
        archive.extract(extension, tmp_path)
    # In another process: the module of this one may be loaded already.
    code = f"""
import test_build
module = test_build.load_extension({str(tmp_path / extension)!r})
print(*module.build_info()["architectures"])
if module.cuda_versions()[1] is None:
    try:
        module.resample_forward_cuda(0, 0, 0, 1, 1, 4, 0, 0, True, True, False, False, [2, 2], 0, 0)
    except RuntimeError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    architectures, *error = result.stdout.splitlines()
    # Those of them that this nvcc knows, and the last one's PTX for what comes after.
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [number for number in ARCHITECTURES if f"compute_{number}" in listed]
    assert architectures.split() == [*(f"sm_{number}" for number in known), f"compute_{known[-1]}"]
    assert not error or error[0].startswith("resampling: "), error


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("wanted", "architectures"), [("90", ["sm_90", "compute_90"]), ("7", None)])
def test_cuda_is_built_for_the_architectures_that_were_asked_for(tree, tmp_path, wanted, architectures):
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    built = run(tree, "setup.py", "build_ext", *folders, VITKERNELS_BUILD_CUDA="1", CUDAARCHS=wanted)
    if architectures is None:
        assert built.returncode != 0
        assert f"compiles for none of the architectures {wanted}" in " ".join((built.stdout + built.stderr).split())
        return
    assert built.returncode == 0, built.stdout + built.stderr
    (extension,) = tmp_path.glob("lib/vitkernels/_C*")
    code = f"import test_build; print(test_build.load_extension({str(extension)!r}).build_info()['architectures'])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert loaded.stdout.strip() == str(architectures), loaded.stderr


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("1", "vitkernels: VITKERNELS_BUILD_CUDA=1, but nvcc was not found on the PATH"),
        ("yes", "vitkernels: VITKERNELS_BUILD_CUDA is 'yes'; accepted: auto, 1, 0"),
    ],
)
def test_one_line_says_why_cuda_cannot_be_built(tree, tmp_path, value, line):
    path = str(empty(tmp_path))
    installed = run(tree, *PIP_INSTALL, tmp_path / "site", PATH=path, VITKERNELS_BUILD_CUDA=value)
    assert installed.returncode != 0
    output = installed.stdout + installed.stderr
    assert output.count(line) == 1, output
    assert "Traceback" not in output

    built = run(tree, "setup.py", "build_ext", "--inplace", PATH=path, VITKERNELS_BUILD_CUDA=value)
    assert built.returncode != 0
    assert built.stderr.strip() == line


def test_installs_without_a_compiler_and_warns_once(tree, tmp_path):
    installed = run(tree, *PIP_INSTALL, tmp_path / "site", PATH=str(empty(tmp_path)))
    output = installed.stdout + installed.stderr
    assert installed.returncode == 0, output
    assert output.count("no C++ compiler was found, installing without vitkernels._C") == 1, output
    assert (tmp_path / "site/vitkernels/__init__.py").is_file()
    assert not list(tmp_path.glob("site/vitkernels/_C*"))


def test_a_compiler_that_was_named_must_exist(tree):
    built = run(tree, "setup.py", "build_ext", "--inplace", CXX="no-such-compiler")
    assert built.returncode != 0
    assert built.stderr.strip() == "vitkernels: CXX names 'no-such-compiler', which was not found"


@needs_compiler
def test_sources_that_do_not_compile_fail_the_build(tree):
    (tree / "csrc/pos_embed_cpu.cpp").write_text("#error broken on purpose\n")
    built = run(tree, "setup.py", "build_ext", "--inplace", VITKERNELS_BUILD_CUDA="0")
    assert built.returncode != 0
    assert "broken on purpose" in built.stdout + built.stderr
    assert built.stderr.strip().endswith("vitkernels: building vitkernels._C failed, see the messages above")
    assert not list(tree.glob("vitkernels/_C*"))


@needs_compiler
@pytest.mark.parametrize("value", ["auto", "1"])
def test_an_nvcc_that_fails_fails_the_build(tree, tmp_path, value):
    nvcc = empty(tmp_path) / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken on purpose >&2\nexit 1\n")
    nvcc.chmod(0o755)
    built = run(tree, "setup.py", "build_ext", "--inplace", CUDACXX=str(nvcc), VITKERNELS_BUILD_CUDA=value)
    assert built.returncode != 0
    assert "broken on purpose" in built.stderr
    assert "VITKERNELS_BUILD_CUDA=0 builds without CUDA" in built.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("named", [False, True])
def test_nvcc_chooses_its_host_compiler_unless_cxx_names_one(tree, tmp_path, named):
    """Ubuntu's nvcc 12.0 refuses the system's GCC 13, and comes with a g++ of its own."""
    nvcc = empty(tmp_path) / "nvcc"
    refuses = 'case "$*" in *CMakeCUDACompilerId.cu) echo "$*" >> "$0.log"; exit 1;; esac'  # the first that it compiles
    nvcc.write_text(f'#!/bin/sh\n{refuses}\nexec "{shutil.which("nvcc")}" "$@"\n')
    nvcc.chmod(0o755)
    cxx = {"CXX": shutil.which("c++") or shutil.which("g++")} if named else {}
    run(tree, "setup.py", "build_ext", "--inplace", CUDACXX=str(nvcc), VITKERNELS_BUILD_CUDA="1", **cxx)
    assert ("-ccbin" in nvcc.with_name("nvcc.log").read_text()) == named


def test_build_info_of_the_installed_extension():
    if importlib.util.find_spec("vitkernels._C") is None:
        if "CI" in os.environ:
            pytest.fail("CI must build vitkernels._C")
        pytest.skip("vitkernels._C is not built")
    extension = importlib.import_module("vitkernels._C")
    info = extension.build_info()
    assert set(info) == {"compiler", "cuda", "architectures"}
    assert info["compiler"]
    runtime, driver = extension.cuda_versions()
    if info["cuda"] is None:
        assert info["architectures"] == []
        assert (runtime, driver) == (None, None)
    else:
        *binaries, ptx = info["architectures"]
        if int(info["cuda"].split(".")[0]) == 13:  # this one knows them all
            assert binaries == [f"sm_{number}" for number in ARCHITECTURES]
        assert "sm_90" in binaries
        assert ptx == binaries[-1].replace("sm_", "compute_")
        assert info["cuda"].startswith(f"{runtime // 1000}.")
        assert driver is None or driver >= 1000
