"""Where a timm ViT looks: attention probabilities of the unfused model, and attention rollout."""

import contextlib
from collections.abc import Iterator

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ._output import CommandError


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record each layer's attention while an unfused timm ViT runs: a list of (B, N, N), head averages, in layer order.

    The probabilities are computed from the outputs of the qkv projections, which are all that a forward with SDPA shows.
    """
    layers = [block.attn for block in getattr(model, "blocks", ()) if type(getattr(block, "attn", None)) is Attention]
    if not layers or len(layers) != len(model.blocks):
        raise CommandError(f"--attention-map: not every block of this {type(model).__name__} has timm's plain Attention")
    found: list[Tensor] = []

    def record(attention: Attention, qkv: Tensor) -> None:
        qkv = qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, Dh)
        q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
        logits = (q.float() @ k.float().transpose(-2, -1)) * attention.scale
        found.append(logits.softmax(-1).mean(1))  # (B, N, N)

    hooks = [a.qkv.register_forward_hook(lambda _m, _in, out, a=a: record(a, out)) for a in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rollout(layers: list[Tensor]) -> Tensor:
    """Attention rollout: how much of each input token is in each output token, if attention and residual mix evenly.

    Source: Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928: the product of (A + I) / 2 over layers, the last leftmost.

    Args:
        layers: (B, N, N) each, rows summing to 1, from first to last layer.

    Returns:
        (B, N, N), rows summing to 1.
    """
    identity = torch.eye(layers[0].shape[-1], device=layers[0].device)
    mixed = identity.expand_as(layers[0])
    for attention in layers:
        mixed = (attention + identity) / 2 @ mixed
    return mixed


def heat_map(attention: Tensor, num_prefix: int, grid: tuple[int, int], class_token: bool) -> Tensor:
    """What one query attends to, over the patches: the class token's row, or the mean of all patches' rows without one.

    Args:
        attention: (B, N, N); num_prefix: P, class and register tokens in front of the N - P patches.

    Returns:
        (B, Gh, Gw), each summing to 1.
    """
    rows = attention[:, 0] if class_token else attention[:, num_prefix:].mean(1)
    patches = rows[:, num_prefix:]
    return (patches / patches.sum(-1, keepdim=True)).unflatten(-1, grid)
