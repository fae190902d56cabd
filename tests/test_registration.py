"""Every registered operator: opcheck, and a launcher that takes exactly the operator's arguments."""

import importlib
import inspect

import pytest
import test_fold
import test_layer_norm
import test_linear
import torch
from helpers import KERNEL_TESTS
from torch.library import opcheck

from vitkernels.ops import _register

pytestmark = KERNEL_TESTS
# A stem with kernels: where its launchers are, and its test module, which lists arguments for each of its operators.
STEMS = {"layer_norm": test_layer_norm, "linear": test_linear, "linear_bwd": test_linear, "folded_linear": test_fold}


def arguments(name=None):
    """The argument lists to try for one operator, or for all. Made inside a test, so that they are on its device."""
    by_name = {key: value for module in STEMS.values() for key, value in module.opcheck_arguments().items()}
    return by_name if name is None else by_name[name]


def test_every_registered_operator_is_checked_here():
    assert set(arguments()) == set(_register.NAMES)


@pytest.mark.parametrize("name", _register.NAMES)
def test_operators_pass_opcheck(name):
    for args in arguments(name):
        opcheck(getattr(torch.ops.vitkernels, name), args)


@pytest.mark.parametrize("name", _register.NAMES)
def test_operators_pass_opcheck_on_a_cpu_without_the_interpreter(name, no_interpreter):
    with torch.device("cpu"):
        for args in arguments(name):
            opcheck(getattr(torch.ops.vitkernels, name), args)


@pytest.mark.parametrize("name", _register.NAMES)
def test_kernel_and_reference_of_an_operator_agree(name, no_interpreter, monkeypatch):
    for args in arguments(name):
        reference = getattr(torch.ops.vitkernels, name)(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
        with monkeypatch.context() as m:
            m.setattr("vitkernels._env.INTERPRETING", True)
            kernel = getattr(torch.ops.vitkernels, name)(*args)
        for a, b in zip(kernel, reference, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("name", _register.NAMES)
def test_a_launcher_has_the_arguments_of_its_schema(name):
    modules = [importlib.import_module(f"vitkernels.kernels.{stem}") for stem in STEMS]
    (launcher,) = [getattr(m, f"launch_{name}") for m in modules if hasattr(m, f"launch_{name}")]
    schema = getattr(torch.ops.vitkernels, name).default._schema
    assert list(inspect.signature(launcher).parameters) == [a.name for a in schema.arguments]
