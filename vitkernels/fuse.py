"""fuse, unfuse and explain: walk a model and swap the classes of timm's modules.

``module.__class__ = FusedBlock`` adds no parameter, buffer or copy. State dict, optimizer, hooks and checkpoints keep
working, and the reverse assignment undoes it. timm is imported on the first call.
"""

import inspect
import io
import logging
import sys
from dataclasses import dataclass
from numbers import Real
from typing import IO, cast

import torch
from torch import nn

from ._text import Encodable, encoding_of
from .ops import _availability

_logger = logging.getLogger("vitkernels")


@dataclass(frozen=True)
class ModuleReport:
    """One patch embedding, transformer block or attention pooling of a model.

    Attributes:
        fused: it has its fused class, and nothing about it keeps a call from the fused forward. The device and the backend are
            not looked at: ``FusionReport.operators`` and ``note`` are about them.
        reasons: why it is not fused.
        apart: of a fused patch embedding, why prefix tokens and positions are added by timm in steps of their own.
        takes_uint8: of a patch embedding, if it takes pixels of 0 to 255 too (``fuse(model, input="uint8")``).
    """

    name: str
    kind: str
    fused: bool
    reasons: tuple[str, ...]
    apart: tuple[str, ...] = ()
    takes_uint8: bool = False

    @property
    def state(self) -> str:
        """``fused``, or why not, or what of it is not."""
        pixels = "; uint8 images too" if self.takes_uint8 else ""
        if not self.fused:
            return "; ".join(self.reasons) + pixels
        return "fused" + pixels + "".join(f"; positions in timm's own step: {reason}" for reason in self.apart)


@dataclass(frozen=True)
class FusionReport:
    """What ``explain`` found. ``print(report)`` shows tables, in ASCII characters if standard output has no others.

    Attributes:
        modules: one entry per patch embedding, transformer block and attention pooling, fused or with the reasons why not.
        operators: for each operator the reasons why it runs PyTorch's code instead of its kernel on this model's device and
            dtype; an empty tuple means the kernel.
        note: why fused blocks run timm's forward here all the same; empty where they do not.
    """

    modules: tuple[ModuleReport, ...]
    operators: dict[str, tuple[str, ...]]
    note: str = ""

    @property
    def num_fused(self) -> int:
        """How many modules are fused: where kernels can run, these run their fused forward."""
        return sum(m.fused for m in self.modules)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        modules = Table("module", "class", "state", title=f"{self.num_fused} of {len(self.modules)} modules fused")
        for m in self.modules:
            modules.add_row(m.name, m.kind, m.state)
        operators = Table("operator", "runs", title="operators on this model's device and dtype")
        for name, reasons in self.operators.items():
            operators.add_row(name, "kernel" if not reasons else "PyTorch: " + "; ".join(reasons))
        # A string does not know where it will be written; standard output is where print(report) writes it.
        text = io.StringIO()
        stream = cast(IO[str], Encodable(text, encoding_of(sys.stdout)))
        console = Console(file=stream, width=120, force_jupyter=False, force_terminal=False)
        console.print(modules, *([self.note] if self.note else []), operators)
        return text.getvalue()


RECOMPUTE = (None, "mlp")
INPUTS = ("float", "uint8")


def fuse(
    model: nn.Module,
    *,
    strict: bool = False,
    recompute: str | None = None,
    inference: bool = False,
    input: str = "float",
) -> nn.Module:
    """Swap the blocks, patch embeddings and attention pooling of timm models inside ``model`` for fused ones, in place.

    Parameters, state dict, outputs and gradients stay the same. Each call decides anew: while a block has a part that
    vitkernels does not know (RMSNorm, a LoRA layer), hooks on its children or active dropout, it runs timm's forward, and
    ``explain`` says why. So it does while somebody has replaced the forward of one of timm's or PyTorch's classes in it, or a
    function that these call (``torch.nn.functional.scaled_dot_product_attention``, ``linear``, ``layer_norm``, ``gelu``,
    ``silu``, ``conv2d``). Fusing twice is harmless. Fuse before FSDP, DDP or ``torch.compile`` wrap the model,
    and neither fuse nor unfuse while other threads call it. Kernels have first derivatives only: a second one (of gradients
    made with ``create_graph=True``) raises, and inside ``with vitkernels.backend("reference")`` PyTorch's operators give it.

    On a CPU, what ``torch.export``, ``torch.jit`` and ``make_fx`` make of the model holds PyTorch's operators alone, and loads
    where vitkernels is not installed; on a GPU, what ``torch.jit`` and ``torch.onnx.export`` make of it, and the others while
    gradients are enabled. Under ``torch.no_grad``, or inside ``with vitkernels.backend("fused")``, ``torch.export`` and
    ``make_fx`` record vitkernels' operators on a GPU: that program is for inference in the dtypes of that moment, it has no
    gradients and cannot be cast. In a graph of ``torch.fx`` that is traced where kernels run, a block is a few operators: a
    feature extractor can ask for the outputs of blocks there, and not for those of the layers inside.

    Args:
        model: any module that contains ``timm.models.vision_transformer.Block``.
        strict: raise if any of these modules would not be fused, with ``explain``'s reason; also for a stem or a block that
            vitkernels has no fused form of. Device and backend do not matter.
        recompute: ``"mlp"``: blocks save nothing of the MLP's width for backward and compute fc1 again there. The gradients
            are bitwise the same; a block saves 6 units instead of 10 (one unit is its input) and costs 11% more FLOPs in
            training. The switch is an attribute of each block, not in the state dict; the last ``fuse`` or ``unfuse`` counts.
        inference: take the parameters as frozen, and give each block copies of its weights with LayerNorm (in float16 and
            bfloat16) and LayerScale multiplied in. Calls without gradients and autocast use them. No state dict and no list of
            buffers has the copies, and the parameters stay as they are. Threads may share the model. In an ``nn.Sequential``
            each block also tells the next its output's row statistics, unless one of the two has hooks. On a CPU under ``auto``
            nothing uses the copies: blocks run timm's forward there. Changed parameters (``load_state_dict``, ``.half()``, a
            step of an optimizer) are folded again at the next call, but a graph that ``torch.compile`` has made does not see
            them (those of ``torch.fx``, ``torch.jit.trace`` and ``torch.export`` run on the parameters), and nobody sees
            writes that PyTorch does not count: through ``parameter.data`` (as PEFT merges), NumPy or DLPack, by optimizers
            with ``fused=True``, ``torch.distributed``'s collectives or another process, to parameters made under
            ``inference_mode``, or to FSDP1's with ``use_orig_params=True``. A CUDA graph reads the copies that were there when
            it was captured: capture it again after parameters changed, or were moved, and after ``train()``.
            ``train()``, ``unfuse`` and a ``fuse`` without this argument drop the copies.
            In float16, rows whose mean is some thousands of times their standard deviation, but that are not constant, and
            LayerNorms of weights below 0.001 lose accuracy.
        input: ``"uint8"``: the model takes images of pixels 0 to 255 too, (B, C, H, W) or a channels_last view of (B, H, W, C),
            and normalises them with the ``mean`` and ``std`` of its ``pretrained_cfg``. Float images are normalised ones, as
            ever. Nothing of it is in the state dict; the last ``fuse`` or ``unfuse`` counts. ``torch.jit.trace`` keeps it;
            ``torch.jit.script`` sees timm's modules, which take float images only.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``torch.jit.script`` or ``trace`` made it.
        ValueError: it contains no block of timm's ``vision_transformer``; ``recompute`` or ``input`` is unknown; a block is in
            training mode and ``inference`` was asked for; ``"uint8"``, and there is no timm ``PatchEmbed``, or no mean and std
            in 0..1 for its channels.
        RuntimeError: ``strict`` and something would not run fused, or the ``forward`` of timm's ``Block`` or
            ``AttentionPoolLatent`` has an unknown signature.

        The model is unchanged after an error.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must not be a {type(model).__name__}, whose forward is compiled already: fuse before torch.jit")
    report = explain(model)
    if not isinstance(recompute, (str, type(None))) or recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(map(repr, RECOMPUTE))}, got {recompute!r}")
    if not isinstance(input, str) or input not in INPUTS:
        raise ValueError(f"input must be one of {', '.join(map(repr, INPUTS))}, got {input!r}")
    from .models import FusedBlock, fuse_classes, set_inference, set_pixel_statistics, set_recompute_mlp, undone_on_error

    blocks = [module for module in model.modules() if isinstance(module, FusedBlock.stock)]
    if inference and any(block.training for block in blocks):
        raise ValueError(
            "inference=True takes the parameters as frozen, but the model is in training mode: call model.eval() first"
        )
    if not blocks:
        found = ", ".join(sorted({m.kind for m in report.modules})) or "none"
        again = "".join(f"; {reason}" for reason in dict.fromkeys(filter(None, map(_loaded_again, model.modules()))))
        raise ValueError(f"model contains no timm.models.vision_transformer.Block to fuse (modules found: {found}){again}")
    not_fused = [m for m in report.modules if not m.fused and m.reasons != (_NOT_YET,)]
    if strict and not_fused:
        raise RuntimeError("cannot fuse " + "; ".join(f"{m.name}: {', '.join(m.reasons)}" for m in not_fused))
    statistics = _pixel_statistics(model) if input == "uint8" else {}
    with undone_on_error(model):
        fuse_classes(model)
        set_recompute_mlp(model, recompute == "mlp")
        set_inference(model, inference)
        _forget_pixel_statistics(model)
        for stem, (mean, std) in statistics.items():
            set_pixel_statistics(stem, mean, std)
    if not_fused:
        counts = f"{len(not_fused)} of {len(report.modules)} modules still run timm's forward"
        _logger.log(
            logging.WARNING if len(not_fused) == len(report.modules) else logging.INFO,
            "%s, e.g. %s: %s (vitkernels.explain(model) shows all)",
            counts,
            not_fused[0].name,
            "; ".join(not_fused[0].reasons),
        )
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module of ``model`` its timm class back, in place. Harmless on a model that is not fused.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: something else, as FSDP or ``torch.nn.utils.parametrize``, has changed the class of a fused module.
    """
    _check_module(model)
    from .models import set_inference, set_recompute_mlp, undone_on_error, unfuse_classes

    with undone_on_error(model):
        unfuse_classes(model)
        set_inference(model, False)
        set_recompute_mlp(model, False)
        _forget_pixel_statistics(model)
    return model


def _forget_pixel_statistics(model: nn.Module) -> None:
    from .models import FusedPatchEmbed, clear_pixel_statistics

    for module in model.modules():
        if isinstance(module, FusedPatchEmbed.stock):
            clear_pixel_statistics(module)


def _pixel_statistics(model: nn.Module) -> dict[nn.Module, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Mean and std, of pixels in 0..1, of each patch embedding: from the ``pretrained_cfg`` of its timm model."""
    from .models import FusedPatchEmbed

    found: dict[nn.Module, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    stems = {
        name: stem
        for name, stem in model.named_modules()
        if type(stem) in (FusedPatchEmbed, FusedPatchEmbed.stock) and type(stem.proj) is nn.Conv2d
    }
    if not stems:
        raise ValueError("input='uint8' needs a timm PatchEmbed with a convolution, and model has none")
    owners = {name: module for name, module in model.named_modules() if getattr(module, "pretrained_cfg", None)}
    for name, stem in stems.items():
        inside = [owner for owner in owners if not owner or name.startswith(f"{owner}.")]
        config = dict(owners[max(inside, key=len)].pretrained_cfg) if inside else {}
        mean, std = tuple(config.get("mean") or ()), tuple(config.get("std") or ())
        channels = stem.proj.in_channels
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"input='uint8' needs mean and std of the {channels} channels of {name} in its model's pretrained_cfg,"
                f" got mean={mean}, std={std}"
            )
        if not all(isinstance(value, Real) and 0 <= float(value) <= 1 for value in mean + std) or min(std) == 0:
            raise ValueError(
                f"input='uint8' needs mean in 0..1 and std in 0..1 and not 0 for {name}, as timm has them (pixels / 255),"
                f" but its model's pretrained_cfg has mean={mean}, std={std}"
            )
        found[stem] = mean, std
    return found


def explain(model: nn.Module) -> FusionReport:
    """Say of each block, patch embedding and attention pooling if it is fused, or why not, and what each operator runs.

    The state is that of a call now: a fused block with a hook on its ``attn`` is reported as not fused, with that reason. Where
    no kernel can run at all, on a CPU under ``auto``, ``note`` says that fused blocks run timm's forward too.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_module(model)
    from .models import takes_uint8

    reports = tuple(
        ModuleReport(
            name or "(model)",
            type(module).__name__,
            not reasons,
            tuple(reasons),
            tuple(_apart(model, name, module)),
            takes_uint8(module),
        )
        for name, module in model.named_modules()
        if (reasons := _reasons(name, module)) is not None
    )
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    operators = {op: tuple(why) for op, why in _availability.availability(example.device, example.dtype).items()}
    return FusionReport(reports, operators, _note(model, example))


def _note(model: nn.Module, example: torch.Tensor) -> str:
    """What ``FusedBlock.forward`` decides before it looks at the block."""
    from .models import FusedBlock

    left = any(isinstance(module, FusedBlock) and not module._vk_recompute_mlp for module in model.modules())
    if not left or not _availability.leaves_to_pytorch(example):
        return ""
    return f"on a {example.device.type.upper()} under 'auto' fused blocks run timm's forward: no kernel of theirs can run there"


_NOT_YET = "vitkernels.fuse would fuse it"


def _reasons(name: str, module: nn.Module) -> list[str] | None:
    """Why ``module`` does not run fused, empty if it does; None for a module of no such kind."""
    from .models import FUSED_CLASSES

    for stock, fused in FUSED_CLASSES.items():
        if isinstance(module, fused):
            return fused.why_not(module)
        if type(module) is stock:
            return fused.why_not(module) or [_NOT_YET]
    if isinstance(module, tuple(FUSED_CLASSES)) or _looks_like_a_block(module) or _is_stem(name, module):
        return [_loaded_again(module) or f"vitkernels has no fused form of {type(module).__module__}.{type(module).__name__}"]
    return None


def _loaded_again(module: nn.Module) -> str | None:
    """A reason if the class of ``module`` only has the name of one of timm's that vitkernels knows."""
    from .models import FUSED_CLASSES

    cls = type(module)
    known = {(stock.__module__, stock.__qualname__) for stock in FUSED_CLASSES}
    if cls in FUSED_CLASSES or (cls.__module__, cls.__qualname__) not in known:
        return None
    return f"{cls.__module__} was loaded again after vitkernels was first used: start Python anew"


def _apart(model: nn.Module, name: str, module: nn.Module) -> list[str]:
    """Why a fused patch embedding is not merged with what timm's ``_pos_embed`` does; empty for a block."""
    from .models import FusedNaFlexEmbeds, FusedPatchEmbed, FusedVisionTransformer

    if isinstance(module, FusedNaFlexEmbeds):
        return module.why_not_merged()
    if not isinstance(module, FusedPatchEmbed) or not name:
        return []
    owner = model.get_submodule(name.rpartition(".")[0])  # a TorchScript module refuses, but contains none of ours
    if not isinstance(owner, FusedVisionTransformer) or owner._modules.get("patch_embed") is not module:
        return [f"{type(owner).__name__} has its own"]
    return owner.why_not_merged()


def _is_stem(name: str, module: nn.Module) -> bool:
    if name.rpartition(".")[2] not in ("patch_embed", "embeds"):  # timm's names, of HybridEmbed and NaFlexEmbeds too
        return False
    # Not a ModuleList, which nobody calls. Of the class as it is written: that of a TorchScript module answers with an error.
    return inspect.getattr_static(type(module), "forward") is not nn.Module.forward


def _looks_like_a_block(module: nn.Module) -> bool:
    cls, children = type(module), module._modules
    if cls.__module__ == "timm.models.vision_transformer" and cls.__name__.endswith("Block"):
        return True
    return "attn" in children and ("mlp" in children or "norm1" in children)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
