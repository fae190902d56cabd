"""What ``vitkernels tune`` asks of a stem: ``kernels/_tuning_<stem>.py`` with ``cases(shape, batch, arch, dtype)``.

A stem takes part when its launcher asks ``_tuned.lookup(gpu, stem, key)`` for a configuration, and its file here says which
keys a ViT asks for, which entries could stand there, and how to run and judge one. Nothing else knows the stem.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Shape(Protocol):
    """The dimensions of a ViT that cases are made of; a workload has them.

    ``act``: of the MLP. ``patch``: 0 where there is no patch embedding of ours, or no square patches.
    """

    @property
    def tokens(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def act(self) -> str: ...
    @property
    def patch(self) -> int: ...
    @property
    def image(self) -> int: ...


@dataclass(frozen=True)
class Problem:
    """A case with its tensors.

    Attributes:
        run: the launcher, with whatever entry it finds: the whole plan, every pass that the fused form saves included.
        eager: PyTorch's result in the same dtype.
        oracle: the result in float64.
    """

    run: Callable[[], Tensor]
    eager: Callable[[], Tensor]
    oracle: Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One entry of a table, to be measured.

    Attributes:
        stem, key: where the entry stands. kind: cases of one kind compile to nearly the same code, and do that together.
        title: the case for people; rows: the size that is measured, of those that share the key.
        entries: the candidates by name. The first is the baseline, which runs where a table has no entry.
        problem: makes the tensors; on ``meta``, where ``run`` compiles (``_aot.dry_run``), too. Pickles.
    """

    stem: str
    key: str
    kind: str
    title: str
    rows: int
    entries: dict[str, dict[str, Any]]
    problem: Callable[[torch.device], Problem]
