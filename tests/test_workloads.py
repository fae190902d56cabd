"""The table of workloads says what timm builds."""

import pytest
import timm
import torch

from vitkernels.cli._workloads import WORKLOADS


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_a_workload_has_the_shapes_of_its_timm_model(workload):
    with torch.device("meta"):
        model = timm.create_model(workload.timm_name)
    block = model.blocks[0]
    assert len(model.blocks) == workload.depth
    assert model.embed_dim == workload.width
    assert block.attn.num_heads == workload.num_heads
    assert block.mlp.fc1.out_features == workload.hidden
    assert model.patch_embed.patch_size == (workload.patch, workload.patch)
    assert model.patch_embed.img_size == (workload.image, workload.image)
    assert model.num_prefix_tokens + model.patch_embed.num_patches == workload.tokens
    assert workload.head_dim * workload.num_heads == workload.width
