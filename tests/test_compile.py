"""Operators and policy under torch.compile, torch.export and torch.fx."""

import pytest
import torch

import vitkernels as vk

W8, W16 = torch.randn(8), torch.randn(16, 8)
CALLS = {
    "layer_norm": lambda x: vk.ops.layer_norm(x, W8, W8),
    "add_layer_norm": lambda x: vk.ops.add_layer_norm(x, x, W8, layer_scale=W8)[0],
    "linear": lambda x: vk.ops.linear(x, W16, act="gelu", norm=(W8, None, 1e-6)),
    "mlp": lambda x: vk.ops.mlp(x, W8, W8, W16, None, W16.T, W8, layer_scale=W8),
    "attention": lambda x: vk.ops.attention(*(x.unflatten(-1, (2, 4)),) * 3),
    "attention_qkv": lambda x: vk.ops.attention_qkv(x.unflatten(-1, (2, 4)).unsqueeze(2).expand(-1, -1, 3, -1, -1)),
    "patch_embed": lambda x: vk.ops.patch_embed(x[:, None, :4, :4], torch.ones(6, 1, 2, 2)),
    "resample_pos_embed": lambda x: vk.ops.resample_pos_embed(x[:1, :4], (3, 5), (2, 2), 0),
    "resample_pos_embed_many": lambda x: vk.ops.resample_pos_embed_many(x[:1, :4], [(3, 5), (x.shape[0], 2)]),
}


def test_every_operator_is_tried_here():
    assert set(CALLS) == set(vk.ops.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_operators_trace_whole_with_dynamic_shapes(name):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 3):
        x = torch.randn(batch, 6, 8)
        assert torch.equal(compiled(x), CALLS[name](x))


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_leaves_of_torch_fx(name):
    class Caller(torch.nn.Module):
        def forward(self, x):
            return CALLS[name](x)

    x = torch.randn(2, 6, 8)
    traced = torch.fx.symbolic_trace(Caller())
    calls = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert name in calls
    assert torch.equal(traced(x), CALLS[name](x))


def test_a_compiled_function_follows_a_change_of_backend(no_interpreter):
    compiled = torch.compile(CALLS["layer_norm"], fullgraph=True, backend="eager")
    x = torch.randn(2, 6, 8)
    compiled(x)
    with vk.backend("reference"):
        compiled(x)
    with vk.backend("fused"), pytest.raises(Exception, match="cannot run its kernel"):
        compiled(x)
    compiled(x)


def test_a_backend_block_inside_compiled_code_is_traced():
    def function(x):
        with vk.backend("fused"):
            y = vk.ops.layer_norm(x)
        return y, vk.ops.layer_norm(x)

    kernel, reference = torch.compile(function, fullgraph=True, backend="eager")(x := torch.randn(4, 768) * 3 + 5)
    assert torch.equal(reference, torch.nn.functional.layer_norm(x, (768,), eps=1e-6))
    assert not torch.equal(kernel, reference)
    assert vk._select.policy() == "auto"


def test_the_architecture_is_a_constant_to_dynamo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))

    def function(x):
        return x + 1 if vk._select._architecture(0) == "sm_90" else x

    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_exported_programs_hold_the_operator_of_the_kernel():
    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            return vk.ops.layer_norm(x, self.weight, self.bias, self.eps)

    x = torch.randn(3, 8)
    with vk.backend("fused"):
        program = torch.export.export(Norm(8), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert "vitkernels.layer_norm_fwd" in str(program.graph)
    torch.testing.assert_close(program.module()(torch.randn(5, 8)).shape, torch.Size([5, 8]))
