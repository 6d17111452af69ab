"""Trap 19: the indexer's RoPE has a layout of its own, which is invisible while everything is selected."""

import pytest
import torch
from torch import Tensor

from soli.config import replace
from soli.model import Transformer
from tests.model.oracle import draw_sparse_config, make_model, oracle_of

TOPK = 6


def model_of(model_type: str, **changes: object) -> Transformer:
    return make_model(draw_sparse_config(model_type, 1, index_topk=TOPK, **changes)).eval()


def logits(model: torch.nn.Module, tokens: int) -> Tensor:
    ids = torch.randint(0, 97, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_the_wrong_layout_shows_beyond_what_is_selected_alone(model_type: str) -> None:
    model = model_of(model_type)
    wrong = make_model(
        replace(model.config, {"indexer_rope_interleave": not model.config.indexer_rope_interleave})
    ).eval()
    wrong.load_state_dict(model.state_dict())
    assert torch.equal(logits(wrong, TOPK), logits(model, TOPK))
    oracle, ours = logits(oracle_of(model), 40), logits(model, 40)
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(wrong, 40), oracle, atol=1e-2)


def test_v32_is_half_split_and_glm_interleaved_without_the_field() -> None:
    for model_type, interleaved in (("deepseek_v32", False), ("glm_moe_dsa", True)):
        config = model_of(model_type, indexer_rope_interleave=None).config
        assert config.indexer_rope_interleave is interleaved
        assert config.rope_interleave is True


def test_the_rotated_part_comes_first() -> None:
    """Attention's own comes last."""
    model = model_of("deepseek_v32")
    indexer = model.layers[0].self_attn.indexer
    x = torch.ones(1, 3, 1, indexer.I)
    rotated = indexer._rotate(x, model.rope(torch.arange(3)[None]))
    assert torch.equal(rotated[..., indexer.R :], x[..., indexer.R :])
    assert not torch.equal(rotated[0, 1, 0, : indexer.R], x[0, 1, 0, : indexer.R])
