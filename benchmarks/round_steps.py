"""What each step of ``gpu_round.py`` does, in a process of its own: ``python benchmarks/round_steps.py STEP --rows FILE``.

A step appends a JSON line to FILE for each thing that it found, at once, so that nothing is lost when it is killed. A row has
an ``id``; a step whose FILE holds the row already does not do that part again. ``wrong`` in a row: our result is wrong, ours
does not run, or there is nothing to compare it with. ``unavailable``: somebody else's contender does not run here; the reason.

``--dry-run`` does the same without a GPU, at tiny shapes: where results are judged kernels are interpreted, and where time is
measured a driver that does nothing takes the launches; such rows say ``"path": "stub"`` and their times mean nothing.
``--compile-only`` runs ours once at the step's own shapes with that driver, which leaves the kernels in Triton's cache.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]

from gpu_round import read_rows

INTERPRETED = ("operators", "gemms")  # steps of a dry run that judge results
LARGE, TRAIN, COMPILED = 256, 128, (64, 1)  # batches; a dry run's are 2
_PATHS = {"eager": "pytorch", "fused": "kernel", "auto": "mixed"}  # what the host's contenders run
HOST_SHAPES = ((2, 16, 64, 1), (1, 197, 768, 12))  # batch, tokens, width, heads: host_overhead.py's, and ViT-B/16's at batch 1


class Context:
    """What the steps share: where they run, and the file of rows.

    Attributes:
        mode: ``gpu``, ``dry-run`` or ``compile-only``.
    """

    def __init__(self, rows: Path, mode: str) -> None:
        import torch

        self.mode = mode
        self.device = torch.device("cuda" if mode == "gpu" else "cpu")
        self._rows = rows
        self._known = {row["id"] for row in read_rows(rows)}

    def knows(self, *ids: str) -> bool:
        """Whether an earlier try found all of these."""
        return self._known.issuperset(ids)

    def tell(self, id: str, **row: Any) -> None:
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": id, **row}) + "\n")

    def workloads(self, *names: str) -> list[Any]:
        """Of these names; a dry run has one small model, timm's ``test_vit``."""
        from workloads import WORKLOADS, Workload

        if self.mode == "dry-run":
            return [Workload("test", "test_vit", 101, 64, 6, 2, 192, 16, 160, 2, 2)]
        return [workload for name in names for workload in WORKLOADS if workload.name == name]

    def batch(self, batch: int) -> int:
        return min(batch, 2) if self.mode == "dry-run" else batch

    def contest(self, module: Any, case: Any, names: list[str], beside: str = "", **options: Any) -> None:
        """Check and time contenders of one case, interleaved, and tell of each.

        Args:
            beside: what sets the rows of a case apart that is measured more than once.
            options: of the module's ``contest``.
        """
        import torch
        from protocol import describe, measure
        from providers import OURS

        ids = {name: f"{case} {name}" + (f" beside {beside}" if beside else "") for name in names}
        ours = [name for name in names if name.removesuffix("-graph") in OURS]
        if self.knows(*ids.values()):
            return
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # its limit on recompilations counts across models
        gc.collect()  # models and graphs of the last case, before this one takes memory
        build = module.contest(case, self.device, "full", **options).build
        if self.mode == "compile-only":
            for name in ours:
                with without_products():
                    build(name).step()
                self.tell(ids[name], compiled=True)
            return
        try:
            found = measure(names, build, self.device, case.batch, kernel=case.subject != "model")
        except RuntimeError as error:  # eager itself does not run, so nothing can be compared; other cases go on
            self.tell(ids["eager"], wrong=str(error)[:1000])
            return
        describe(found, module, case, self.device, {})
        for name, outcome in found.items():
            if outcome.row:
                del outcome.row["environment"]  # the round's
                self.tell(ids[name], **outcome.row)
            elif outcome.failure and name in ours:
                self.tell(ids[name], wrong=outcome.failure)
            else:
                self.tell(ids[name], unavailable=outcome.unavailable or outcome.failure)


@contextlib.contextmanager
def without_products() -> Iterator[None]:
    """Products of cuBLAS return at once: on a CPU those of a whole model take minutes, and they compile nothing."""
    from host_overhead import Cublas

    with Cublas().replaced():
        yield


def versions(context: Context) -> None:
    """The environment, and one LayerNorm: the first kernel of ours on this machine."""
    import bench_layer_norm
    from workloads import Case

    from vitkernels.cli import _environment

    context.tell("environment", device=str(context.device), **_environment.environment())
    (workload,) = context.workloads("B/16")
    context.contest(bench_layer_norm, Case("layer_norm", workload, context.batch(LARGE), "infer"), ["eager", "fused"])


def operators(context: Context) -> None:
    """Every registered operator, which are forwards and backwards, against its reference."""
    import test_registration
    import torch
    from helpers import poisoned

    from vitkernels import _env
    from vitkernels.ops import _register

    def only_call(name: str, arguments: tuple[Any, ...]) -> None:
        getattr(torch.ops.vitkernels, name)(*arguments)

    check = only_call if context.mode == "compile-only" else test_registration.assert_kernel_is_right
    torch.manual_seed(0)
    for name in _register.NAMES:
        if context.knows(name):
            continue
        if name.startswith("resample") and context.mode == "gpu" and not _env.EXTENSION_ARCHITECTURES:
            context.tell(name, unavailable="vitkernels._C is not built with CUDA here")
            continue
        start = time.perf_counter()
        found: dict[str, Any] = {}
        try:
            with torch.device(context.device), poisoned():
                calls = test_registration.arguments(name)
                for arguments in calls:
                    check(name, arguments)
            found["calls"] = len(calls)
        except Exception as error:  # a kernel that fails in any way is wrong, and the others are still looked at
            found["wrong"] = f"{type(error).__name__}: {error}"[:1000]
        context.tell(name, seconds=round(time.perf_counter() - start, 3), **found)
        if context.mode == "gpu" and "wrong" in found:
            torch.cuda.synchronize()  # after an invalid access nothing in this process would be right


def host(context: Context) -> None:
    """Microseconds of the host for one call of a block, launches not waited for."""
    import copy

    import torch
    from host_overhead import Contender, least_us
    from timm.models.vision_transformer import Block

    import vitkernels as vk

    frozen = torch.inference_mode
    for batch, tokens, width, heads in HOST_SHAPES[: 1 if context.mode == "dry-run" else None]:
        stock = Block(width, heads, qkv_bias=True).to(context.device, torch.bfloat16)
        fused = vk.fuse(torch.nn.Sequential(copy.deepcopy(stock)))[0]
        x = torch.randn(batch, tokens, width, device=context.device, dtype=torch.bfloat16)
        leaf, gradient = x.clone().requires_grad_(), torch.randn_like(x)
        policies = {policy: functools.partial(vk.backend, policy) for policy in ("fused", "auto")}
        for mode in ("infer", "train"):

            def step(
                block: torch.nn.Module, mode: str = mode, leaf: Any = leaf, gradient: Any = gradient, x: Any = x
            ) -> object:
                if mode == "infer":
                    return block(x)
                return torch.autograd.grad(block(leaf), [leaf, *block.parameters()], gradient)

            contexts = (frozen,) if mode == "infer" else ()
            contenders = {
                "eager": Contender(functools.partial(step, stock), contexts),
                **{n: Contender(functools.partial(step, fused), (*contexts, policy)) for n, policy in policies.items()},
            }
            for contender in contenders.values():  # compiles
                with contender.entered():
                    contender.call()
            if context.mode == "compile-only":
                context.tell(f"{mode} {tokens} tokens", compiled=True)
                continue
            found = dict(zip(contenders, least_us(list(contenders.values())), strict=True))
            for name, us in found.items():
                shape = {"batch": batch, "tokens": tokens, "width": width, "num_heads": heads}
                row = {"provider": name, "path": _PATHS[name] if context.mode == "gpu" else "stub", "mode": mode, **shape}
                context.tell(f"{mode} {tokens} tokens {name}", **row, us=us, ratio_to_eager=found["eager"] / us)


def kernels(context: Context) -> None:
    """Device time of LayerNorm, attention and patch embedding, beside what the device can reach."""
    import bench_attention
    import bench_layer_norm
    import bench_patch_embed
    from providers import _SDPA
    from workloads import Case

    _ceilings(context)
    (workload,) = context.workloads("B/16")
    batch = context.batch(LARGE)
    sdpa = ["eager", *_SDPA, "fused"]
    context.contest(bench_attention, Case("attention_qkv", workload, batch, "infer"), sdpa)
    context.contest(bench_attention, Case("attention_qkv", workload, batch, "backward"), sdpa)
    for subject in ("patch_embed", "patch_embed_uint8"):
        context.contest(bench_patch_embed, Case(subject, workload, batch, "infer"), ["eager", "fused"], pinned=False)
    for mode in ("infer", "backward"):
        context.contest(bench_layer_norm, Case("layer_norm", workload, batch, mode), ["eager", "fused"])


def _ceilings(context: Context) -> None:
    """A copy far larger than the L2 cache, and a bfloat16 product."""
    import torch

    if context.knows("copy", "gemm") or context.mode == "compile-only":
        return
    numbers, side = (2**18, 128) if context.mode == "dry-run" else (2**29, 8192)
    source = torch.randn(numbers, device=context.device)
    copy = torch.empty_like(source)
    # Random numbers: zeros would draw less power.
    a, b = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    moved, flops = 2 * source.nbytes, 2 * side**3  # read and written
    context.tell("copy", bytes=moved, gb_per_s=moved / _seconds(lambda: copy.copy_(source), context.device) / 1e9)
    context.tell("gemm", side=side, tflops=flops / _seconds(lambda: a @ b, context.device) / 1e12)


def _seconds(call: Callable[[], object], device: Any, rounds: int = 20) -> float:
    """Median of calls in a row."""
    import torch

    for _ in range(10):  # the clocks rise first
        call()
    if device.type == "cpu":
        marks = [time.perf_counter() for _ in range(rounds) if call() is not None]
        return statistics.median(b - a for a, b in itertools.pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1000


def gemms(context: Context) -> None:
    """The products of a block of B/16, cuBLAS against each configuration; the winners go into the tuned table."""
    import torch

    from vitkernels import _select
    from vitkernels.cli import _tuning, tune
    from vitkernels.kernels import _tuning_linear
    from vitkernels.kernels._device import gpu_of

    nothing = torch.empty(0, device=context.device)
    arch = _select.target(nothing) or "sm_90"
    (workload,) = context.workloads("B/16")
    cases = tune.b16_gemms(arch, torch.bfloat16)
    if context.mode == "dry-run":
        cases = list(_tuning_linear.cases(workload, 2, arch, torch.bfloat16))
        _tuning.ROUNDS = 2  # interpreted
    if context.mode == "compile-only":
        _tuning._compile(cases, arch, math.inf)
        context.tell("gemms", compiled=True)
        return
    todo = [case for case in cases if not context.knows(f"{case.stem} {case.key}")]
    path = _tuning.user_table(gpu_of(nothing, arch))
    for found in _tuning.measure(todo, context.device, arch, path, compile_all=True):
        wrong = {"wrong": "; ".join(found.errors)} if found.errors else {}
        context.tell(f"{found.case.stem} {found.case.key}", **(found.row or {}), **wrong)


def models(context: Context) -> None:
    """Whole models at a large batch: each plan, launched and as a CUDA graph."""
    import bench_models
    from providers import OURS
    from workloads import Case

    names = [graph for name in ("eager", *OURS) if name != "auto" for graph in (name, f"{name}-graph")]
    for workload in context.workloads("B/16", "S/16"):
        context.contest(bench_models, Case("model", workload, context.batch(LARGE), "infer"), names)


def small_and_training(context: Context) -> None:
    """One image, which is a matter of launches; and a training step."""
    import bench_models
    from workloads import Case

    (workload,) = context.workloads("B/16")
    ours = ["auto", "auto-graph", "fused", "fused-graph", "inference-graph"]
    context.contest(bench_models, Case("model", workload, 1, "infer"), ["eager", "eager-graph", *ours])
    context.contest(bench_models, Case("model", workload, context.batch(TRAIN), "train"), ["eager", "fused"])


def compiled(context: Context) -> None:
    """torch.compile, which we have to beat, beside ours."""
    import bench_models
    from workloads import Case

    (workload,) = context.workloads("B/16")
    large, one = (context.batch(batch) for batch in COMPILED)
    for batch, mode in ((large, "compile"), (one, "reduce-overhead"), (one, "compile"), (large, "reduce-overhead")):
        case = Case("model", workload, batch, "infer")
        ours = ["auto", "inference"] if batch > 1 else ["auto-graph", "inference-graph"]
        context.contest(bench_models, case, ["eager", mode, *ours], beside=mode)


STEPS: dict[str, Callable[[Context], None]] = {
    "versions": versions,
    "operators": operators,
    "host": host,
    "kernels": kernels,
    "gemms": gemms,
    "models": models,
    "small_and_training": small_and_training,
    "compiled": compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="JSON lines, which are added to")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="without a GPU, at tiny shapes")
    how.add_argument("--compile-only", action="store_true", help="without a GPU: compile for sm_90 what the step launches")
    args = parser.parse_args()
    mode = "dry-run" if args.dry_run else "compile-only" if args.compile_only else "gpu"
    if mode == "dry-run" and args.step in INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.install()
    elif mode != "gpu":
        import stub_driver

        stub_driver.install()
        import providers

        providers.STUBBED = True
    if mode != "gpu":
        import host_overhead
        import protocol

        host_overhead.SECONDS = protocol.CPU_SECONDS = 0.2  # of a contender, whose times mean nothing
    STEPS[args.step](Context(args.rows, mode))


if __name__ == "__main__":
    main()
