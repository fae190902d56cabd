"""Every registered operator: opcheck, and a launcher that takes exactly the operator's arguments."""

import importlib
import inspect

import pytest
import test_layer_norm
import torch
from torch.library import opcheck

from vitkernels.ops import _register

# Each stem with a kernel lists arguments for its operators; dict order is the order of the report.
ARGUMENTS = {**test_layer_norm.opcheck_arguments()}
KERNEL_MODULES = ("layer_norm",)


def test_every_registered_operator_is_checked_here():
    assert set(ARGUMENTS) == set(_register.NAMES)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_pass_opcheck_interpreted(name):
    for args in ARGUMENTS[name]:
        opcheck(getattr(torch.ops.vitkernels, name), args)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_pass_opcheck_on_a_cpu_without_the_interpreter(name, no_interpreter):
    for args in ARGUMENTS[name]:
        opcheck(getattr(torch.ops.vitkernels, name), args)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_kernel_and_reference_of_an_operator_agree(name, monkeypatch):
    """The two implementations of the CPU key: what the interpreter computes and what a user without it gets."""
    for args in ARGUMENTS[name]:
        kernel = getattr(torch.ops.vitkernels, name)(*args)
        with monkeypatch.context() as m:
            m.setattr("vitkernels._env.INTERPRETING", False)
            reference = getattr(torch.ops.vitkernels, name)(*args)
        for a, b in zip(kernel, reference, strict=True):
            torch.testing.assert_close(a, b, atol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_launcher_has_the_arguments_of_its_schema(name):
    modules = [importlib.import_module(f"vitkernels.kernels.{stem}") for stem in KERNEL_MODULES]
    (launcher,) = [getattr(m, f"launch_{name}") for m in modules if hasattr(m, f"launch_{name}")]
    schema = getattr(torch.ops.vitkernels, name).default._schema
    assert list(inspect.signature(launcher).parameters) == [a.name for a in schema.arguments]
