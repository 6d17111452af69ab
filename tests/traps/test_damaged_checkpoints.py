"""Trap 16: FP8 weights without their scale, a short shard, an unknown or a missing tensor, and similar damage.

Each damage must be an error that names file and tensor, before any weight is used, and a failing exit of the command.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soli.checkpoint import load_model, open_checkpoint
from soli.checkpoint.shard import Shard
from soli.cli import main
from soli.errors import SoliError
from tests.checkpoint.folders import INDEX, edit_json, edit_tensors, saved, weight_map

WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
SCALE = WEIGHT + "_scale_inv"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Damage:
    """What is done to a folder, and what the message must say."""

    do: Callable[[Path], None]
    says: tuple[str, ...]
    format: str = "fp8"
    sharded: bool = False


def shard_of(folder: Path, name: str) -> Path:
    return folder / (weight_map(folder)[name] if (folder / INDEX).exists() else SINGLE)


def tensors(edit: Callable[[dict[str, Tensor]], object], where: str = WEIGHT) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(shard_of(folder, where), edit)


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda held: held.update({name: make(held[name])}), name)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda fields: fields.update(changes))


def index(edit: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, lambda value: edit(value["weight_map"]))


def header(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Rewrite a file's header and leave its data alone."""

    def damage(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        fields = json.loads(data[8 : 8 + length])
        edit(fields)
        text = json.dumps(fields).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def cut(folder: Path) -> None:
    os.truncate(shard_of(folder, WEIGHT), shard_of(folder, WEIGHT).stat().st_size - 3)


def other_shard(weights: dict[str, str]) -> str:
    return next(file for file in weights.values() if file != weights[WEIGHT])


def also_elsewhere(folder: Path) -> None:
    edit_tensors(folder / other_shard(weight_map(folder)), lambda held: held.update({WEIGHT: torch.ones(1)}))


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def drop_half_the_mtp(held: dict[str, Tensor]) -> None:
    for name in [name for name in held if name.startswith("model.layers.2.self_attn.")]:
        del held[name]


DAMAGES = {
    "missing scale": Damage(tensors(lambda held: held.pop(SCALE)), (SINGLE, WEIGHT, SCALE, "missing")),
    "scale without an FP8 weight": Damage(replaced(WEIGHT, Tensor.bfloat16), (SINGLE, SCALE, "BF16")),
    "scale of a wrong shape": Damage(replaced(SCALE, lambda t: torch.ones(9, 9)), (SINGLE, SCALE, "(9, 9)", "(1, 2)")),
    "scale of a wrong dtype": Damage(replaced(SCALE, Tensor.double), (SINGLE, SCALE, "F64")),
    "scale not a number": Damage(replaced(SCALE, lambda t: t * float("nan")), (SINGLE, SCALE, "finite")),
    "scale of zero": Damage(replaced(SCALE, lambda t: t * 0), (SINGLE, SCALE, "positive")),
    "FP8 that the config hides": Damage(config(quantization_config=None), (SINGLE, "quantization_config")),
    "FP8 router": Damage(
        replaced("model.layers.1.mlp.gate.weight", lambda t: t.to(torch.float8_e4m3fn)),
        (SINGLE, "model.layers.1.mlp.gate.weight", "F8_E4M3"),
    ),
    "another quantisation": Damage(config(quantization_config={"quant_method": "gptq"}), ("config.json", "gptq")),
    "other block sizes": Damage(
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), ("config.json", "[64, 64]")
    ),
    "missing tensor": Damage(tensors(lambda held: held.pop(NORM), NORM), (SINGLE, NORM, "missing")),
    "missing router bias": Damage(tensors(lambda held: held.pop(BIAS), BIAS), (SINGLE, BIAS, "missing")),
    "unknown tensor": Damage(tensors(lambda held: held.update(extra=torch.ones(2))), (SINGLE, "extra")),
    "a layer more than the config says": Damage(
        config(num_hidden_layers=1, num_nextn_predict_layers=0), (SINGLE, "tensor model.layers.")
    ),
    "half an MTP module": Damage(tensors(drop_half_the_mtp), (SINGLE, "model.layers.2.self_attn.", "missing")),
    "wrong shape": Damage(replaced(NORM, lambda t: t[:-1].clone()), (SINGLE, NORM, "(135,)", "(136,)")),
    "wrong dtype": Damage(replaced(NORM, Tensor.int), (SINGLE, NORM, "I32")),
    "float64": Damage(replaced(HEAD, Tensor.double), (SINGLE, HEAD, "F64"), format="fp32"),
    "file cut short": Damage(cut, (SINGLE, "tensor", "cut short")),
    "shard cut short": Damage(cut, (".safetensors", "tensor", "cut short"), sharded=True),
    "empty file": Damage(lambda folder: (folder / SINGLE).write_bytes(b""), (SINGLE, "header")),
    "no safetensors file": Damage(lambda folder: (folder / SINGLE).write_bytes(b"PK\3\4" + b"x" * 99), (SINGLE,)),
    "header of no JSON": Damage(
        lambda folder: (folder / SINGLE).write_bytes((4).to_bytes(8, "little") + b"}}}}"), (SINGLE, "header")
    ),
    "header of a list": Damage(
        lambda folder: (folder / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]"), (SINGLE, "header")
    ),
    "header entry without dtype": Damage(header(lambda fields: fields[NORM].pop("dtype")), (SINGLE, NORM)),
    "header entry of negative size": Damage(header(lambda fields: fields[NORM].update(shape=[-136])), (SINGLE, NORM)),
    "header entry of unknown dtype": Damage(header(lambda fields: fields[NORM].update(dtype="Q9")), (SINGLE, NORM)),
    "bytes that do not fit the shape": Damage(header(lambda fields: fields[NORM].update(shape=[5])), (SINGLE, NORM)),
    "tensors that overlap": Damage(
        header(lambda fields: fields[NORM].update(data_offsets=[0, 272])), (SINGLE, "begins at byte")
    ),
    "index that names an absent shard": Damage(
        lambda folder: shard_of(folder, WEIGHT).unlink(), (".safetensors", "tensor", "missing"), sharded=True
    ),
    "index that puts a tensor elsewhere": Damage(
        index(lambda weights: weights.update({WEIGHT: other_shard(weights)})),
        (".safetensors", WEIGHT, INDEX),
        sharded=True,
    ),
    "index that forgets a tensor": Damage(
        index(lambda weights: weights.pop(WEIGHT)), (".safetensors", WEIGHT, INDEX), sharded=True
    ),
    "index that invents a tensor": Damage(
        index(lambda weights: weights.update(extra=weights[WEIGHT])), (".safetensors", "extra", INDEX), sharded=True
    ),
    "index that reaches outside": Damage(
        index(lambda weights: weights.update({WEIGHT: "../x.safetensors"})), (INDEX, "plain"), sharded=True
    ),
    "index of no JSON": Damage(lambda folder: (folder / INDEX).write_text("{"), (INDEX, "not valid"), sharded=True),
    "no index": Damage(lambda folder: (folder / INDEX).unlink(), (INDEX,), sharded=True),
    "a tensor in two shards": Damage(also_elsewhere, (".safetensors", WEIGHT, "also in"), sharded=True),
    "both a single file and shards": Damage(
        lambda folder: (folder / SINGLE).write_bytes(b""), (SINGLE, INDEX), sharded=True
    ),
    "pickles alone": Damage(pickled, ("pickle",)),
    "no weights": Damage(lambda folder: (folder / SINGLE).unlink(), (SINGLE,)),
    "no config": Damage(lambda folder: (folder / "config.json").unlink(), ("config.json",)),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("intact")
    return {
        (format, sharded): saved(root / f"{format}-{sharded}", format=format, shard_bytes=60_000 if sharded else 10**9)
        for format in ("fp8", "fp32")
        for sharded in (False, True)
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_that_names_file_and_tensor(name: str, intact, tmp_path: Path, capsys) -> None:
    damage, folder = DAMAGES[name], tmp_path / "m"
    shutil.copytree(intact[damage.format, damage.sharded], folder)
    open_checkpoint(folder)
    damage.do(folder)
    with pytest.raises(SoliError) as raised:
        load_model(folder)
    assert all(part in str(raised.value) for part in damage.says), str(raised.value)
    assert "\n" not in str(raised.value)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "bf16"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("soli: ") and all(part in message.replace("\n", "") for part in damage.says)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", sorted(set(DAMAGES) - {"scale not a number", "scale of zero"}))
def test_damage_is_found_from_headers_alone(name: str, intact, tmp_path: Path, monkeypatch) -> None:
    damage, folder = DAMAGES[name], tmp_path / "m"
    shutil.copytree(intact[damage.format, damage.sharded], folder)
    damage.do(folder)
    monkeypatch.setattr(Shard, "tensor", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(SoliError):
        open_checkpoint(folder)
