"""``with`` blocks of policies that are nested, shared, or overlap in threads and tasks: who sees what, and what is left."""

import asyncio
import contextvars
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels import _select, _settings

SETTINGS = {
    "backend": (_select.policy, vk.backend, ("fused", "reference"), "auto"),
    "target": (lambda: _select.target(torch.empty(0, device="cpu")), _select.targeting, ("sm_90", "sm_80"), None),
    "plan": (lambda: _select.choose_plan(("a", "b"), lambda: None), _select.planning, ("a", "b"), None),
}


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    assert [read() for read, *_ in SETTINGS.values()] == [default for *_, default in SETTINGS.values()]
    assert not any(_settings._open.values())
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_select.policy).result() == "auto"


@pytest.mark.parametrize("setting", SETTINGS)
def test_nested_blocks_restore_what_was(setting):
    read, make, (first, second), default = SETTINGS[setting]
    outer = make(first)
    with outer:
        with make(second), outer, make(second):
            assert read() == second
        assert read() == first
        with pytest.raises(KeyError), outer:
            raise KeyError
        assert read() == first
    assert read() == default


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("first_ends_first", [True, False])
def test_threads_whose_blocks_overlap_see_their_own(setting, first_ends_first):
    read, make, (first, second), default = SETTINGS[setting]
    steps, seen = [threading.Event() for _ in range(3)], []

    def other():
        steps[0].wait(10)
        with make(second):
            seen.append(read())
            steps[1].set()
            if first_ends_first:
                steps[2].wait(10)
            seen.append(read())
        seen.append(read())
        steps[2].set()

    thread = threading.Thread(target=other)
    thread.start()
    with make(first):
        steps[0].set()
        steps[1].wait(10)
        assert read() == first
        if not first_ends_first:
            steps[2].wait(10)
            assert read() == first
    if first_ends_first:
        assert read() == second  # no block of its own: the one that is open
        steps[2].set()
    thread.join()
    assert seen == [second, second, default if first_ends_first else first]
    assert read() == default


def test_one_object_may_be_open_in_several_threads_at_once():
    shared, barrier = vk.backend("reference"), threading.Barrier(8, timeout=30)

    def work(i):
        for _ in range(50):
            with vk.backend("fused"):
                with shared:
                    inside = _select.policy()
                assert (inside, _select.policy()) == ("reference", "fused")
            barrier.wait()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_a_task_sees_its_own_policy_and_not_that_of_tasks_it_waits_for():
    async def child(name):
        before = _select.policy()
        with vk.backend(name):
            await asyncio.sleep(0.01)
            assert _select.policy() == name
        return before

    async def parent():
        with vk.backend("fused"):
            children = [asyncio.create_task(child(name)) for name in ("reference", "auto", "reference")]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert _select.policy() == "fused"
            assert await asyncio.gather(*children) == ["fused"] * 3
            assert _select.policy() == "fused"

    asyncio.run(parent())


def test_a_thread_without_a_block_sees_the_last_one_that_is_open():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_select.policy).result() == "auto"
        with vk.backend("fused"):
            assert pool.submit(_select.policy).result() == "fused"
            with vk.backend("reference"):
                assert pool.submit(_select.policy).result() == "reference"
            assert pool.submit(_select.policy).result() == "fused"


def test_a_checkpointed_forward_that_another_thread_recomputes_sees_the_open_block():
    seen = []

    def forward(x):
        seen.append(_select.policy())
        return x.sin()

    with vk.backend("auto"), vk.backend("reference"):
        y = checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum()
        thread = threading.Thread(target=y.backward)  # as autograd's threads of a GPU: no context of their own
        thread.start()
        thread.join()
    assert seen == ["reference"] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_keeps_the_blocks_of_the_thread_that_forked_and_no_others():
    begun, done = threading.Event(), threading.Event()

    def other():
        with vk.backend("reference"):
            begun.set()
            done.wait(30)

    def forked():
        child = os.fork()
        if child == 0:
            try:
                before = _select.policy()
                with vk.backend("reference"):
                    inside = _select.policy()
                os._exit(0 if (before, inside, _select.policy()) == (mine, "reference", mine) else 1)
            finally:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert begun.wait(30)
        mine = "auto"
        assert forked() == 0
        mine = "fused"
        with vk.backend(mine):
            assert forked() == 0
    finally:
        done.set()
        thread.join()


def test_a_block_opened_in_one_thread_may_be_closed_in_another():
    policy = vk.backend("fused")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(policy.__enter__).result()
        assert _select.policy() == "fused"
        policy.__exit__(None, None, None)
        assert pool.submit(_select.policy).result() == "auto"


def test_a_generator_closed_by_the_collector_in_another_context_leaves_nothing_behind():
    def generator():
        with vk.backend("fused"):
            yield

    running = contextvars.copy_context().run(lambda: (g := generator(), next(g))[0])
    with vk.backend("reference"):
        del running
        gc.collect()
        assert _select.policy() == "reference"


def number(name):
    return ("auto", "fused", "reference").index(name)


def test_compiled_code_follows_the_policy_of_the_thread_that_runs_it():
    def function(x):
        return x + number(_select.policy())

    compiled, x = torch.compile(function, fullgraph=True, backend="eager"), torch.zeros(1)
    with ThreadPoolExecutor(1) as pool, vk.backend("fused"):
        own, other = contextvars.copy_context(), contextvars.copy_context()
        for context, name in ((own, "fused"), (other, "reference"), (own, "fused"), (other, "auto")):
            block = vk.backend(name)
            context.run(block.__enter__)
            with vk.backend("auto"):
                assert context.run(compiled, x) == number(name)
                assert pool.submit(compiled, x).result() == 0  # auto, the last that is open
                assert compiled(x) == 0
            context.run(block.__exit__)
        assert compiled(x) == number("fused")
    assert compiled(x) == 0


def test_a_block_inside_compiled_code_leaves_blocks_of_other_threads_alone():
    def function(x):
        policy = vk.backend("fused")  # Dynamo of torch 2.11 enters no object that was made outside
        with policy:
            with vk.backend("reference"), policy:
                inner = number(_select.policy())
            y = x + inner + 10 * number(_select.policy())
        return y + 100 * number(_select.policy())

    compiled, x = torch.compile(function, fullgraph=True, backend="eager"), torch.zeros(1)
    assert compiled(x) == 11
    with vk.backend("reference"):
        assert compiled(x) == 211
        with ThreadPoolExecutor(1) as pool:
            block = vk.backend("auto")
            pool.submit(block.__enter__).result()
            assert compiled(x) == 211
            assert pool.submit(_select.policy).result() == "auto"
            pool.submit(block.__exit__).result()
