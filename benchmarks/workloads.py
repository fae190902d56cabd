"""Which rows of the package's table of models are measured, and at which batches, for ``--size small`` and ``full``."""

from dataclasses import dataclass

from vitkernels.cli._workloads import WORKLOADS, Workload

__all__ = ["WORKLOADS", "Case", "Workload", "cases"]

# (names, batches of inference, batches of training); None is the batch of the table, which fills one H200.
Pick = tuple[tuple[str, ...], tuple[int | None, ...], tuple[int | None, ...]]
_ALL = tuple(w.name for w in WORKLOADS)
_MODELS: dict[tuple[str, str], Pick] = {
    ("small", "cpu"): (("Ti/16",), (1, 2), (1,)),
    ("full", "cpu"): (("Ti/16", "S/16", "B/16", "DINOv3-B/16@256"), (1, 8), (4,)),
    ("small", "cuda"): (("S/16", "B/16", "So400m/14"), (1, None), (None,)),
    ("full", "cuda"): (_ALL, (1, 8, 64, None), (None,)),
}
_KERNELS: dict[tuple[str, str], Pick] = {
    ("small", "cpu"): (("S/16", "B/16"), (1,), (1,)),
    ("full", "cpu"): (("Ti/16", "S/16", "B/16", "L/16", "So400m/14"), (1, 8), (1, 8)),
    ("small", "cuda"): (("S/16", "B/16", "L/16", "So400m/14"), (None,), (None,)),
    ("full", "cuda"): (_ALL, (1, None), (None,)),
}


@dataclass(frozen=True)
class Case:
    """One group of the benchmark's table: everything in it does the same work.

    Attributes:
        subject: ``model``, or the operator.
        mode: ``infer``: forward without gradients; ``train``: forward and backward; ``backward``: an operator's alone.
    """

    subject: str
    workload: Workload
    batch: int
    mode: str

    def __str__(self) -> str:
        """The test's id; pytest's ``-k`` takes no ``@`` and ids with ``/`` read badly."""
        name = self.workload.name.replace("/", "_").replace("@", "_")
        return f"{self.subject}-{name}-{self.mode}-b{self.batch}"


def cases(subject: str, size: str, device: str) -> list[Case]:
    """The cases of one operator, or of ``model``, on a ``device`` type."""
    names, infer, train = (_MODELS if subject == "model" else _KERNELS)[size, device]
    found = []
    for workload in (w for w in WORKLOADS if w.name in names):
        for mode, batches, own in (("infer", infer, workload.infer_batch), ("train", train, workload.train_batch)):
            found += [Case(subject, workload, batch, mode) for batch in sorted({own if b is None else b for b in batches})]
    return found
