"""A write is complete or leaves nothing: interrupts, full disks, existing folders, values out of range."""

import weakref
from pathlib import Path

import pytest
import torch

from soli.checkpoint import load_model, save_model, writer
from soli.checkpoint.name_map import Slot, slots
from soli.checkpoint.save import slot_view
from soli.checkpoint.writer import Target
from soli.errors import SoliError
from soli.model import Transformer
from tests.checkpoint.folders import full_config, full_model, saved


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest handles itself."""


@pytest.mark.parametrize("raised", [Interrupted, OSError(28, "No space left on device"), MemoryError])
def test_an_interrupted_write_leaves_nothing(raised, tmp_path: Path, monkeypatch) -> None:
    written = []

    def encode(self: Target, slot: Slot, values: torch.Tensor) -> torch.Tensor:
        written.append(slot)
        if len(written) == 20:
            raise raised
        return values.bfloat16() if slot.name.endswith("weight") else values

    monkeypatch.setattr(Target, "encode", encode)
    with pytest.raises((Interrupted, MemoryError, SoliError)) as error:
        save_model(full_model(), tmp_path / "m", shard_bytes=60_000)
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(error.value, SoliError) or "No space left" in str(error.value)


def test_the_folder_appears_only_at_the_end(tmp_path: Path, monkeypatch) -> None:
    seen = []
    plain = writer.write_json
    monkeypatch.setattr(
        writer, "write_json", lambda file, value: (seen.append((tmp_path / "m").exists()), plain(file, value))
    )
    saved(tmp_path / "m")
    assert seen == [False] and sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_folder_that_is_not_empty_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    saved(tmp_path / "m")  # an empty one may be filled
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(SoliError, match="not empty"):
        saved(tmp_path / "m", format="fp32")
    with pytest.raises(SoliError, match="not empty"):
        saved(tmp_path / "m" / "config.json")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_parent_folders_are_created(tmp_path: Path) -> None:
    assert load_model(saved(tmp_path / "a" / "b" / "m")).config.vocab_size == 97


def test_too_little_disk_space_is_detected_before_writing(tmp_path: Path, monkeypatch) -> None:
    usage = writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SoliError, match=r"are free"):
        saved(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_values_that_fp8_cannot_hold_name_their_tensor(tmp_path: Path) -> None:
    model = full_model()
    with torch.no_grad():
        model.layers[1].mlp.experts.gate_up_proj[3, 0, 0] = float("nan")
    with pytest.raises(SoliError, match=r"model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight: FP8 cannot hold"):
        save_model(model, tmp_path / "m", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(SoliError, match="meta device"):
        save_model(Transformer(full_config(), device="meta"), tmp_path / "m")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"format": "int3"}, "bf16, fp8, fp32"),
        ({"format": "bf16", "ue8m0": True}, "ue8m0"),
        ({"format": "bf16", "shard_bytes": 0}, "shard_bytes"),
    ],
)
def test_impossible_targets(arguments: dict, says: str) -> None:
    with pytest.raises(SoliError, match=says):
        Target(**arguments)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_memory_holds_one_tensor_at_a_time(format: str, tmp_path: Path) -> None:
    """When a tensor is asked for, at most the one before it is still in memory."""
    alive: list[weakref.ref] = []
    model, target = full_model(), Target(format)
    state = model.state_dict()

    def fetch(slot: Slot) -> writer.Encoded:
        assert sum(ref() is not None for ref in alive) <= 1
        values = slot_view(state, slot).clone()
        encoded = target.encode(slot, values)
        alive.append(weakref.ref(encoded))
        return encoded

    writer.write(tmp_path / "m", model.config, slots(model.config), target, fetch)
    assert len(alive) > 30


def test_the_tokenizer_is_copied(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja", "notes.txt"):
        (tmp_path / "t" / name).write_text("{}")
    save_model(full_model(), tmp_path / "m", "bf16", tmp_path / "t")
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    with pytest.raises(SoliError, match="no such folder"):
        save_model(full_model(), tmp_path / "n", "bf16", tmp_path / "nowhere")
