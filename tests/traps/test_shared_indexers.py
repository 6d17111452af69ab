"""Trap 20: layers of type `shared` attend to what the last full layer has selected, and have no indexer."""

import pytest
import torch

from soli.checkpoint.name_map import slots
from soli.config import ModelConfig, preset
from soli.model.attention import LatentAttention
from soli.model.indexer import Indexer
from tests.model.oracle import draw_sparse_config, make_model, oracle_of

TYPES = ["full", "shared", "shared", "full"]
TOPK = 6


def config(types: list[str] | None = TYPES) -> ModelConfig:
    return draw_sparse_config("glm_moe_dsa", 1, num_hidden_layers=4, index_topk=TOPK, indexer_types=types)


def ids(tokens: int = 40) -> torch.Tensor:
    return torch.randint(0, 97, (2, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_shared_layer_attends_to_the_selection_of_the_last_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(config()).eval()
    assert [isinstance(block.self_attn.indexer, Indexer) for block in model.layers] == [
        kind == "full" for kind in TYPES
    ]
    masks: list[torch.Tensor] = []
    expanded = LatentAttention._expanded

    def recorded(self: LatentAttention, *args: torch.Tensor) -> torch.Tensor:
        masks.append(args[-1])
        return expanded(self, *args)

    monkeypatch.setattr(LatentAttention, "_expanded", recorded)
    logits = model(ids())
    assert torch.equal(masks[1], masks[0]) and torch.equal(masks[2], masks[0]) and not torch.equal(masks[3], masks[0])
    assert all(mask.sum(-1).max() == TOPK for mask in masks)
    torch.testing.assert_close(logits, oracle_of(model)(ids()).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dense_shared_layers_would_be_right_up_to_what_is_selected_and_wrong_after() -> None:
    model = make_model(config()).eval()
    few, many = model(ids(TOPK)), model(ids())
    oracle = oracle_of(model)
    for block in model.layers:
        if block.self_attn.indexer is None:
            forward = block.self_attn.forward
            block.self_attn.forward = lambda x, cos_sin, cache, _selection, forward=forward: forward(x, cos_sin, cache)
    assert torch.equal(model(ids(TOPK)), few)
    assert not torch.allclose(model(ids()), many, atol=1e-2)
    torch.testing.assert_close(many, oracle(ids()).logits, rtol=1e-4, atol=1e-4)


def test_glm_52_has_an_indexer_in_21_layers_and_in_its_mtp_module() -> None:
    layers = {slot.layer for slot in slots(preset("glm-5.2")) if ".indexer." in slot.name}
    assert sorted(layers) == [0, 1, 2, *range(6, 75, 4), 78]


@pytest.mark.parametrize(
    "spelling",
    [
        {"indexer_types": TYPES},
        {"index_topk_pattern": "FSSF"},
        {"index_topk_pattern": TYPES},
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},
        {"indexer_types": TYPES, "index_topk_freq": 2},
    ],
    ids=str,
)
def test_each_way_to_say_which_layers_share(spelling: dict[str, object]) -> None:
    spelled = ModelConfig.from_dict({**config(None).to_dict(), "indexer_types": None, **spelling})
    assert spelled.indexer_types == tuple(TYPES)
    assert ModelConfig.from_dict(spelled.to_dict()) == spelled
