"""Trap 9, the model's half: MTP joins [embedding; hidden], and the hidden state is the one after the final norm."""

import torch

from tests.model.oracle import draw_config, make_model


def test_embedding_comes_first_and_hidden_is_normed() -> None:
    model = make_model(draw_config(1, num_nextn_predict_layers=1))
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    backbone, module = model.backbone(ids[:, :-1]), model.mtp[0]
    inputs: list[torch.Tensor] = []
    module.eh_proj.register_forward_hook(lambda _m, args, _out: inputs.append(args[0]))
    model.mtp_step(0, backbone.hidden_BTD, ids[:, 1:])
    D = model.config.hidden_size
    torch.testing.assert_close(inputs[0][..., :D], module.enorm(model.embed_tokens(ids[:, 1:])))
    torch.testing.assert_close(inputs[0][..., D:], module.hnorm(backbone.hidden_BTD))
    last: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda _m, _args, out: last.append(out))
    assert torch.equal(model.backbone(ids[:, :-1]).hidden_BTD, last[0])


def test_the_head_of_the_main_model_reads_both() -> None:
    model = make_model(draw_config(1, num_nextn_predict_layers=2))
    assert len(model.mtp) == 2
    assert not any("embed" in name or "head" in name for name, _ in model.mtp.named_parameters())
