"""`soli convert`: every format to every other, tensor by tensor, with side files; FP8 stays bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soli.checkpoint import load_model, save_model
from soli.cli import main
from soli.formats.fp8 import BLOCK, is_ue8m0
from soli.formats.quantized import FP8, QuantizedWeight
from tests.checkpoint.folders import all_tensors, edit_tensors, full_model, saved


def same_files(a: Path, b: Path) -> bool:
    ours, theirs = all_tensors(a), all_tensors(b)

    def same(x: torch.Tensor, y: torch.Tensor) -> bool:
        return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))

    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("to", ["bf16", "fp8", "fp32"])
def test_converting_fp32_is_saving_in_that_format(to: str, tmp_path: Path, capsys) -> None:
    saved(tmp_path / "a", format="fp32", shard_bytes=60_000)
    saved(tmp_path / "b", format=to)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", to]) == 0
    assert same_files(tmp_path / "b", tmp_path / "c")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    output = capsys.readouterr()
    assert f"as {to}" in output.out and output.err == ""


def test_fp8_to_bf16_has_the_dequantized_values(tmp_path: Path) -> None:
    saved(tmp_path / "a", format="fp8")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "bf16"]) == 0
    ours, theirs = load_model(tmp_path / "a").state_dict(), load_model(tmp_path / "b").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_fp8_to_fp8_changes_no_bit(tmp_path: Path) -> None:
    saved(tmp_path / "a", format="fp8")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp8", "--shard-gb", "0.00006"]) == 0
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert same_files(tmp_path / "a", tmp_path / "b")


def test_fp8_to_ue8m0_quantizes_the_exact_values_again(tmp_path: Path) -> None:
    saved(tmp_path / "a", format="fp8")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp8", "--ue8m0"]) == 0
    before, after = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    original = QuantizedWeight("fp8", before[name], before[name + "_scale_inv"], tuple(before[name].shape), BLOCK)
    expected = replace(FP8, ue8m0=True).quantize(original.dequantize(torch.float32))
    assert torch.equal(after[name].float(), expected.values.float())
    assert torch.equal(after[name + "_scale_inv"], expected.scale) and is_ue8m0(expected.scale)


def test_mtp_copies_are_converted_even_where_they_differ(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", format="fp32")
    name = "model.layers.2.embed_tokens.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[name].add_(1))
    assert main(["convert", str(folder), str(tmp_path / "b"), "--to", "bf16"]) == 0
    assert torch.equal(all_tensors(tmp_path / "b")[name], all_tensors(folder)[name].bfloat16())


def test_side_files_are_copied_and_other_weight_files_are_not(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", shard_bytes=60_000)
    copied = {"tokenizer.json", "generation_config.json", "README.md", "LICENSE", "modeling_x.py", "vocab.txt"}
    for name in copied | {"pytorch_model.bin", "notes.pdf"}:
        (folder / name).write_text("{}")
    assert main(["convert", str(folder), str(tmp_path / "b"), "--to", "fp8"]) == 0
    assert {file.name for file in (tmp_path / "b").iterdir()} == copied | {"config.json", "model.safetensors"}


def test_json_for_programs(tmp_path: Path, capsys) -> None:
    saved(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp8", "--ue8m0", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tensors = all_tensors(tmp_path / "b")
    assert facts["bytes_written"] == sum(tensor.nbytes for tensor in tensors.values())
    assert facts["bytes_read"] == sum(tensor.nbytes for tensor in all_tensors(tmp_path / "a").values())
    assert facts["tensors"] == sum(not name.endswith("_scale_inv") for name in tensors)
    assert (facts["format"], facts["ue8m0"]) == ("fp8", True)


def test_a_note_about_dropped_mtp_goes_to_stderr(tmp_path: Path, capsys) -> None:
    folder = saved(tmp_path / "a")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    edit_tensors(folder / "model.safetensors", drop)
    assert main(["convert", str(folder), str(tmp_path / "b"), "--to", "fp8"]) == 0
    assert "no MTP module" in capsys.readouterr().err
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    load_model(tmp_path / "b")


def test_progress_leaves_standard_output_to_the_result(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("soli.cli._shared.progress.DELAY_SECONDS", -1.0)
    saved(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp8", "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("arguments, status", [(["--to", "int3"], 1), ([], 2), (["--to", "bf16", "--ue8m0"], 1)])
def test_wrong_usage(arguments: list[str], status: int, tmp_path: Path, capsys) -> None:
    saved(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *arguments]) == status
    assert capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_missing_source_or_an_existing_destination(tmp_path: Path, capsys) -> None:
    assert main(["convert", str(tmp_path / "no"), str(tmp_path / "b"), "--to", "bf16"]) == 1
    saved(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a"), "--to", "bf16"]) == 1
    assert "no such folder" in (message := capsys.readouterr().err) and "not empty" in message


def test_fp16_files_are_read(tmp_path: Path) -> None:
    save_model(full_model(), tmp_path / "a", "fp32")

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.half() for name, tensor in tensors.items() if tensor.dim() == 2})

    edit_tensors(tmp_path / "a" / "model.safetensors", halve)
    assert load_model(tmp_path / "a").embed_tokens.weight.dtype == torch.float16
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "bf16"]) == 0


def test_ctrl_c_leaves_no_destination(tmp_path: Path, capsys, monkeypatch) -> None:
    def encode(*_: object) -> None:
        raise KeyboardInterrupt

    saved(tmp_path / "a")
    monkeypatch.setattr("soli.checkpoint.writer.Target.encode", encode)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp8"]) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
