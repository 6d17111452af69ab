"""A cache for the tests of the fused forward: texts in KV blocks of any order, every token a query by itself."""

from collections.abc import Sequence

import torch

from soli.engine.latent_cache import CacheStep, LatentCache, blocks_for
from soli.engine.runner import Runner
from soli.model import BackboneOutput, Transformer


class ShuffledCache(LatentCache):
    """`rows` texts of up to `slots` slots in KV blocks of S. What was never written is NaN."""

    def __init__(self, model: Transformer, rows: int, slots: int, S: int, seed: int = 0) -> None:
        each = blocks_for(slots, S)
        super().__init__(rows * each + 1, S, rows, slots)
        order = torch.randperm(rows * each + 1, generator=torch.Generator().manual_seed(seed))
        self.block_tables_RM[:] = order[1:].view(rows, each).numpy()
        self.has_mtp = len(model.mtp) > 0
        width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
        for layer in range(model.config.num_hidden_layers + len(model.mtp)):
            self.kv_blocks(layer, width, model.embed_tokens.weight).fill_(float("nan"))
            if model.config.has_indexer(layer):
                index_width = model.config.index_head_dim
                self.kv_blocks(layer, index_width, model.embed_tokens.weight, "index_key").fill_(float("nan"))

    def tokens(self, rows: Sequence[int], at: int, count: int) -> CacheStep:
        """The step that reads `count` tokens of each of `rows` from position `at`."""
        places = [at + t for _ in rows for t in range(count)]
        return self.step([row for row in rows for _ in range(count)], places, [1] * len(places))

    def read(self, runner: Runner, ids_BT: torch.Tensor, rows: Sequence[int], at: int) -> list[BackboneOutput]:
        """Tokens (B, T) of these rows from position `at`: the backbone, and the MTP module if there is one."""
        B, T = ids_BT.shape
        step = self.tokens(rows, at, T)
        main = runner.forward(ids_BT.flatten().contiguous(), step.positions_T, step, [])
        outputs = [BackboneOutput(main.hidden_TD.view(B, T, -1), main.routing)]
        if self.has_mtp:
            draft = runner.draft(main.hidden_TD, (ids_BT.flatten() + 1) % 97, step.positions_T, step)
            outputs.append(BackboneOutput(draft.hidden_BTD.view(B, T, -1), draft.routing))
        return outputs
