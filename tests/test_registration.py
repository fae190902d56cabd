"""Every registered operator: opcheck, and a launcher that takes exactly the operator's arguments."""

import importlib.util
import inspect

import pytest
import test_attention
import test_fold
import test_layer_norm
import test_linear
import test_mlp
import test_patch_embed
import test_pos_embed
import torch
from helpers import KERNEL_TESTS, assert_within_budget
from torch.library import opcheck

from vitkernels.ops import _register

pytestmark = KERNEL_TESTS
# Where launchers are (kernel files, or ops/ for those of csrc/), and the test module of their stem, which lists arguments for
# each of its operators.
STEMS = {
    "layer_norm": test_layer_norm,
    "attention": test_attention,
    "attention_backward": test_attention,
    "folded_linear": test_fold,
    "linear": test_linear,
    "linear_bwd": test_linear,
    "mlp": test_mlp,
    "patch_embed": test_patch_embed,
    "patch_embed_backward": test_patch_embed,
    "pos_embed": test_pos_embed,
}


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
def test_operators_pass_opcheck_on_a_cpu_without_kernels(name, no_interpreter, monkeypatch):
    monkeypatch.setattr("vitkernels._env.EXTENSION", None)
    with torch.device("cpu"):
        for args in arguments(name):
            opcheck(getattr(torch.ops.vitkernels, name), args)


@pytest.mark.parametrize("name", _register.NAMES)
def test_results_on_a_cpu_without_kernels_lie_as_the_fakes_say_however_the_arguments_do(name, no_interpreter, monkeypatch):
    def transposed(a):
        return a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.dim() > 1 else a

    monkeypatch.setattr("vitkernels._env.EXTENSION", None)
    with torch.device("cpu"):
        for args in arguments(name):
            opcheck(getattr(torch.ops.vitkernels, name), tuple(map(transposed, args)), test_utils=("test_faketensor",))


def assert_kernel_is_right(name, args):
    """An operator's kernel is within the error budget of its reference; ``benchmarks/round_steps.py`` asks this on a GPU, too.

    Four rounding steps (16 in float32) of the coarsest dtype of its arguments: with results of a few hundred numbers eager's
    own error is a matter of luck, and sums that are returned in float32 are of numbers that were rounded to that dtype.
    """

    def reference(convert):
        with pytest.MonkeyPatch.context() as m, torch.device("cpu"):
            m.setattr("vitkernels._env.INTERPRETING", False)
            m.setattr("vitkernels._env.EXTENSION", None)
            return results(operator(*map(convert, args)))

    def results(found):
        return (found,) if isinstance(found, torch.Tensor) else found

    def on_cpu(a):
        return a.cpu() if isinstance(a, torch.Tensor) else a

    def in_float64(a):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            return a.cpu().double()
        return torch.float64 if isinstance(a, torch.dtype) else on_cpu(a)

    operator = getattr(torch.ops.vitkernels, name)
    dtypes = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
    eps = max(torch.finfo(d).eps for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point)
    step = (16 if eps == torch.finfo(torch.float32).eps else 4) * eps
    with pytest.MonkeyPatch.context() as m:
        m.setattr("vitkernels._env.INTERPRETING", True)
        kernel = results(operator(*args))
    for i, (mine, eager, oracle) in enumerate(zip(kernel, reference(on_cpu), reference(in_float64), strict=True)):
        assert_within_budget(f"{name}, result {i}", mine.cpu(), eager, oracle, step)


@pytest.mark.parametrize("name", _register.NAMES)
def test_kernel_and_reference_of_an_operator_agree(name):
    for args in arguments(name):
        assert_kernel_is_right(name, args)


@pytest.mark.parametrize("name", _register.NAMES)
def test_a_launcher_has_the_arguments_of_its_schema(name):
    homes = [f"vitkernels.{layer}.{stem}" for stem in STEMS for layer in ("kernels", "ops")]
    modules = [importlib.import_module(home) for home in homes if importlib.util.find_spec(home)]
    (launcher,) = [getattr(m, f"launch_{name}") for m in modules if hasattr(m, f"launch_{name}")]
    schema = getattr(torch.ops.vitkernels, name).default._schema
    assert list(inspect.signature(launcher).parameters) == [a.name for a in schema.arguments]
