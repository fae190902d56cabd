"""What a ``with`` block sets for a while, read as ``_settings.backend``, ``_settings.target`` and ``_settings.plan``.

Blocks of several threads and asyncio tasks may overlap, and each caller sees the innermost of its own. A caller without one (a
thread of autograd that computes a checkpointed forward again, a worker) sees the block that was opened last and is still open,
else the default. In a forked child only the blocks of the thread that forked are open.

Where all open blocks agree, every caller sees the same, and the setting is a plain attribute of this module: nothing reads
faster. While they differ the attribute is absent, so that Python calls ``__getattr__``, which knows the caller. Dynamo's guards
read the attribute in the same two ways, in the thread that runs the compiled code. (A ContextVar that traced code reads itself
breaks fullgraph on torch 2.11.)
"""

import os
import threading
from contextvars import ContextVar
from typing import Any

from . import _env

_DEFAULTS: dict[str, Any] = {"backend": _env.default_backend(), "target": None, "plan": None}
globals().update(_DEFAULTS)


class _Block:
    """One ``with`` block that has begun, and what it sets."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.is_open = True
        self.thread = threading.get_ident()


_open: dict[str, list[_Block]] = {name: [] for name in _DEFAULTS}  # of all threads and tasks, as they were opened
# Those of the calling thread or task, outermost first. A block that another context closed stays listed for a while.
_own: dict[str, ContextVar[tuple[_Block, ...]]] = {name: ContextVar(name, default=()) for name in _DEFAULTS}
_lock = threading.RLock()  # an R: the garbage collector may close a generator, and so its block, at any point of the below


def __getattr__(name: str) -> Any:
    if name not in _DEFAULTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for block in reversed(_own[name].get()):
        if block.is_open:
            return block.value
    latest = _open[name][-1:]  # a copy, since another thread may close it
    return latest[0].value if latest else _DEFAULTS[name]


def _publish(name: str) -> None:
    """Make the attribute plain, or absent. Once more if a block was closed meanwhile."""
    while True:
        blocks = list(_open[name])
        value = blocks[-1].value if blocks else _DEFAULTS[name]
        if all(block.value == value for block in blocks[:-1]):
            globals()[name] = value
        else:
            globals().pop(name, None)
        if blocks == _open[name]:
            return


def _forget_other_threads() -> None:
    """In a forked child, where only the thread that forked goes on: nobody would ever end the blocks of the others."""
    global _lock
    _lock = threading.RLock()  # one of them may have held it
    for name, blocks in _open.items():
        for block in blocks:
            block.is_open = block.thread == threading.get_ident()
        _open[name] = [block for block in blocks if block.is_open]
        _publish(name)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


class Override:
    """Context manager that gives a setting a value. One object may be entered again while it is open, by any thread or task,
    and may be closed by another one than opened it."""

    def __init__(self, setting: str, value: Any) -> None:
        self._setting = setting
        self._value = value
        self._blocks: list[_Block] = []

    def __enter__(self) -> None:
        block = _Block(self._value)
        with _lock:
            self._blocks.append(block)
            _open[self._setting].append(block)
            _publish(self._setting)
        self._set_own(block)

    def __exit__(self, *exc: object) -> None:
        own = _own[self._setting].get()
        with _lock:
            # The caller's own, unless this is another thread or task than opened it.
            block = next((b for b in reversed(own) if b in self._blocks), self._blocks[-1])
            self._blocks.remove(block)
            _open[self._setting].remove(block)
            block.is_open = False
            _publish(self._setting)
        self._set_own()

    def _set_own(self, *opened: _Block) -> None:
        own = _own[self._setting].get()
        while own and not own[-1].is_open:
            own = own[:-1]
        _own[self._setting].set((*own, *opened))
