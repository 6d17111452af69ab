"""--memory: what it is divided into, and that no more is allocated."""

import re
import subprocess
import sys

import pytest

from soli.cli import main
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import EngineLimits, Request
from soli.engine.text_model import open_text_model
from soli.errors import SoliError
from soli.experts.budget import BandwidthRates, divide_bytes
from soli.experts.policy import DEFAULT, POLICIES, policy_bytes
from soli.llm import LLM
from soli.quantities import parse_bytes, parse_rate
from soli.serve.metrics import ServerMetrics
from tests.kernels.weights import needs_kernels

MB = 10**6


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("8GiB", 8 * 2**30), ("1.5 MB", 1_500_000), ("500kb", 500_000), ("16", 16), (2**22, 2**22)],
)
def test_sizes_are_decimal_or_binary(text, size) -> None:
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "16G", "0GB", "-1GB", "1e9", "GB", "9" * 30, "16 GB 2", "١GB", "nan", "0.0"])
def test_other_sizes_are_rejected_with_the_units(text) -> None:
    with pytest.raises(SoliError, match=r"--memory is .*16GB.*16GiB"):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize(("text", "rate"), [("7GB/s", 7 * 10**9), ("500 MB / s", 500 * MB), ("1MB", MB)])
def test_rates_are_sizes_per_second(text, rate) -> None:
    assert parse_rate(text, "--disk") == rate


@pytest.mark.parametrize("text", ["7", "7 B/s", "80kB/s", "0GB/s", "7G/s", ""])
def test_rates_that_no_disk_has_are_rejected(text) -> None:
    with pytest.raises(SoliError, match=r"--disk is .*7GB/s"):
        parse_rate(text, "--disk")


@needs_kernels
@pytest.mark.parametrize("size", [10 * MB, 14 * MB, 20 * MB, 100 * MB])
def test_the_parts_are_no_more_than_the_whole(size) -> None:
    text_model = open_text_model("nano", memory=size)
    engine = Engine(text_model, EngineLimits(max_running=2))
    budget = text_model.budget
    assert budget is not None
    assert budget.resident + budget.latent_cache + budget.scratch + budget.store.nbytes <= size
    assert budget.store.capacity >= text_model.model.config.num_experts_per_tok
    assert engine.limits.cache_bytes <= budget.latent_cache
    assert "experts" in str(budget)


@needs_kernels
def test_answers_are_those_of_the_resident_model() -> None:
    text = "He drank a cup of tea."
    expected = LLM("nano", dtype="as-is").translate(text)
    [translation] = LLM("nano", memory="12MB").translate(text)
    assert [translation] == expected


def test_too_little_memory_is_rejected_with_the_bytes_needed() -> None:
    with pytest.raises(SoliError, match=r"weights that stay in memory take 7,\d{3},\d{3} bytes .* 3,000,000 bytes"):
        open_text_model("nano", memory=3 * MB)
    text_model = open_text_model("nano", memory=8_500_000)
    with pytest.raises(SoliError, match=r"give [0-9,]+ or more"):
        Engine(text_model, limits_for(text_model, 1, 64))


@needs_kernels
def test_hits_and_bytes_read_are_metrics(capsys) -> None:
    text_model = open_text_model("nano", memory=12 * MB)
    engine = Engine(text_model, limits_for(text_model, 1, 40))
    assert len(list(answer_all(engine, [Request((5, 6, 7), 20)]))) == 1
    paging = engine.stats().paging
    assert paging is not None
    assert paging.hits + paging.misses >= 20 * 4 * 4
    assert paging.bytes_read >= paging.misses * 98_304
    assert paging.read_seconds > 0
    page = ServerMetrics(lambda: True, lambda: (engine.stats(), ())).text().decode()
    assert f"soli_expert_cache_misses_total {float(paging.misses)}" in page
    assert float(page.partition("\nsoli_expert_read_bytes_total ")[2].split()[0]) == paging.bytes_read
    assert f"soli_expert_wait_seconds_total {paging.waited_seconds}" in page
    assert paging.waited_seconds < paging.step_seconds
    assert "bandwidth_share" not in page  # of a model too small to measure the disk for


@pytest.mark.parametrize(
    "command", [["generate", "nano", "Good morning", "--max-new-tokens", "5"], ["translate", "Good morning."]]
)
def test_what_was_read_is_said_at_the_end(command, capsys) -> None:
    assert main([*command, "--memory", "12MB"]) == 0
    line = r"soli: [\d.]+% of [\d,]+ experts were in memory, .* read per token .* ms waited per token"
    assert re.search(line, capsys.readouterr().err)


def test_shares_of_bandwidth_are_of_the_time_of_steps() -> None:
    text_model = open_text_model("nano", memory=12 * MB)
    engine = Engine(text_model, limits_for(text_model, 1, 40))
    budget = text_model.budget
    assert budget is not None
    budget.rates = BandwidthRates(disk=1e9, memory=20e9)
    assert len(list(answer_all(engine, [Request((5, 6, 7), 20)]))) == 1
    paging = engine.stats().paging
    assert paging is not None
    used = budget.store.stats.bytes_used + engine.stats().steps * budget.resident_per_pass
    assert paging.memory_share == used / paging.step_seconds / 20e9
    assert paging.disk_share == paging.bytes_read / paging.step_seconds / 1e9
    assert "of the disk's bandwidth and" in paging.summary(20)
    page = ServerMetrics(lambda: True, lambda: (engine.stats(), ())).text().decode()
    assert f"soli_disk_bandwidth_share {paging.disk_share}" in page
    assert paging.since(paging).hits == paging.since(paging).bytes_used == 0


def test_the_policy_s_tables_are_in_the_budget() -> None:
    [cache, slots], [more, fewer] = (divide_bytes(10**6, 0, 1000, 2000, size) for size in (0, 10_000))
    assert (slots, fewer) == (1000, 990)
    assert cache == more == 0
    assert divide_bytes(10**6, 0, 1000, 1000, 10_000) == (0, 1000)  # where all experts stay, none decides
    for layers, experts in ((1, 1), (3, 5), (26, 64)):
        assert policy_bytes(layers, experts) == POLICIES[DEFAULT](4, layers, experts).nbytes


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"device": "cuda"}])
def test_another_dtype_or_device_is_rejected(options) -> None:
    with pytest.raises(SoliError):
        open_text_model("nano", memory=20 * MB, **options)


def test_a_model_larger_than_the_machine_reads_its_experts_from_disk(monkeypatch) -> None:
    monkeypatch.setattr("soli.engine.text_model.available_memory", lambda: 12 * MB)
    monkeypatch.setattr("soli.experts.budget.available_memory", lambda: 12 * MB)
    monkeypatch.setattr("soli.experts.budget.MIN_MARGIN", MB)
    with pytest.warns(UserWarning, match=r"more than is available.*10\.8 MB of memory.*less 1\.2 MB"):
        text_model = open_text_model("nano")
    assert text_model.budget is not None
    assert text_model.budget.total == 10_800_000


@needs_kernels
def test_a_process_takes_no_more_than_it_was_given(tmp_path) -> None:
    """Peak memory beside what Python and its libraries take: within 3 % or 16 MB."""
    code = """
import resource, torch
from soli.llm import LLM
from soli.engine.engine import Engine
LLM("nano", memory="100MB").translate("Good morning.")  # whatever libraries allocate once
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
llm = LLM("nano", memory="11MB")
llm.translate(["He drank a cup of tea."] * 40, beam_width=1)
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) < 11 * MB + 16 * MB
