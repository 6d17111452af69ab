"""`soli plan`: predictions for a stated machine, JSON, bad input, the measured run beside the prediction."""

import gc
import json
import re

import pytest

from soli import measured as records
from soli.cli import main
from soli.config import preset
from soli.experts import disk
from soli.plan import probe

STATED = ("--memory", "128GB", "--disk", "7GB/s", "--memory-speed", "80GB/s")


def run_json(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A machine that needs no measuring."""
    rates = dict.fromkeys(("fp32", "bf16", "fp8", "int8", "int4"), 5e9)
    monkeypatch.setattr(records, "cache_folder", lambda: tmp_path / "cache")  # SOLI_CACHE has the compiled kernels too
    monkeypatch.setattr(probe, "_measure_compute", lambda: probe.Compute(8e9, rates, rates, "2026-01-02"))
    monkeypatch.setattr(disk, "_measure", lambda folder: disk.Disk(1e9, 1e-4, True, "2026-01-02"))


def test_json_of_a_stated_machine(capsys):
    report = run_json(capsys, "deepseek-v3", *STATED)
    assert report["fits"] is True and report["fits_in_memory"] is False
    assert report["memory_bytes"] == 128 * 10**9
    assert 19.0e9 < report["resident_bytes"] < 19.2e9
    assert report["bound"] == "disk"
    assert 0.2 < report["decode_tokens_per_second"] < 0.5
    assert 2 < report["prefill_tokens_per_second"] < 8
    assert report["buy_next"] == "disk"
    assert report["experts_in_memory"] * report["expert_bytes"] < 128e9
    assert {row["format"] for row in report["formats"]} == {"fp8", "bf16", "int8", "int4"}
    assert all(len(row["speeds"]) > 4 for row in report["formats"])
    assert report["parts"][0]["name"] == "routed experts"
    faster = run_json(capsys, "deepseek-v3", *STATED[:2], "--disk", "14GB/s", *STATED[4:])
    assert faster["decode_tokens_per_second"] > 1.5 * report["decode_tokens_per_second"]


def test_a_stated_machine_is_not_measured(capsys, monkeypatch):
    monkeypatch.setattr(probe, "_measure_compute", None)
    monkeypatch.setattr(disk, "_measure", None)
    assert run_json(capsys, "moonlight-16b-a3b", *STATED)["fits_in_memory"] is True


def test_tables(capsys):
    assert main(["plan", "deepseek-v3", *STATED, "--gpu", "24GB"]) == 0
    out = capsys.readouterr().out
    for text in ("673.2 GB in fp8", "routed experts", "bound by disk", "lower bound", "a faster disk", "Soli does not"):
        assert text in out
    assert "predicted" in out


def test_what_does_not_fit_is_told_with_the_bytes_that_would_do(capsys):
    report = run_json(capsys, "deepseek-v3", "--memory", "16GB", *STATED[2:])
    assert report["fits"] is False and report["needed_bytes"] > report["resident_bytes"] > 16e9
    assert report["decode_tokens_per_second"] is None and report["bound"] is None
    assert run_json(capsys, "deepseek-v3", "--memory", str(report["needed_bytes"]), *STATED[2:])["fits"] is True
    assert main(["plan", "deepseek-v3", "--memory", "16GB", *STATED[2:]]) == 0
    assert f"{report['needed_bytes']:,} bytes" in capsys.readouterr().out


def test_rates_of_this_machine_are_measured_once(capsys, measured, monkeypatch):
    first = run_json(capsys, "moonlight-16b-a3b", "--memory", "16GB")
    assert first["machine"]["disk_rate"] == 1e9
    assert first["machine"]["sources"]["disk_rate"] == "measured 2026-01-02"
    slower = disk.Disk(5e8, 1e-4, True, "2026-01-03")
    monkeypatch.setattr(disk, "_measure", lambda folder: slower)
    assert run_json(capsys, "moonlight-16b-a3b", "--memory", "16GB") == first
    renewed = run_json(capsys, "moonlight-16b-a3b", "--memory", "16GB", "--probe")
    assert renewed["machine"]["disk_rate"] == 5e8
    assert renewed["decode_tokens_per_second"] < first["decode_tokens_per_second"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"compute": 3}', '{"compute": {"x": 1}, "disks": {}}'])
def test_a_damaged_cache_is_measured_again(capsys, measured, content):
    file = records.cache_folder() / records.FILE
    file.parent.mkdir()
    file.write_text(content)
    assert run_json(capsys, "moonlight-16b-a3b", "--memory", "16GB")["fits"] is True
    assert json.loads(file.read_text())["disks"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nosuch", "no preset and no folder 'nosuch'"),
        ("deepseek-ai/DeepSeek-V3", "soli pull deepseek-ai/DeepSeek-V3 --config-only"),
        ("deepseek-v3 --memory 0", "--memory is '0'"),
        ("deepseek-v3 --memory -1GB", "--memory is '-1GB'"),
        ("deepseek-v3 --memory 99999999TB", "--memory is '99999999TB'"),
        ("deepseek-v3 --disk -7GB/s", "--disk is '-7GB/s'"),
        ("deepseek-v3 --disk 7GB/h", "--disk is '7GB/h'"),
        ("deepseek-v3 --memory-speed fast", "--memory-speed is 'fast'"),
        ("deepseek-v3 --flops -1T", "--flops is '-1T'"),
        ("deepseek-v3 --gpu big", "--gpu is 'big'"),
        ("deepseek-v3 --gpu 4090", "--gpu is '4090'"),
        ("deepseek-v3 --gpu 24GB --gpu-speed 0", "--gpu-speed is '0'"),
        ("deepseek-v3 --format q4 --disk 1GB/s --memory-speed 9GB/s", "--format is 'q4'"),
        ("nano --prompt 5000 --disk 1GB/s --memory-speed 9GB/s", "512 positions"),
        ("", "nothing to plan"),
        ("nano --check nosuch", "nosuch"),
        ("deepseek-v3 --check nano", "deepseek-v3 is not the model in nano"),
        ("--check nano --disk 1GB/s", "--disk with --check"),
        ("--train nano-zh-en --memory 3GB", "--memory with --train"),
        ("nano --train nano-zh-en", "nano with --train"),
        ("--train nosuch", "no recipe nosuch"),
    ],
)
def test_bad_input_is_one_sentence(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", *arguments.split()]) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_model_without_experts_is_rejected(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("nano").to_dict() | {"n_routed_experts": 0}))
    assert main(["plan", str(tmp_path), *STATED]) == 1
    assert "no routed experts" in capsys.readouterr().err


def test_a_configuration_of_absurd_size_is_planned_at_once(capsys, tmp_path):
    sizes = {"num_hidden_layers": 10**9, "n_routed_experts": 10**9, "n_group": 1, "topk_group": 1}
    (tmp_path / "config.json").write_text(json.dumps(preset("nano").to_dict() | sizes))
    assert run_json(capsys, str(tmp_path), *STATED)["fits"] is False
    assert main(["plan", str(tmp_path), "--skew", "1", *STATED, "--memory", "1000000TB"]) in (0, 1)


def test_a_folder_with_a_configuration_alone_is_planned(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("moonlight-16b-a3b").to_dict()))
    from_folder, from_name = (run_json(capsys, name, *STATED) for name in (str(tmp_path), "moonlight-16b-a3b"))
    assert from_folder | {"model": "moonlight-16b-a3b"} == from_name


def test_the_format_of_modelopt_beside_a_configuration_is_planned(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("moonlight-16b-a3b").to_dict()))
    quantization = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.*.self_attn*"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    formats = {part["name"]: part["format"] for part in run_json(capsys, str(tmp_path), *STATED)["parts"]}
    assert formats["routed experts"] == "fp4" and formats["attention"] == "bf16"
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W4A8_AWQ"}}')
    assert main(["plan", str(tmp_path), *STATED]) == 1
    assert "quant_algo is 'W4A8_AWQ'" in capsys.readouterr().err


def test_a_downloaded_configuration_and_index_are_enough(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text(json.dumps(preset("moonlight-16b-a3b").to_dict()))
    index = {"metadata": {"total_size": 31_920_000_000}, "weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    report = run_json(capsys, "org/name", *STATED)
    assert report["index_bytes"] == 31_920_000_000
    assert report["total_bytes"] == pytest.approx(report["index_bytes"], rel=0.01)
    assert main(["plan", "org/name", *STATED]) == 0
    assert "31.9 GB in the files" in capsys.readouterr().out


def test_fetching_without_a_network_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", "org/name", "--fetch", *STATED]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "org/name" in error


def test_prediction_and_one_run_side_by_side(capsys, measured):
    report = run_json(capsys, "--check", "nano", "--memory", "14MB")
    check = report["check"]
    assert check["prompt_tokens"] == report["prompt_tokens"] == 256
    assert check["decode_tokens_per_second"] > 0 and check["prefill_tokens_per_second"] > 0
    assert 0 < check["hit_rate"] < 1 and check["disk_bytes_per_token"] > 0
    assert check["decode_error"] == pytest.approx(
        report["decode_tokens_per_second"] / check["decode_tokens_per_second"] - 1
    )
    assert check["decode_error_at_measured_reads"] > -1
    assert main(["plan", "--check", "nano", "--memory", "14MB"]) == 0
    out = capsys.readouterr().out
    assert "measured" in out and "for the bytes that this run read" in out


def test_routing_is_that_of_earlier_runs_where_it_is_known(capsys, measured):
    arguments = ("nano", "--memory", "14MB")
    unknown = run_json(capsys, *arguments, "--skew", "0.8")
    even = run_json(capsys, *arguments, "--skew", "0")
    assert unknown["routing_tokens"] is unknown["typical_decode_tokens_per_second"] is None
    check = run_json(capsys, "--check", *arguments)
    assert check["routing_tokens"] > 0 and check["typical_decode_tokens_per_second"] is None
    assert check["decode"]["hit_rate"] > check["expert_share"] and check["check"]["disk_rate"] > 0
    gc.collect()  # a model that nobody has any more is remembered
    known = run_json(capsys, *arguments)
    assert known["routing_tokens"] > 0 and known["decode"]["hit_rate"] > even["decode"]["hit_rate"]
    assert main(["plan", *arguments]) == 0
    assert "tokens of earlier runs" in capsys.readouterr().out


def test_where_routing_is_not_known_there_is_a_typical_one(capsys):
    report = run_json(capsys, "deepseek-v3", *STATED)
    skewed = run_json(capsys, "deepseek-v3", *STATED, "--skew", "0.8")
    assert report["routing_tokens"] is None and report["skew"] == 0
    assert report["typical_decode_tokens_per_second"] == skewed["decode_tokens_per_second"]
    assert report["typical_decode_tokens_per_second"] > 1.3 * report["decode_tokens_per_second"]


def test_a_check_of_what_does_not_fit_is_rejected(capsys):
    assert main(["plan", "--check", "nano", "--memory", "1kB"]) == 1
    captured = capsys.readouterr()
    assert re.match(r"soli: nano needs 9\.\d MB, but --check may take 1\.0 kB: give more", captured.err)
    assert not captured.out


@pytest.mark.slow
def test_a_training_plan_is_that_of_a_dry_run(capsys):
    def lines(*arguments: str) -> list[str]:
        assert main([*arguments]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("this device")]

    plan = lines("plan", "--train", "671b")
    assert plan == lines("train", "671b", "--dry-run") and any("GPU-hours" in line for line in plan)
