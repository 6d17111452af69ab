"""Opening reads no weights, mapped tensors are right, old and empty buffers are ignored, random bytes never crash."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soli.checkpoint import Checkpoint, load_model, open_checkpoint
from soli.checkpoint.name_map import slots
from soli.checkpoint.shard import Shard, encode_header
from soli.errors import SoliError
from tests.checkpoint.folders import edit_tensors, full_config, saved


def test_a_hundred_gigabytes_open_in_no_time(tmp_path: Path) -> None:
    """A sparse file of zeros: nothing but its header is on the disk, and nothing else may be read."""
    config = full_config(vocab_size=1 << 20, hidden_size=8192, num_nextn_predict_layers=0)
    head, offsets, size = encode_header((slot.name, "F32", slot.shape) for slot in slots(config))
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(head)
        stream.truncate(size + 32 * 10**9)
        stream.truncate(size)
        stream.seek(offsets["model.norm.weight"])
        stream.write(torch.arange(8192).float().numpy().tobytes())
    assert size > 65e9 and file.stat().st_blocks * 512 < 10**6
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    began = time.perf_counter()
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.stored("model.norm.weight"), torch.arange(8192).float())
    head_row = checkpoint.stored("lm_head.weight")[-1]
    assert head_row.shape == (8192,) and not head_row.any()
    assert time.perf_counter() - began < 2


def test_opening_maps_no_shard(tmp_path: Path) -> None:
    checkpoint = Checkpoint(saved(tmp_path / "m", shard_bytes=60_000))
    mapped = [shard for shard in checkpoint._shards.values() if "_bytes" in vars(shard)]
    assert len(checkpoint._shards) > 3 and not mapped
    checkpoint.stored("model.norm.weight")
    assert sum("_bytes" in vars(shard) for shard in checkpoint._shards.values()) == 1


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    """The format does not promise alignment: two bytes, then floats, after a header of odd length."""
    values = torch.randn(3, 5)
    fields = {
        "a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [3, 5], "data_offsets": [2, 62]},
    }
    text = json.dumps(fields).encode()
    text += b" " * (1 - len(text) % 2)
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0" + values.numpy().tobytes())
    assert torch.equal(Shard(file).tensor("b"), values)


def test_old_rotary_buffers_and_empty_tensors_are_ignored(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.mlp.shared_experts.up_proj.bias": torch.ones(0),
    }
    before = load_model(folder).state_dict()
    edit_tensors(folder / "model.safetensors", lambda held: held.update(old))
    after = load_model(folder).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.none())
def test_random_bytes_are_rejected_in_a_sentence(data: bytes, length: int | None, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((len(data) if length is None else length).to_bytes(8, "little") + data)
    with pytest.raises(SoliError, match=r"x\.safetensors"):
        Shard(file)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)
FIELDS = st.fixed_dictionaries({}, optional={"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=5), FIELDS | JSON, min_size=1, max_size=3) | JSON)
def test_random_headers_are_rejected_in_a_sentence(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
    with pytest.raises(SoliError, match=r"x\.safetensors"):
        Shard(file)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_of_a_header_never_gives_other_shapes(data: st.DataObject, tmp_path_factory) -> None:
    """Flip one byte: the folder is rejected, or the byte did not matter (a space, a comment in __metadata__)."""
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        saved(folder, format="fp8")
    file = folder / "model.safetensors"
    original = file.read_bytes()
    position = data.draw(st.integers(0, 8 + int.from_bytes(original[:8], "little") - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != original[position]))
    shapes = {name: (entry.dtype, entry.shape) for name, entry in Checkpoint(folder).entries.items()}
    try:
        file.write_bytes(original[:position] + bytes([byte]) + original[position + 1 :])
        damaged = {name: (entry.dtype, entry.shape) for name, entry in Checkpoint(folder).entries.items()}
        assert damaged == shapes
    except SoliError:
        pass
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere", "no such folder"),
        ("/tmp/not/there", "no such folder"),
        ("deepseek-ai/DeepSeek-V3", "soli pull deepseek-ai/DeepSeek-V3"),
        ("deepseek-v3", "preset"),
    ],
)
def test_names_without_a_folder(name: str, says: str) -> None:
    with pytest.raises(SoliError, match=says):
        open_checkpoint(name)


def test_an_unreadable_shard_is_a_sentence(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    os.remove(folder / "model.safetensors")
    (folder / "model.safetensors").mkdir()
    with pytest.raises(SoliError, match=r"model\.safetensors: cannot be read"):
        open_checkpoint(folder)
