"""``vitkernels info``: what is installed, and which operators run a kernel here."""

import argparse
from typing import Any

import torch

from .. import _env, _select
from ..ops._availability import availability
from . import _environment, _models
from ._output import console


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command."""
    parser = subparsers.add_parser("info", help="versions, devices, and which operators run a kernel here", allow_abbrev=False)
    parser.add_argument("--device", help="where the operators would run: cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=_models.DTYPES, help="their dtype (default: bfloat16 on a GPU, float32 on a CPU)")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ask the machine; touches the GPU, if there is one, to learn its architecture."""
    device = _models.pick_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return {
        "versions": _environment.versions(),
        "commit": _environment.commit(),
        "devices": {
            "gpus": _environment.gpus(),
            "cpu": {"name": _environment.cpu_name(), "threads": torch.get_num_threads()},
        },
        "extension": _extension(),
        "triton": _triton(),
        "backend": _select.policy(),
        "operators": {"device": str(device), "dtype": dtype, "why_not": availability(device, getattr(torch, dtype))},
    }


def _extension() -> dict[str, Any]:
    try:
        module = _env.extension()
    except ImportError as error:
        return {"available": False, "reason": f"vitkernels._C is there but does not load: {error}"}
    if module is None:
        reason = "vitkernels._C is missing: installed without a C++ compiler, or run from a source tree without building"
        return {"available": False, "reason": reason}
    return {"available": True, "build_info": module.build_info()}


def _triton() -> dict[str, Any]:
    if not _env.HAS_TRITON:
        return {"available": False, "reason": "Triton is not installed"}
    return {"available": True, "version": _environment.versions()["triton"], "interpreting": _env.INTERPRETING}


def show(document: dict[str, Any]) -> None:
    """Print what ``run`` found."""
    from rich.table import Table

    facts = Table(show_header=False, title="vitkernels info", title_justify="left")
    for name, version in document["versions"].items():
        facts.add_row(name, version or "not installed")
    if document["commit"]:
        facts.add_row("commit", document["commit"])
    facts.add_section()
    for gpu in document["devices"]["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        facts.add_row(gpu["device"], f"{gpu['name']}, {gpu['sm']}, {memory}, driver {gpu['driver'] or 'unknown'}")
    if not document["devices"]["gpus"]:
        facts.add_row("GPU", "none that PyTorch can use")
    facts.add_row("CPU", "{name}, {threads} threads".format(**document["devices"]["cpu"]))
    facts.add_section()
    facts.add_row("extension", _describe_extension(document["extension"]))
    facts.add_row("Triton", _describe_triton(document["triton"]))
    facts.add_row("backend", document["backend"])

    found = document["operators"]
    title = f"operators on {found['device']} in {found['dtype']}"
    operators = Table("operator", "kernel", "why not", title=title, title_justify="left")
    for name, reasons in found["why_not"].items():
        operators.add_row(name, "no" if reasons else "yes", "; ".join(reasons))
    out = console()
    out.print(facts, operators)


def _describe_extension(extension: dict[str, Any]) -> str:
    if not extension["available"]:
        return extension["reason"]
    return "vitkernels._C: " + ", ".join(f"{key} {_plain(value)}" for key, value in extension["build_info"].items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _describe_triton(triton: dict[str, Any]) -> str:
    if not triton["available"]:
        return triton["reason"]
    return "available" + (", interpreting on the CPU (TRITON_INTERPRET=1)" if triton["interpreting"] else "")
