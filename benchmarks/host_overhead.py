"""``python benchmarks/host_overhead.py [--json]``: microseconds that the host spends on a call, without a GPU.

A driver that does nothing takes the launches (``tests/stub_driver``), so what is measured is Python, PyTorch's dispatcher and
Triton's launcher. No kernel runs and no figure here is the time of a GPU. Every public operator, and one transformer block:

    block_inference   fused, under inference mode, as without a tuned table
    block_folded      fuse(model, inference=True), every product in Triton
    block_train       forward and backward
    block_small       a call so small that policy auto leaves it to PyTorch
    block_compiled    block_inference under torch.compile

The basis, chosen so that as little arithmetic as possible hides in it. Ours is bfloat16 at batch 2, 16 tokens, width 64, one
head; products that cuBLAS would run return a tensor at once, and each counts 5 us. timm's block, which a block's ``ratio`` is
against, is float32 at batch 1, 1 token, width 64, one head, all of it on the CPU. ``block_small`` is that very block, fused.
One thread; ``us`` is the least of many calls, alternating with timm's; ``python_calls`` counts the calls of Python functions.
No tuned table of this user takes part.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import stub_driver
import torch
from torch import Tensor
from torch.nn.functional import linear

BATCH, TOKENS, WIDTH, HEADS, PATCH, IMAGE = 2, 16, 64, 1, 16, 64
CUBLAS_US = 5.0  # of the host, for each product
SECONDS, LEAST_CALLS = 2.0, 30  # of a row


class Row(NamedTuple):
    """One call. ``timm_us`` and ``ratio`` are None where timm has no such call."""

    call: str
    us: float
    launches: int
    python_calls: int
    timm_us: float | None = None
    ratio: float | None = None


class Cublas:
    """Stands for cuBLAS inside ``replaced``: products return a tensor that is there already, and are counted."""

    def __init__(self) -> None:
        self.products = 0
        self._results: dict[Any, Iterator[Tensor]] = {}

    def _product(self, a: Tensor, *columns: int) -> Tensor:
        """Of ``a`` (..., K) and a matrix of so many columns, or a vector."""
        self.products += 1
        shape = (*a.shape[:-1], *columns)
        if (shape, a.dtype) not in self._results:  # several in turn: two results of one operator must not share their memory
            self._results[shape, a.dtype] = itertools.cycle([a.new_zeros(shape) for _ in range(16)])
        return next(self._results[shape, a.dtype]).detach()  # a tensor of its own, which autograd may keep as a gradient

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():  # of a layer that is not ours
            return linear(x, weight, bias)
        return self._product(x, weight.shape[0])

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._product(a, *b.shape[1:][-1:])

    def addmm(self, c: Tensor, a: Tensor, b: Tensor, **options: bool) -> Tensor:
        return self._product(a, b.shape[-1])

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """The four ways in which vitkernels asks PyTorch for a product of matrices."""
        from vitkernels.models import block

        places = (
            (torch.nn.functional, "linear", self.linear),
            (torch, "addmm", self.addmm),
            (torch, "_addmm_activation", self.addmm),
            (torch.Tensor, "__matmul__", lambda a, b: self.matmul(a, b)),  # binds as a method does
        )
        shipped = block._SHIPPED  # blocks run timm's forward where a function of PyTorch was replaced, but for this purpose
        before = [(place, name, getattr(place, name)) for place, name, _ in places]
        for place, name, stand_in in places:
            setattr(place, name, stand_in)
        block._SHIPPED = tuple((owner, name, getattr(owner, name), None) for owner, name, *_ in shipped)
        try:
            yield
        finally:
            block._SHIPPED = shipped
            for place, name, function in before:
                setattr(place, name, function)


def python_calls(call: Callable[[], object]) -> int:
    """Python functions entered during one call, those left out that only the measurement brings along."""
    count = 0

    def enter(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        code = frame.f_code
        ours = code.co_filename == __file__ or (code.co_filename == stub_driver.__file__ and code.co_name == "<lambda>")
        count += event == "call" and not ours  # the stub driver's lambdas stand for functions of C

    collects = gc.isenabled()
    gc.disable()  # a collection in the middle calls finalizers of what has nothing to do with this call
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return count


class Contender(NamedTuple):
    """A call, and what has to be entered around it, which is not timed."""

    call: Callable[[], object]
    contexts: tuple[Callable[[], contextlib.AbstractContextManager[Any]], ...]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            yield


def least_us(contenders: list[Contender]) -> list[float]:
    """Of each, the shortest of many calls that alternate."""
    best = [float("inf")] * len(contenders)
    end, done = time.perf_counter() + SECONDS, 0
    gc.collect()
    gc.disable()
    try:
        while done < LEAST_CALLS or time.perf_counter() < end:
            for index, contender in enumerate(contenders):
                with contender.entered():
                    start = time.perf_counter()
                    contender.call()
                    best[index] = min(best[index], time.perf_counter() - start)
            done += 1
    finally:
        gc.enable()
    return [1e6 * seconds for seconds in best]


def measure(name: str, stub: stub_driver.StubDriver, ours: Contender, timm: Contender | None = None) -> Row:
    """The row of a call; its products, if it calls for any, are ``Cublas``'s."""
    cublas = Cublas()
    ours = Contender(ours.call, (*ours.contexts, cublas.replaced))
    return _row(name, stub, ours, timm, cublas)


def _row(name: str, stub: stub_driver.StubDriver, ours: Contender, timm: Contender | None, cublas: Cublas) -> Row:
    with ours.entered():
        for _ in range(3):  # compiles
            ours.call()
        calls = python_calls(ours.call)
        before = stub.launches(), cublas.products
        ours.call()
        launches, products = stub.launches() - before[0], cublas.products - before[1]
    us, *others = least_us([ours] if timm is None else [ours, timm])
    us += CUBLAS_US * products
    timm_us = others[0] if others else None
    return Row(name, us, launches, calls, timm_us, None if timm_us is None else us / timm_us)


def operator_rows(stub: stub_driver.StubDriver) -> Iterator[Row]:
    """The public operators, without gradients."""
    import vitkernels as vk

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16()

    ops, D = vk.ops, WIDTH
    x, vector, weight, square = draw(BATCH, TOKENS, D), draw(D), draw(4 * D, D), draw(D, 4 * D)
    hidden, qkv = draw(4 * D), draw(BATCH, TOKENS, 3, HEADS, D // HEADS)
    images, kernel = draw(BATCH, 3, IMAGE, IMAGE), draw(D, 3, PATCH, PATCH)
    prefix, positions, table = draw(1, 1, D), draw(1, 1 + (IMAGE // PATCH) ** 2, D), draw(1, TOKENS, D)
    calls = {
        "layer_norm": lambda: ops.layer_norm(x, vector, vector),
        "add_layer_norm": lambda: ops.add_layer_norm(x, x, vector, vector),
        "attention": lambda: ops.attention(*qkv.unbind(2)),
        "attention_qkv": lambda: ops.attention_qkv(qkv),
        "linear": lambda: ops.linear(x, weight, hidden, act="gelu"),
        "mlp": lambda: ops.mlp(x, vector, vector, weight, hidden, square, vector),
        "patch_embed": lambda: ops.patch_embed(images, kernel, vector, prefix_tokens=prefix, pos_embed=positions),
        "resample_pos_embed": lambda: ops.resample_pos_embed(table, (6, 6), num_prefix_tokens=0),
        "resample_pos_embed_many": lambda: ops.resample_pos_embed_many(table, [(6, 6), (5, 7)], num_prefix_tokens=0),
    }
    for name, call in calls.items():
        yield measure(name, stub, Contender(call, (torch.inference_mode, lambda: vk.backend("fused"))))


def block_rows(stub: stub_driver.StubDriver) -> Iterator[Row]:
    """A block, fused, beside timm's."""
    from timm.models.vision_transformer import Block

    import vitkernels as vk
    from vitkernels import _select

    torch.manual_seed(0)
    stock = Block(WIDTH, HEADS, qkv_bias=True).eval()

    def fused(dtype: torch.dtype, inference: bool = False) -> torch.nn.Module:
        return vk.fuse(torch.nn.Sequential(copy.deepcopy(stock).to(dtype)), inference=inference)[0]

    def infer(block: Callable[..., object], x: Tensor) -> Callable[[], object]:
        return lambda: block(x)

    def train(block: torch.nn.Module, x: Tensor) -> Callable[[], object]:
        leaf, gradient, parameters = x.clone().requires_grad_(), torch.randn_like(x), list(block.parameters())

        def step() -> None:
            for tensor in (leaf, *parameters):
                tensor.grad = None
            block(leaf).backward(gradient)

        return step

    x, one = torch.randn(BATCH, TOKENS, WIDTH).bfloat16(), torch.randn(1, 1, WIDTH)
    frozen = torch.inference_mode
    policy, auto, triton = (lambda: vk.backend("fused")), (lambda: vk.backend("auto")), (lambda: _select.planning("triton"))
    timm, timm_train = Contender(infer(stock, one), (frozen,)), Contender(train(copy.deepcopy(stock).train(), one), ())
    block, folded = fused(torch.bfloat16), fused(torch.bfloat16, inference=True)
    compiled = torch.compile(block, dynamic=False)
    yield measure("block_inference", stub, Contender(infer(block, x), (frozen, policy)), timm)
    yield measure("block_folded", stub, Contender(infer(folded, x), (frozen, policy, triton)), timm)
    yield measure("block_train", stub, Contender(train(fused(torch.bfloat16).train(), x), (policy,)), timm_train)
    small = Contender(infer(fused(torch.float32), one), (frozen, auto))  # computes its products, as timm's does
    yield _row("block_small", stub, small, timm, Cublas())
    yield measure("block_compiled", stub, Contender(infer(compiled, x), (frozen, policy)), timm)


def show(rows: list[Row], environment: dict[str, Any]) -> None:
    from rich.table import Table

    from vitkernels.cli._output import console

    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "timm", "python"))
    title = f"Host time of a call, with a driver that does nothing: no GPU time is in it. {versions}"
    table = Table(title=title, title_justify="left")
    for column in ("call", "us", "launches", "Python calls", "timm, us", "ratio"):
        table.add_column(column, justify="left" if column == "call" else "right", no_wrap=True)
    for row in rows:
        timm = ("-", "-") if row.ratio is None else (f"{row.timm_us:.0f}", f"{row.ratio:.2f}")
        table.add_row(row.call, f"{row.us:.0f}", str(row.launches), str(row.python_calls), *timm)
    console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="write JSON to standard output")
    args = parser.parse_args()
    try:
        stub = stub_driver.install()
    except RuntimeError as reason:
        parser.error(str(reason))
    from vitkernels.cli import _environment

    torch.set_num_threads(1)
    tables = tempfile.TemporaryDirectory()
    os.environ["VITKERNELS_CACHE"] = tables.name
    environment = {**_environment.environment(), "driver": "stub: no kernel runs, and no figure is the time of a GPU"}
    rows = [*operator_rows(stub), *block_rows(stub)]
    if args.json:
        print(json.dumps({"environment": environment, "rows": [row._asdict() for row in rows]}, indent=1))
    else:
        show(rows, environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
