"""Trap 10: RoPE is interleaved in released weights: pairs are (x0, x1), (x2, x3), ...: rotated once, in place."""

import torch

from soli.config import ModelConfig
from soli.model.rope import Rope, rotate
from tests.model.oracle import draw_config, make_model


def test_each_adjacent_pair_is_rotated_by_its_angle_as_a_complex_number() -> None:
    config = draw_config(0, rope_scaling=None, rope_interleave=True)
    x_BTHR = torch.randn(1, 7, 2, 8, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x_BTHR, Rope(config)(torch.arange(7)[None]), interleaved=True)
    angles = torch.arange(7)[:, None] * config.rope_theta ** (-torch.arange(0, 8, 2) / 8)
    rotation = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    expected = torch.view_as_real(torch.view_as_complex(x_BTHR.unflatten(-1, (-1, 2))) * rotation).flatten(-2)
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-6)


def test_the_two_layouts_agree_when_rows_are_permuted_once_and_not_otherwise() -> None:
    halves: ModelConfig = draw_config(3, rope_interleave=False, q_lora_rank=None, rope_scaling=None)
    model = make_model(halves)
    pairs = make_model(draw_config(3, rope_interleave=True, q_lora_rank=None, rope_scaling=None))
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(model(ids), pairs(ids), atol=1e-3)  # never permuted
        _interleave_rope_rows(pairs)
        torch.testing.assert_close(model(ids), pairs(ids), rtol=1e-4, atol=1e-5)
        _interleave_rope_rows(pairs)
        assert not torch.allclose(model(ids), pairs(ids), atol=1e-3)  # permuted twice


def _interleave_rope_rows(model: torch.nn.Module) -> None:
    """Reorder the rows that make rotary values from firsts, then seconds, to first, second, first, second, ..."""
    config = model.config
    R = config.qk_rope_head_dim
    order = torch.arange(R).view(2, -1).T.flatten()
    for block in model.layers:
        attention = block.self_attn
        q = attention.q_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        q[:, -R:] = q[:, -R:][:, order]
        kv = attention.kv_a_proj_with_mqa
        kv.weight[-R:] = kv.weight[-R:][order]
        if kv.bias is not None:
            kv.bias[-R:] = kv.bias[-R:][order]
