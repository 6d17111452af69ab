"""A corpus and a model so small that a training step takes milliseconds: counting sentences, eight experts."""

import json
from pathlib import Path

import numpy as np
import torch

from soli.config import ModelConfig
from soli.data.tokenizer import Tokenizer
from soli.model.transformer import Transformer
from soli.train.settings import TrainSettings, read_settings

EOS = 1

MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}

RECIPE = {
    "model": MODEL,
    "schedule": {"sequence_length": 16, "batch_sequences": 8, "learning_rate": 3e-3, "constant_tokens": 128 * 12},
    "balance": {"gamma": 0.01},
    "run": {"device": "cpu", "precision": "fp32", "micro_sequences": 4, "log_every": 1, "save_every": 4},
    "eval": {"every": 4, "tokens": 64, "samples": 2, "sample_tokens": 4},
}


def tiny_model(seed: int = 0, **changes: object) -> Transformer:
    """A model with random weights whose router scores are spread out, so that no two experts tie."""
    model = Transformer(ModelConfig.from_dict(MODEL | changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for _, layer in model.moe_layers():
        torch.nn.init.normal_(layer.gate.weight, std=0.3, generator=generator)
    return model


def settings(**sections: dict[str, object]) -> TrainSettings:
    """RECIPE with some fields of some sections changed."""
    return read_settings({name: {**RECIPE.get(name, {}), **sections.get(name, {})} for name in {**RECIPE, **sections}})


def windows(rows: int, width: int, seed: int = 0, vocab: int = 288) -> torch.Tensor:
    """Random ids (BW) in which a tenth of the tokens end a document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, width), generator=generator)
    ends = torch.rand(rows, width, generator=generator) < 0.1
    return ids.masked_fill(ends, EOS)


def write_data(folder: Path) -> Path:
    """A data folder as `soli data build` writes it: sentences of digits that count upwards."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = ["".join(str((start + n) % 10) for n in range(12)) for start in range(10)]
    tokenizer = Tokenizer.train(texts, 272)
    tokenizer.save(folder)
    documents = [[0, 5, *tokenizer.encode(text), EOS] for text in texts]
    order = np.random.default_rng(0)
    counts = {}
    for split, repeats in (("train", 200), ("valid", 20)):
        ids = np.concatenate([documents[i] for i in order.integers(10, size=repeats)]).astype("<u2")
        ids.tofile(folder / f"{split}.bin")
        counts[f"{split}_tokens"] = len(ids)
    (folder / "heldout.tsv").write_text("toy\t你好\thello\ntoy\t再见\tbye\n", encoding="utf-8")
    (folder / "meta.json").write_text(
        json.dumps({"dtype": "uint16", "vocab_size": 272, "tokenizer_sha256": "a", **counts})
    )
    return folder
