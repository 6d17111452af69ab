"""`soli count`: its numbers, what-ifs, JSON, errors, and its start time."""

import json
import subprocess
import sys
import time

import pytest

from soli.cli import VERBS, main
from soli.config import PRESETS, preset
from soli.quantities import scaled


def run_json(capsys, *arguments: str) -> dict:
    assert main(["count", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_of_deepseek_v3(capsys):
    assert main(["count", "deepseek-v3"]) == 0
    out = capsys.readouterr().out
    assert "671.0 B parameters, 37.6 B activated for each token: 5.6 %" in out
    for number in ("671,026,419,200", "37,552,282,624", "653,908,770,816", "70,272 bytes", "13.5 B more", "1,342.1 GB"):
        assert number in out
    assert max(map(len, out.splitlines())) < 120


def test_json_of_deepseek_v3(capsys):
    report = run_json(capsys, "deepseek-v3")
    assert (report["total"], report["activated"]) == (671_026_419_200, 37_552_282_624)
    assert report["mtp"] == report["mtp_own"] + 2 * 129280 * 7168
    assert sum(c["total"] for c in report["components"]) == report["total"]
    assert sum(c["activated"] for c in report["components"]) == report["activated"]
    with_mtp = run_json(capsys, "deepseek-v3", "--mtp")
    assert with_mtp["total"] == report["total"] + report["mtp_own"]
    assert with_mtp["components"][-1]["name"] == "MTP modules"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_prints(capsys, name):
    assert main(["count", name]) == 0
    assert "activated for each token" in capsys.readouterr().out


def test_ten_experts_of_which_two_are_selected(capsys):
    report = run_json(capsys, "deepseek-v3", "--set", "n_routed_experts=10", "--set", "num_experts_per_tok=2")
    routed = next(c for c in report["components"] if c["name"] == "routed experts")
    assert (routed["total"], routed["activated"]) == (58 * 10 * 44_040_192, 58 * 2 * 44_040_192)
    assert "without groups" in report["note"]


def test_a_folder_counts_as_its_config_says(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("nano").to_dict()))
    from_folder, from_name = run_json(capsys, str(tmp_path)), run_json(capsys, "nano")
    assert from_folder | {"model": "nano"} == from_name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deepseek-v4"], ["deepseek-v4", "did you mean deepseek-v3"]),
        (["no/such/folder"], ["no/such/folder", "deepseek-v3"]),
        (["nano", "--set", "n_group=5"], ["n_group is 5", "divide"]),
        (["nano", "--set", "num_experts_per_tok=33"], ["num_experts_per_tok is 33", "32"]),
        (["nano", "--set", "hidden=5"], ["hidden", "no field"]),
        (["nano", "--set", "hidden_size"], ["--set", "FIELD=VALUE"]),
        (["nano", "--set", "hidden_size=big"], ["hidden_size", "'big'", "whole number"]),
        (["nano", "--set", "hidden_size=1", "--set", "hidden_size=2"], ["hidden_size twice"]),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, words):
    assert main(["count", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("soli: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_a_very_long_argument_is_not_echoed_whole(capsys):
    assert main(["count", "x" * 100_000]) == 1
    assert len(capsys.readouterr().err) < 1100


def test_broken_files_are_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["count", str(tmp_path)]) == 1
    assert str(tmp_path / "config.json") in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys):
    assert main(["count"]) == 2
    assert main(["conut", "nano"]) == 2
    assert "count" in capsys.readouterr().err
    assert main(["count", "nano", "--context", "0"]) == 2


def test_help_lists_every_verb_and_version_is_printed(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main([]) == 0 and "Commands:" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("soli ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_without_torch(verb):
    script = (
        "import sys; from soli.cli import main; status = main([sys.argv[1], '--help']);"
        "print('torch' in sys.modules, status)"
    )
    result = subprocess.run([sys.executable, "-c", script, verb], capture_output=True, text=True, check=True)
    assert "Usage: soli " + verb in result.stdout
    assert result.stdout.split()[-2:] == ["False", "0"]


def test_starts_in_well_under_a_second_without_torch():
    script = "import sys; from soli.cli import main; main(['count', 'deepseek-v3']); print('torch' in sys.modules)"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 2.0  # a fifth of this alone on a core; room for a busy machine
    assert result.stdout.split()[-1] == "False"


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m soli count deepseek-v3 --json | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("{\n", "")


def test_an_interrupt_is_a_short_line(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("soli.analysis.parameters.count", interrupted)
    assert main(["count", "nano"]) == 130
    assert capsys.readouterr().err == "soli: interrupted\n"


def test_an_unexpected_error_is_a_sentence_unless_debugging(capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("soli.analysis.parameters.count", broken)
    assert main(["count", "nano"]) == 1
    assert capsys.readouterr().err == "soli: unexpected RuntimeError: two lines (SOLI_DEBUG=1 shows where)\n"
    monkeypatch.setenv("SOLI_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["count", "nano"])


def test_a_missing_package_says_what_to_install(capsys, monkeypatch):
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'prometheus_client.core'", name="prometheus_client.core")

    monkeypatch.setattr("soli.analysis.parameters.count", missing)
    assert main(["count", "nano"]) == 1
    assert capsys.readouterr().err.endswith("pip install prometheus-client\n")


def test_scaled():
    assert [scaled(n) for n in (0, 999, 1000, 671_026_419_200, 1.03e12)] == [
        "0",
        "999",
        "1.0 K",
        "671.0 B",
        "1,030.0 B",
    ]
    assert [scaled(n, "B") for n in (12, 70_272, 1.342e12)] == ["12 B", "70.3 kB", "1,342.0 GB"]
