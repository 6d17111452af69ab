"""benchmarks/cpu.py and what it stands on: one run of it with few tokens and no peers, and each part by itself."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import cpu  # noqa: E402
import cpu_plot  # noqa: E402
import models  # noqa: E402
import quiet  # noqa: E402
import record  # noqa: E402
from contenders import QUICK, Absent, Lab  # noqa: E402

import soli  # noqa: E402
from soli.analysis.parameters import weights  # noqa: E402
from soli.checkpoint.writer import Target  # noqa: E402
from soli.data.tokenizer import Tokenizer  # noqa: E402

SMALLER = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 64, "q_lora_rank": 64}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab whose tiny model is smaller still, in bf16 alone."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SHAPES, "tiny", models.SHAPES["tiny"] | SMALLER)
        models.make(folder, "tiny", "bf16")
    return folder


@pytest.mark.slow
def test_a_run_measures_what_is_there_and_says_what_is_not(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu.main(["--lab", str(lab), "--rows", "tiny-decode,tiny-prefill", "--quick", "--rounds", "2", "--others", "1"])
    output = capsys.readouterr()
    assert "decode, tiny (12 M), bf16: Soli " in output.out and "prefill, tiny (12 M), bf16: Soli " in output.out
    assert "int8" not in output.out
    assert "tiny: without llama.cpp bf16: no path was given" in output.err
    assert f"tiny: without soli int8: {lab / 'models' / 'tiny-int8'} is not there" in output.err


def test_a_row_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cpu.main(["--rows", "small-decode,nonsense"])
    assert "there is no row nonsense" in capsys.readouterr().err


def test_streamed_random_models_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SHAPES, "tiny", models.SHAPES["tiny"] | SMALLER)
    models.write_random(tmp_path / "m", models.config("tiny"), Target("int4"))
    model = soli.load_model(tmp_path / "m")
    codes = model.layers[1].mlp.experts.quantized.downs[0]
    assert codes.format == "int4" and codes.dequantize(torch.float32).std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]]))).all()
    tokenizer = Tokenizer.from_folder(tmp_path / "m")
    assert tokenizer.vocab_size == 512 and tokenizer.decode(tokenizer.encode("你好, world")) == "你好, world"


def test_bytes_per_token_are_those_of_the_activated_weights(lab: Path) -> None:
    folder = models.model_path(lab, "tiny", "bf16")
    config = soli.config.load_config(folder)
    activated = sum(group.activated for group in weights(config)) - config.vocab_size * config.hidden_size
    biases = config.num_moe_layers * config.n_routed_experts
    assert cpu.bytes_per_token(folder) == 2 * activated + 4 * biases


def test_aims_are_judged_against_the_peer_they_name() -> None:
    line = cpu.Line("small", "decode", "int8", ("a", "b"), {"a": 1.25, cpu.BEST: 0.5, "memory": 0.85})
    recorded = {"soli int8": (12.0, 0.01), "a": (10.0, 0.02), "b": (20.0, 0.07)}
    measurements = {name: [quiet.Measurement(*pair)] for name, pair in recorded.items()}
    row = cpu.judge("x", "tokens/s", [12.0], {"a": [10.0], "b": [20.0]}, line, measurements)
    assert [(aim["against"], aim["reached"], aim["met"]) for aim in row["aims"]] == [
        ("a", 1.2, False),
        (cpu.BEST, 0.6, True),
    ]
    text = cpu.describe(row)
    assert row["others"] == 0.07 and "disturbed" in text and "missed: 1.20 of 1.25 against a" in text


def process(folder: Path, pid: int, parent: int, ticks: tuple[int, int, int, int]) -> None:
    (folder / str(pid)).mkdir()
    fields = ["S", str(parent), *["0"] * 9, *map(str, ticks), "0"]
    (folder / str(pid) / "stat").write_text(f"{pid} (a name) with ) {' '.join(fields)}")


def test_time_of_children_is_ours_and_of_strangers_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "PROC", tmp_path)
    monkeypatch.setattr(quiet, "TICKS", 1)
    (tmp_path / "stat").write_text("cpu  10 20 30 1000 1000 1 2 3 0 0\ncpu0 5 5 5\n")
    process(tmp_path, os.getpid(), 1, (1, 2, 4, 8))  # user, system, and those of children that ended
    process(tmp_path, 999_001, os.getpid(), (16, 0, 0, 0))
    process(tmp_path, 999_002, 999_001, (32, 0, 0, 0))
    process(tmp_path, 999_003, 1, (64, 0, 0, 0))
    assert quiet.own_seconds() == 63
    assert quiet.busy_seconds() == 66


def test_a_disturbed_measurement_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(*shares: float) -> quiet.Measurement:
        measurements = iter(quiet.Measurement(float(number), share) for number, share in enumerate(shares))
        monkeypatch.setattr(quiet, "measure", lambda run: next(measurements))
        return quiet.measure_quietly(lambda: 0.0)

    monkeypatch.setattr(quiet, "wait_for_quiet", lambda limit: None)
    assert after(0.04).value == 0
    assert after(0.3, 0.01).value == 1
    assert after(0.3, 0.1, 0.2).value == 1  # never quiet: the least disturbed


def script(file: Path, text: str) -> Path:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_llama_cpp_is_measured_through_its_tools(tmp_path: Path) -> None:
    script(tmp_path / "llama-bench", f'echo "$@" >> {tmp_path}/asked; echo noise; echo \'{{"avg_ts": 7.5}}\'')
    script(tmp_path / "llama-batched-bench", 'echo "{\\"t\\": 4.0}"')
    here = Lab(tmp_path, tmp_path, None, "", 2)
    with pytest.raises(Absent, match="is not there"), contenders.llama_cpp(here, tmp_path / "none.gguf", QUICK):
        pass
    with contenders.llama_cpp(here, tmp_path / "llama-bench", QUICK) as ask:
        assert ask("decode", False) == 7.5 and ask("prefill", False) == 7.5
        assert ask("batch", False) == QUICK.batch * QUICK.new / 4
        assert ask("resident", False) > 0
        script(tmp_path / "llama-bench", "exit 3")
        with pytest.raises(Absent, match="ended with 3"):
            ask("decode", False)
    decode, prefill = (tmp_path / "asked").read_text().splitlines()
    assert "-n 8 -d 16" in decode and "-p 32 -n 0" in prefill and "-t 2" in decode


def test_vllm_answers_among_its_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    answer = 'echo "ANSWER {\\"value\\": 3}"'
    reply = f'echo INFO; echo "ANSWER {{}}"; while read line; do echo log; {answer}; done'
    here = Lab(tmp_path, None, script(tmp_path / "python", reply), "", 2)
    with contenders.vllm(here, tmp_path, QUICK) as ask:
        assert ask("decode", False) == 3 and ask("batch", True) == 3
    broken = Lab(tmp_path, None, script(tmp_path / "broken", "exit 1"), "", 2)
    with pytest.raises(Absent, match="ended with 1"), contenders.vllm(broken, tmp_path, QUICK):
        pass


def test_rows_of_the_same_commit_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "hardware", lambda threads: {"commit": "a", "dirty": False, "cpu": "x", "threads": 2})
    record.merge("cpu", "", {}, [{"what": "one", "n": 1}, {"what": "two"}], 2)
    rows = record.merge("cpu", "", {}, [{"what": "one", "n": 2}], 2)["rows"]
    assert rows == [{"what": "two"}, {"what": "one", "n": 2}]
    assert json.loads((tmp_path / "cpu.json").read_text())["rows"] == rows
    monkeypatch.setattr(record, "hardware", lambda threads: {"commit": "b", "dirty": False, "cpu": "x", "threads": 2})
    assert record.merge("cpu", "", {}, [{"what": "three"}], 2)["rows"] == [{"what": "three"}]


def test_the_picture_has_a_bar_for_each_contender_once(tmp_path: Path) -> None:
    rows = []
    for kind in ("bf16", "int8"):
        row = record.row(f"decode, small, {kind}", "tokens/s", [2.0, 3.0], {f"llama.cpp {kind}": [1.0, 2.0]})
        limit = record.row(f"decode, small, {kind}, beside memory bandwidth", "tokens/s", [2.0], {"memory": [4.0]})
        rows += [row | {"row": "small-decode"}, limit | {"row": "small-decode"}]
    bars = [label for label, _, _ in cpu_plot._bars(rows)]
    assert bars == ["Soli bf16", "llama.cpp bf16", "memory, bf16", "Soli int8", "llama.cpp int8", "memory, int8"]
    cpu_plot.draw(rows, tmp_path / "images" / "cpu.png")
    assert (tmp_path / "images" / "cpu.png").stat().st_size > 5000
