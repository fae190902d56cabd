"""Attention is tuned by ``vitkernels tune``, and its launchers follow the table where an entry fits."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from test_tune import MAKERS, Clock, tuned

from vitkernels.cli import _tuning, tune
from vitkernels.kernels import _attention_configs, _recorder, _tuned, _tuning_attention, attention, attention_backward
from vitkernels.kernels._attention_configs import BackwardConfig, ForwardConfig
from vitkernels.kernels._device import gpu_name

bf16 = torch.bfloat16
STREAMED = ForwardConfig(False, 64, 32, 4, 2)
H100 = gpu_name(-1, "sm_90")
LAUNCHES = BackwardConfig(False, 32, 16, 16, 4, 1)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes entries into this user's table of the chip that stands for sm_90."""
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    _tuned.forget()
    _attention_configs._warn.cache_clear()
    yield lambda key, entry: _tuned.write(tmp_path / "tuned" / _tuned.file_name(H100), "attention", key, entry)
    _tuned.forget()


def forward(N=197, M=None, Dh=64, dtype=bf16, biased=False, packed=False):
    return _attention_configs.forward_config(90, H100, dtype, N, M or N, Dh, biased, False, packed)


def backward(N=197, M=None, Dh=64, dtype=bf16, heads=10**4, plain=True):
    return _attention_configs.backward_config(90, H100, dtype, heads, N, M or N, Dh, 264, False, plain, False)


def test_the_table_decides_for_the_lengths_of_its_bucket_and_for_nothing_else(table):
    default, default_backward = forward(), backward()
    table("forward/bfloat16/64/256", _attention_configs.entry(STREAMED))
    table("backward/bfloat16/64/256", _attention_configs.entry(LAUNCHES))
    for N in (193, 197, 256):
        assert (forward(N), backward(N)) == (STREAMED, LAUNCHES)
    assert forward(257) != STREAMED
    assert forward(Dh=72) != STREAMED
    assert forward(M=200) != STREAMED
    assert forward(dtype=torch.float32) != STREAMED
    assert forward(dtype=torch.float16) == default
    assert backward(dtype=torch.float16) == default_backward
    assert forward(biased=True) == forward(packed=False, biased=True) != STREAMED
    assert forward(packed=True).block_m == 64
    assert backward(257) == backward(M=200) == backward(plain=False) == default_backward != LAUNCHES
    table("forward/bfloat16/64/256", {"plan": "default"})
    assert forward() == default


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [bf16, torch.float32], ids=str)
def test_every_default_is_one_that_a_table_could_choose(arch, dtype):
    gpu = gpu_name(-1, f"sm_{arch}")
    for N, Dh in itertools.product((1, 16, 17, 65, 197, 257, 577, 1370), (1, 32, 64, 72, 76, 80, 88, 96, 104, 128, 136, 256)):
        for biased, full_bias, packed in (
            (False, False, False),
            (True, False, False),
            (True, True, False),
            (False, False, True),
        ):
            config = _attention_configs.forward_config(arch, gpu, dtype, N, N, Dh, biased, full_bias, packed)
            assert not _attention_configs.why_not_forward(config, arch, N, Dh), config
            plain = not biased and not packed
            config = _attention_configs.backward_config(arch, gpu, dtype, 10**4, N, N, Dh, 264, full_bias, plain, packed)
            assert not _attention_configs.why_not_backward(config, arch, Dh), config


def test_lengths_share_a_key_by_64_up_to_512_and_then_by_powers_of_two():
    keys = [_attention_configs.key("forward", bf16, N, 80) for N in (1, 64, 197, 256, 257, 512, 513, 577, 1370)]
    assert keys == [f"forward/bfloat16/80/{n}" for n in (64, 64, 256, 256, 320, 512, 1024, 1024, 2048)]


def test_one_program_a_head_needs_as_many_heads_as_fill_the_chip(table):
    one = BackwardConfig(True, 64, 16, 16, 4, 1)
    table("backward/bfloat16/64/256", _attention_configs.entry(one))
    assert backward(heads=264) == one
    assert not backward(heads=263).one_program


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (STREAMED._replace(block_n=48), "block_n is 48"),
        (STREAMED._replace(num_warps=3), "num_warps is 3"),
        (ForwardConfig(False, 128, 128, 8, 4)._replace(num_stages=9), "num_stages is 9"),
        (ForwardConfig(True, 32, 0, 4, 1), "block_m is 32"),
        (None, "config"),
    ],
    ids=str,
)
def test_an_entry_that_cannot_run_is_named_once_and_passed_over(table, caplog, config, why):
    default = forward()
    entry = {"plan": "tuned"} if config is None else _attention_configs.entry(config)
    table("forward/bfloat16/64/256", entry)
    with caplog.at_level(logging.WARNING, "vitkernels"):
        assert forward() == forward() == default
    (record,) = caplog.records
    assert why in record.message
    assert "forward/bfloat16/64/256" in record.message
    assert H100 in record.message


def test_entries_too_large_for_the_chip_are_refused():
    wide = ForwardConfig(False, 128, 128, 8, 4)
    assert "shared memory" in _attention_configs.why_not_forward(wide, 120, 577, 128)
    assert _attention_configs.why_not_forward(wide._replace(num_stages=1), 120, 577, 64) == ""
    resident = ForwardConfig(True, 64, 0, 4, 1)
    assert _attention_configs.why_not_forward(resident, 90, 197, 64) == ""
    assert "not kept" in _attention_configs.why_not_forward(resident, 80, 197, 64)
    assert "not kept" in _attention_configs.why_not_forward(resident, 90, 577, 64)
    deep = BackwardConfig(False, 64, 128, 128, 8, 4)
    assert "shared memory" in _attention_configs.why_not_backward(deep, 120, 128)
    assert "block is 8" in _attention_configs.why_not_backward(LAUNCHES._replace(block=8), 90, 64)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize(("N", "Dh"), [(197, 64), (257, 80), (1370, 64)])
def test_the_launcher_would_take_every_candidate_and_the_default_is_not_alone(arch, N, Dh):
    for direction in ("forward", "backward"):
        found = _tuning_attention.candidates(direction, arch, N, Dh)
        assert len(set(found)) == len(found) == len({_tuning_attention._name(c) for c in found}) >= 6
    forms = {c.one_program for c in _tuning_attention.candidates("backward", arch, N, Dh)}
    assert forms == ({True, False} if N <= 320 else {False})


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels take CPU tensors")
def test_attention_is_tuned_for_a_model_and_its_launchers_follow(monkeypatch, tmp_path, capsys):
    """A few candidates run in the interpreter and pass their gate against float64."""

    def few(shape, batch, arch, dtype):
        for case in MAKERS()["attention"](shape, batch, arch, dtype):
            yield replace(case, entries=dict(list(case.entries.items())[:3]))

    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_gpu", lambda text: (torch.device("cpu"), "sm_90"))
    monkeypatch.setattr(tune, "_makers", lambda: {"attention": few})
    monkeypatch.setattr(_tuning, "_sampler", lambda device: Clock(monkeypatch, {"64": 0.5, "None": 0.5}))
    _tuned.forget()
    document = tuned(capsys, "test_vit", "--batch-sizes", "1")
    assert document["rows"][0]["chosen"] == "streamed 128x64 w8 s3"
    assert [row["key"] for row in document["rows"]] == ["forward/bfloat16/32/128", "backward/bfloat16/32/128"]
    for row in document["rows"]:
        assert row["refused"] == row["broken"] == {}
        assert len(row["us"]) == 3
    launched = []
    qkv = torch.empty(1, 101, 3, 2, 32, dtype=bf16, device="meta")
    trying = _tuned.trying("attention", "backward/bfloat16/32/128", _attention_configs.entry(LAUNCHES))
    with trying, _recorder.recording(lambda name, *_: launched.append(name)):
        saved = attention.launch_attention_fwd(*qkv.unbind(2), None, None, 0, 1.0, False)
        attention_backward.launch_attention_qkv_bwd(saved[0], qkv, *saved, None, None, 0, 1.0, False, False)
    _tuned.forget()
    # By default K and V are resident, and one program has a head.
    assert launched == ["_attention_stream_fwd_kernel", *["_attention_bwd_kernel"] * 2]
