"""Trap 21: the next draft starts from the *normed* hidden state of the one before, which the head reads too."""

import torch

from tests.model.oracle import draw_sparse_config, make_model


@torch.no_grad()
def test_the_second_draft_starts_from_the_normed_output_of_the_first() -> None:
    model = make_model(draw_sparse_config("glm_moe_dsa", 2, num_nextn_predict_layers=1)).eval()
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    module = model.mtp[0]
    cos_sin = model.rope(torch.arange(10).expand(2, 10))

    def draft(hidden: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
        """The module step by step, without the norm after its block."""
        both = torch.cat((module.enorm(model.embed_tokens(next_ids)), module.hnorm(hidden)), -1)
        return module.block(module.eh_proj(both), cos_sin)[0]

    hidden = model.backbone(ids[:, :10]).hidden_BTD
    first = model.mtp_step(0, hidden, ids[:, 1:11]).hidden_BTD
    second = model.mtp_step(0, first, ids[:, 2:12]).hidden_BTD
    assert torch.equal(first, module.norm(draft(hidden, ids[:, 1:11])))
    normed = module.norm(draft(module.norm(draft(hidden, ids[:, 1:11])), ids[:, 2:12]))
    assert torch.equal(second, normed)
    not_normed = module.norm(draft(draft(hidden, ids[:, 1:11]), ids[:, 2:12]))
    assert not torch.allclose(second, not_normed, atol=1e-3)
