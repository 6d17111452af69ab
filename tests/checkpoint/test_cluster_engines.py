"""Folders that `soli convert` writes are what vLLM and SGLang read: names, fields, command lines of docs/deploying.md.

Names are compared with lists that do not come from the name map: those of published folders, and of transformers' own
DeepseekV3 on the meta device. vLLM and SGLang pin their own torch, so they usually have an environment of their own:
VLLM_PYTHON and SGLANG_PYTHON name its interpreter. Without it those tests are skipped.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import soli
from soli.checkpoint.name_map import slots
from soli.checkpoint.writer import Target
from soli.cli import main
from soli.config import ModelConfig, preset
from tests.checkpoint.folders import full_config, saved
from tests.checkpoint.published_families import published_tensors
from tests.model.oracle import YARN, make_model

ROOT = Path(__file__).parents[2]
FORMATS = [["bf16"], ["fp32"], ["fp8"], ["fp8", "--ue8m0"]]  # that other engines read
HIGH = re.compile(r"embed_tokens|lm_head|shared_head|norm\.|mlp\.gate\.|eh_proj|bias$")  # stays bf16 in FP8 folders
FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip


def expected_names(config: ModelConfig, fp8: bool) -> set[str]:
    """What a folder of this configuration holds, by the names of published folders."""
    names = set(published_tensors(config.to_dict()))
    return names | {f"{name}_scale_inv" for name in names if fp8 and not HIGH.search(name)}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def exported(tmp_path: Path, arguments: list[str], source: str | Path = "nano") -> Path:
    folder = tmp_path / "-".join(arguments).replace("--", "")
    assert main(["convert", str(source), str(folder), "--to", *arguments]) == 0
    return folder


def yarn_folder(tmp_path: Path) -> Path:
    """A small folder with everything that V3 has and nano has not: YaRN, attention without biases, several shards."""
    from soli.checkpoint import save_model

    save_model(make_model(full_config(rope_scaling=YARN)), tmp_path / "yarn", shard_bytes=60_000)
    return tmp_path / "yarn"


@pytest.mark.parametrize("arguments", FORMATS, ids=" ".join)
def test_the_bundled_models_names_are_those_of_published_folders(arguments: list[str], tmp_path: Path) -> None:
    folder = exported(tmp_path, arguments)
    assert set(stored_shapes(folder)) == expected_names(preset("nano"), arguments[0] == "fp8")


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2", "moonlight-16b-a3b"])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_names_of_big_models_are_those_of_published_folders(name: str, format: str) -> None:
    config, target = preset(name), Target(format)
    names = {spec[0] for slot in slots(config) for spec in target.specs(slot)}
    assert names == expected_names(config, format == "fp8")


def unstacked(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """transformers' parameters in memory as the files have them: its experts are stacked, gate above up."""
    files: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        stack, tail = name.rsplit(".", 1)
        if tail not in ("gate_up_proj", "down_proj"):
            files[name] = shape
            continue
        experts, rows, columns = shape
        parts = [("gate_proj", rows // 2), ("up_proj", rows // 2)] if tail == "gate_up_proj" else [("down_proj", rows)]
        files |= {f"{stack}.{e}.{part}.weight": (size, columns) for e in range(experts) for part, size in parts}
    return files


@pytest.mark.parametrize("name", ["deepseek-v3", "nano"])
def test_names_and_shapes_are_those_of_transformers_model_on_the_meta_device(name: str, tmp_path: Path) -> None:
    config = preset(name)
    (tmp_path / "config.json").write_text(json.dumps(Target("bf16").config(config)))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = unstacked({name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()})
    main_layers = {slot.name: slot.shape for slot in slots(config) if (slot.layer or 0) < config.num_hidden_layers}
    assert main_layers == expected


def check_fields(config: dict[str, Any], folder: Path) -> None:
    """What a config reader returned, against config.json."""
    written = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in FIELDS} == {name: written[name] for name in FIELDS}
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    rope = config.get("rope_parameters") or config["rope_scaling"]
    scaling = written["rope_scaling"] or {"type": "default"}
    assert (rope.get("rope_type") or rope["type"]).removeprefix("deepseek_") == scaling["type"]
    assert all(rope[name] == value for name, value in scaling.items() if name != "type")
    assert config.get("quantization_config") == written.get("quantization_config")


@pytest.mark.parametrize("arguments", FORMATS, ids=" ".join)
def test_transformers_reads_the_configuration(arguments: list[str], tmp_path: Path) -> None:
    for folder in (exported(tmp_path, arguments), exported(tmp_path / "yarn", arguments, yarn_folder(tmp_path))):
        check_fields(AutoConfig.from_pretrained(folder).to_dict(), folder)


def documented_commands(start: str) -> list[str]:
    """Command lines of docs/deploying.md that begin with `start`, continued lines joined, environment left out."""
    text = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ").split(" #")[0] for line in text.splitlines()]
    commands = [line[line.index(start) :] for line in lines if re.match(rf"(\w+=\S+ )*{re.escape(start)}", line)]
    assert len(commands) >= 3
    return commands


def run_reader(engine: str, arguments: list[str | Path], text: str) -> Any:
    """What the engine's interpreter printed, the last line as JSON; the test is skipped where there is no engine."""
    variable = "SGLANG_PYTHON" if engine == "sglang" else "VLLM_PYTHON"
    command = [os.environ.get(variable, sys.executable), Path(__file__).with_name("engine_readers.py"), engine]
    run = subprocess.run([*command, *arguments], input=text, capture_output=True, text=True, timeout=900)
    if run.returncode == 3:
        pytest.skip(f"{engine} does not run here; {variable} may name an interpreter that has it")
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "start"), [("vllm", "vllm serve "), ("sglang", "python -m sglang.launch_server ")])
def test_config_readers_of_engines_read_exported_folders(engine: str, start: str, tmp_path: Path) -> None:
    folders = [exported(tmp_path, arguments) for arguments in FORMATS]
    folders += [exported(tmp_path / "yarn", ["fp8"], yarn_folder(tmp_path)), saved(tmp_path / "bf16 again")]
    results = run_reader(engine, folders, "\n".join(documented_commands(start)))
    for folder, (config, quantization) in zip(folders, results, strict=True):
        check_fields(config, folder)
        is_fp8 = "quantization_config" in json.loads((folder / "config.json").read_text())
        assert quantization == ([True, "dynamic", [128, 128]] if is_fp8 else None)


@pytest.mark.slow
def test_vllm_computes_what_soli_computes(tmp_path: Path) -> None:
    """Where vLLM is built for CPUs: the bundled model's log-probabilities and greedy tokens."""
    folder = exported(tmp_path, ["bf16"])
    llm = soli.LLM(folder, dtype="float32")
    [answer] = llm.generate("We went to the river and", max_tokens=12, temperature=0)
    ids = [*answer.prompt_ids, *answer.ids[:4]]
    theirs = run_reader("generate", [folder], json.dumps(ids))
    with torch.no_grad():
        logprobs_TV = soli.load_model(folder, dtype=torch.float32)(torch.tensor([ids]))[0].log_softmax(-1)
    ours = [float(logprobs_TV[place, token]) for place, token in enumerate(ids[1:])]
    assert theirs["logprobs"] == pytest.approx(ours, abs=1e-3)
    end = preset("nano").eos_token_id
    assert [token for token in theirs["ids"] if token != end] == list(answer.ids[4:])
