"""Packs: experts in one piece on whole pages, read once each, checked; writing continues where it was interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from soli.checkpoint import load_model, open_checkpoint
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.pack import PAGE, SOURCE
from soli.checkpoint.writer import Target
from soli.errors import SoliError
from soli.experts.load import load_paged_model
from soli.experts.sources import sources_of
from tests.experts.folders import FORMATS, SOLIS_FORMATS, E, K, answers, mixture_folder, requests, resident_model
from tests.kernels.weights import needs_kernels


def packed(format: str, folder: Path, target: Target | None = None) -> Path:
    convert_checkpoint(mixture_folder(format), folder, target, pack=True)
    return folder


@needs_kernels
@pytest.mark.parametrize("format", FORMATS)
def test_a_pack_has_every_tensor_bit_for_bit_and_computes_the_same(tmp_path, format) -> None:
    folder = packed(format, tmp_path / "pack")
    source, pack = open_checkpoint(mixture_folder(format)), open_checkpoint(folder)
    if format in SOLIS_FORMATS:
        for name in source.entries:
            assert torch.equal(source.stored(name).view(torch.uint8), pack.stored(name).view(torch.uint8)), name
    for one, other in zip(source.slots, pack.slots, strict=True):
        assert torch.equal(source.values(one, torch.float32), pack.values(other, torch.float32)), one.name
    for layer in sources_of(pack).layers:
        for expert in layer.experts:
            [read] = expert.reads
            assert read.start % PAGE == 0 and read.length - read.needed < PAGE
            assert expert.checksum is not None
    prompts = requests((20,), 4)
    model, store = load_paged_model(folder, K, prefetch="off", poison=True)
    assert answers(model, prompts) == answers(resident_model(format), prompts)
    assert store.reader.stats.reads == store.stats.misses
    store.close()


def test_any_format_becomes_any_other_as_convert_writes_it(tmp_path) -> None:
    packed("bf16", tmp_path / "pack", Target("int4"))
    convert_checkpoint(mixture_folder("bf16"), tmp_path / "plain", Target("int4"))
    one, other = (load_model(tmp_path / name, dtype=torch.float32, quantized=False) for name in ("pack", "plain"))
    for (name, tensor), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_integers_keep_their_own_format_and_are_not_quantized_twice(tmp_path) -> None:
    packed("int8", tmp_path / "pack", Target("int8"))
    with pytest.raises(SoliError, match="lose precision again"):
        packed("int8", tmp_path / "other", Target("int4"))
    assert not (tmp_path / "other").exists()


def test_writing_continues_after_an_interruption(tmp_path, monkeypatch) -> None:
    expected = packed("fp8", tmp_path / "expected")
    calls = iter(range(10**6))
    stored = type(open_checkpoint(expected)).stored

    def interrupted(self, name):
        if next(calls) == 160:
            raise KeyboardInterrupt
        return stored(self, name)

    monkeypatch.setattr("soli.checkpoint.reader.Checkpoint.stored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed("fp8", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    partial = tmp_path / ".pack.pack"
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert finished
    packed("fp8", tmp_path / "pack")
    assert not partial.exists()
    for file in expected.iterdir():
        assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes()
    assert {name: (tmp_path / "pack" / name).stat().st_mtime_ns for name in finished} == finished
    assert not (tmp_path / "pack" / SOURCE).exists()


def test_what_was_written_from_another_source_is_not_kept(tmp_path) -> None:
    partial = tmp_path / ".pack.pack"
    partial.mkdir()
    (partial / SOURCE).write_text(json.dumps({"signature": "another"}))
    (partial / "model-00001-of-00006.safetensors").write_bytes(b"of another model")
    packed("fp8", tmp_path / "pack")
    load_model(tmp_path / "pack", quantized=True)


@needs_kernels
def test_a_damaged_expert_is_not_computed_with(tmp_path) -> None:
    folder = packed("int8", tmp_path / "pack")
    sources = sources_of(open_checkpoint(folder))
    for source in sources.layers:
        for expert in source.experts:
            [read] = expert.reads
            with sources.files[read.file].open("r+b") as stream:
                stream.seek(read.start + read.needed // 2)
                byte = stream.read(1)
                stream.seek(-1, 1)
                stream.write(bytes([byte[0] ^ 1]))
    model, store = load_paged_model(folder, E)
    with pytest.raises(SoliError, match=r"model-0000\d-of-0000\d.safetensors: tensor model.layers.\d.mlp.*checksum"):
        answers(model, requests((9,), 2))
    store.close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("soli_pack", "2", "pack of version 2"), ("soli_checksums", "zz", "damaged"), ("soli_checksums", "", "experts")],
)
def test_another_version_or_a_damaged_header_is_rejected(tmp_path, key, value, message) -> None:
    folder = packed("bf16", tmp_path / "pack")
    file = sorted(folder.glob("model-*.safetensors"))[3]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"][key] = value
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(len(text.ljust(length)).to_bytes(8, "little") + text.ljust(length) + content[8 + length :])
    with pytest.raises(SoliError, match=f"{file.name}: .*{message}"):
        sources_of(open_checkpoint(folder))


def test_a_full_disk_or_a_folder_that_is_there_is_rejected(tmp_path, monkeypatch) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "file").touch()
    with pytest.raises(SoliError, match="not empty"):
        packed("bf16", tmp_path / "pack")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SoliError, match=r"needs [0-9,]+ bytes more, but 1,000"):
        packed("bf16", tmp_path / "other")
    assert not (tmp_path / "other").exists()
