"""Trap 12: keys are wider than values; every attention path must support it, and expanded must equal absorbed."""

import pytest
import torch

from soli.engine.latent_cache import LatentCache
from soli.model import attention
from tests.model.oracle import draw_config, draw_v2_config, make_model


def literal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    scores = (q.double() @ k.double().transpose(2, 3)) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v.double()


@pytest.mark.parametrize("short", [0, 512], ids=["fused", "materialised scores"])
def test_keys_of_192_and_values_of_128(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_EXPLICIT_QUERIES", short)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 10, 192, generator=generator) for _ in range(2))
    v = torch.randn(2, 3, 10, 128, generator=generator)
    out = attention.attend(q, k, v, None, 192**-0.5)
    torch.testing.assert_close(out.double(), literal(q, k, v, 192**-0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [draw_config(s) for s in range(8)] + [draw_v2_config(s) for s in range(2)])
def test_absorbed_decoding_equals_one_expanded_forward(config) -> None:  # type: ignore[no-untyped-def]
    model = make_model(config)
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = LatentCache.whole_rows([12, 12], block_size=4)

    def forward(start: int, stop: int) -> torch.Tensor:
        step = cache.step([0, 1], [start, start], [stop - start] * 2)
        hidden_1TD = model.backbone(ids[:, start:stop].reshape(1, -1), step.positions_T[None], step).hidden_BTD
        return hidden_1TD.unflatten(1, (2, -1))[0]

    with torch.no_grad():
        whole = model(ids)
        parts = [forward(0, 5), forward(5, 8), *(forward(t, t + 1) for t in range(8, 12))]
        chunks = model.head(torch.cat(parts, dim=1))
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
