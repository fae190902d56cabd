"""The tree of DESIGN section 2: arrows go down only, each stem has its parts, heavy imports stay where they belong."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import vitkernels

PACKAGE = Path(vitkernels.__file__).parent
TESTS = Path(__file__).parent
STEMS = {
    "patch_embed": ("patch_embed",),
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "attention": ("attention", "attention_qkv"),
    "linear": ("linear",),
    "mlp": ("mlp",),
    "pos_embed": ("resample_pos_embed", "resample_pos_embed_many"),
}
# What each layer may import from the package. A layer is a folder, or a file beside __init__.py.
ALLOWED = {
    "_version": set(),
    "_env": set(),
    "_text": set(),
    "_settings": {"_env"},
    "_recording": set(),
    "_select": {"_env", "_settings", "_recording"},
    "reference": {"reference", "_recording"},
    "kernels": {"kernels", "_env"},
    "ops": {"ops", "reference", "_select", "_recording", "_env"},
    "models": {"models", "ops"},
    "fuse": {"models", "ops", "_text"},
    "cli": None,  # the top: anything
    "__init__": None,
    "__main__": {"cli"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Absolute names of all modules that a file imports, at any depth of its code."""
    package = ["vitkernels", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_go_down_only(path):
    allowed = ALLOWED[layer(path)]
    if allowed is None:
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "vitkernels" and len(parts) > 1:
            assert parts[1] in allowed, f"{layer(path)} must not import {name}"


@pytest.mark.parametrize(
    ("module", "layers"),
    [("triton", {"kernels", "_env"}), ("timm", {"models", "fuse", "cli"}), ("torch.library", {"ops"})],
    ids=["triton", "timm", "torch.library"],
)
def test_a_heavy_module_has_one_home(module, layers):
    for path in FILES:
        used = any(name == module or name.startswith(module + ".") for name in imports(path))
        used |= module == "torch.library" and "torch.library." in path.read_text()
        assert not used or layer(path) in layers, f"{path.relative_to(PACKAGE)} uses {module}"


def test_this_test_sees_an_upward_import(tmp_path, monkeypatch):
    """The checks above can fail: an upward import, relative and inside a function, is found."""
    monkeypatch.setattr("test_layering.PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    path = tmp_path / "ops" / "linear.py"
    path.write_text("def f():\n    from ..models.block import FusedBlock\n")
    with pytest.raises(AssertionError, match=r"ops must not import vitkernels\.models"):
        test_arrows_go_down_only(path)


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_has_its_parts(stem):
    ops = importlib.import_module(f"vitkernels.ops.{stem}")
    reference = importlib.import_module(f"vitkernels.reference.{stem}")
    assert callable(ops.why_not)
    assert (TESTS / f"test_{stem}.py").exists()
    for name in STEMS[stem]:
        public, oracle = getattr(ops, name), getattr(reference, name)
        assert getattr(vitkernels.ops, name) is public
        assert getattr(vitkernels.reference, name) is oracle
        assert "Args:" in public.__doc__
        assert "Raises:" in public.__doc__
        signatures = [[(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()] for f in (public, oracle)]
        assert signatures[0] == signatures[1], f"{name}: operator and reference differ in signature"


def test_every_public_operator_belongs_to_a_stem():
    names = {name for group in STEMS.values() for name in group}
    assert set(vitkernels.ops.__all__) == set(vitkernels.reference.__all__) == names


def test_a_stem_that_registers_operators_has_kernels_and_a_benchmark():
    for stem in STEMS:
        source = (PACKAGE / "ops" / f"{stem}.py").read_text()
        if "register(" in source:
            kernels = [PACKAGE / "kernels" / f"{stem}.py", PACKAGE.parent / "csrc" / f"{stem}.cuh"]
            assert any(path.exists() for path in kernels)
            assert (PACKAGE.parent / "benchmarks" / f"bench_{stem}.py").exists()
