"""Kimi K2.5 in full size, headers alone: opened, counted and planned as downloaded.

Its first layers, of full size too, stand for the whole but where a test is slow.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from soli.analysis.parameters import count
from soli.checkpoint import memory, open_checkpoint
from soli.checkpoint.name_map import Kind, Slot, slots
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.shard import encode_header
from soli.cli import main
from soli.config import ModelConfig
from soli.experts.sources import sources_of
from soli.plan.sizes import sizes_as_published, sizes_of
from soli.presets import KIMI_K2
from tests.checkpoint.folders import INDEX
from tests.checkpoint.kimi import DEFAULTS, PREFIX, VISION, WHOLE
from tests.checkpoint.published import KIMI, is_routed

TEXT: dict[str, Any] = {
    **KIMI_K2,
    "rope_scaling": {**KIMI_K2["rope_scaling"], "factor": 64.0, "beta_fast": 32.0},
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "quantization_config": KIMI,
    "num_key_value_heads": 64,
}
WHOLE_MODEL = 61  # layers
FIRST_LAYERS = 4
EXPERTS_PER_LAYER = 384
Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def write_files(folder: Path, config: Mapping[str, Any], files: Mapping[str, Iterable[Spec]]) -> int:
    """Write headers of these tensors by file, each with a hole behind it; returns the bytes of all tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    total = 0
    for name, specs in files.items():
        specs = list(specs)
        head, _, size = encode_header(specs)
        with open(folder / name, "wb") as stream:
            stream.write(head)
            stream.truncate(size)
        weight_map |= {tensor: name for tensor, _, _ in specs}
        total += size - len(head)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def specs(slot: Slot) -> Iterator[Spec]:
    """As published: routed experts are packed, all else is bf16."""
    name = PREFIX + slot.name
    if is_routed(slot.name):
        rows, columns = slot.shape
        yield f"{name}_packed", "I32", (rows, columns // 8)
        yield f"{name}_scale", "BF16", (rows, columns // 32)
        yield f"{name}_shape", "I32", (2,)
    else:
        yield name, "F32" if slot.kind is Kind.ROUTER_BIAS else "BF16", slot.shape


def text_config(layers: int) -> dict[str, Any]:
    return TEXT | {"num_hidden_layers": layers}


@pytest.fixture(scope="module", params=[FIRST_LAYERS, pytest.param(WHOLE_MODEL, marks=pytest.mark.slow)])
def layers(request: pytest.FixtureRequest) -> int:
    assert isinstance(request.param, int)
    return request.param


@pytest.fixture(scope="module")
def folder(layers: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig.from_dict(text_config(layers))
    files: dict[str, list[Spec]] = {"vision.safetensors": [(name, "BF16", shape) for name, shape in VISION.items()]}
    for slot in slots(config):
        files.setdefault(f"model-{slot.layer}.safetensors", []).extend(specs(slot))
    folder = tmp_path_factory.mktemp("kimi") / "Kimi-K2.5"
    total = write_files(folder, WHOLE | {"text_config": DEFAULTS | text_config(layers)}, files)
    assert layers < WHOLE_MODEL or 590e9 < total < 600e9  # the download is 595 GB
    return folder


def checkpoint_bytes(layers: int) -> float:
    """Of all layers the 595 GB of the download; of fewer, what their parameters take by the published formats."""
    if layers == WHOLE_MODEL:
        return 595e9
    return sizes_as_published(ModelConfig.from_dict(text_config(layers))).total_bytes


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


def test_it_is_opened(checkpoint: Checkpoint, layers: int) -> None:
    assert [note.partition(": ")[2] for note in checkpoint.notes] == [
        "3 tensors of images are left out: the model is used for text alone"
    ]
    formats = {checkpoint.format(slot) for slot in checkpoint.slots if is_routed(slot.name)}
    experts = (layers - 1) * EXPERTS_PER_LAYER
    assert formats == {"int4_bf16"} and sum(is_routed(slot.name) for slot in checkpoint.slots) == 3 * experts
    allocated, mapped = memory.Storage(torch.bfloat16, torch.device("cpu"), True, True).bytes_of(checkpoint)
    assert allocated + mapped == pytest.approx(checkpoint_bytes(layers), rel=0.01)
    sources = sources_of(checkpoint)
    assert sources.count == experts
    assert sources.slot_bytes == pytest.approx(3 * 2048 * 7168 * 4.5 / 8, rel=0.002)


def test_it_is_counted(folder: Path, layers: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", str(folder), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    if layers == WHOLE_MODEL:
        assert counted["total"] == 1_026_408_232_448
        assert counted["activated"] == pytest.approx(32.9e9, rel=0.01)
    else:
        assert counted["total"] == count(ModelConfig.from_dict(text_config(layers))).total


def test_its_sizes_are_the_same_before_and_after_the_download(checkpoint: Checkpoint, layers: int) -> None:
    stored, published = sizes_of(checkpoint), sizes_as_published(ModelConfig.from_dict(text_config(layers)))
    assert stored.parts == published.parts and stored.format == "int4"
    assert stored.expert_bytes == 3 * 2048 * 7168 * 4.5 / 8


@pytest.mark.slow
def test_it_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--memory", "768GB", "--disk", "7GB/s", "--memory-speed", "200GB/s", "--json"]
    assert main(["plan", str(folder), *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["decode_tokens_per_second"] > 0
