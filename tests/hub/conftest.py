"""A hub on this machine and an empty cache, for huggingface-hub in this process and in those it starts."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import soli
from tests.hub.stand_in import Hub, running_hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / "hub"
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(folder.parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder.parent / "token"))
    return folder


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
        template = stand_in.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield stand_in


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded_files(size: int = 600_000) -> dict[str, bytes]:
    """A repository with two shards, and much that Soli does not read."""
    weight_map = {"model.embed_tokens.weight": SHARDS[0], "lm_head.weight": SHARDS[1]}
    draw = random.Random(size)
    files = {name: draw.randbytes(size) for name in SHARDS}
    files |= {
        "config.json": json.dumps(soli.preset("nano").to_dict()).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/rag.jinja": b"{{ documents }}",
        "README.md": b"# A model",
        "LICENSE": b"free",
    }
    others = ("pytorch_model.bin", "modeling_deepseek.py", "model.gguf", ".gitattributes", "original/model.safetensors")
    return files | dict.fromkeys(others, b"never")
