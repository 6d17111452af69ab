"""The experts that a model's routers choose over texts, as a trace that cache policies are compared on."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.eval.scoring import OnProgress, document_parts
from soli.experts.trace import ExpertTrace


@torch.inference_mode()
def record_experts(
    text_model: TextModel,
    texts: Sequence[str],
    *,
    expert_bytes: int,
    max_tokens: int | None = None,
    on_progress: OnProgress = lambda _: None,
) -> ExpertTrace:
    """Reads the texts one after another, in parts where one is longer than the model, up to `max_tokens` tokens. The
    experts of a token are those that decoding the same text would choose. `on_progress` gets texts. SoliError for a
    model without routed experts."""
    if not text_model.model.config.n_routed_experts:
        raise SoliError("this model has no routed experts, so that there is nothing to record")
    rows: list[NDArray[np.int64]] = []  # (T, L, K) of each part
    for text in texts:
        for part in document_parts(text_model, text, end=False):
            if max_tokens is None or sum(map(len, rows)) < max_tokens:
                ids = torch.tensor([part], device=text_model.model.embed_tokens.weight.device)
                routing = text_model.model.backbone(ids).routing
                rows.append(torch.stack([layer.expert_ids_TK for layer in routing], dim=1).cpu().numpy())
        on_progress(1)
    return ExpertTrace(np.concatenate(rows)[:max_tokens], text_model.model.config.n_routed_experts, expert_bytes)
