"""`soli generate` and `soli serve` on several processes: from the command to the end, whoever ends first."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from soli.checkpoint import save_model
from soli.cli._shared.ranks import without_processes
from soli.errors import SoliError
from soli.llm import LLM
from soli.parallel.calls import Leader, follow
from soli.parallel.inference import PartSettings, join_group, load_part
from soli.parallel.launch import describe_failure
from soli.parallel.ranks import joined, launched_ranks
from tests.distributed.ranks import free_port, start_ranks
from tests.distributed.shared_models import CPU, LARGE
from tests.distributed.test_kill import WITHIN, ranks_of, start
from tests.engine.tiny import tiny_folder, tiny_model, tiny_tokenizer

TEXT, TOKENS = "hello world", 12
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "soli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def soli(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, input=text, capture_output=True, text=True, timeout=2 * WITHIN
    )


def continuation(folder: str) -> str:
    """Of one process."""
    llm = LLM(folder)
    [answer] = llm.generate(TEXT, max_new_tokens=TOKENS)
    llm.close()
    return answer.text


class Server:
    """`soli serve` of two processes, ready."""

    def __init__(self, folder: str, *options: str) -> None:
        self.agent = start("-m", "soli", "serve", folder, "--port", "0", "--processes", "2", "--no-open", *options)
        self.lines: list[str] = []
        self.url = self._wait_for(r"serving .* on (http\S+)/ ")[1]
        self._wait_for(r'"message": "ready"')
        self.ranks = ranks_of(self.agent)

    def _wait_for(self, pattern: str) -> re.Match:
        for line in self.agent.stderr:
            self.lines.append(line)
            match = re.search(pattern, line)
            if match is not None:
                return match
        raise AssertionError("".join(self.lines))

    def complete(self, tokens: int = TOKENS) -> str:
        body = json.dumps({"prompt": TEXT, "max_tokens": tokens, "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WITHIN) as answer:
            return json.load(answer)["choices"][0]["text"]

    def end(self) -> tuple[int, str]:
        """The status, and what it wrote to standard error since it was ready."""
        _, error = self.agent.communicate(timeout=WITHIN)
        return self.agent.returncode, error


@pytest.mark.parametrize(
    ("arguments", "remaining"),
    [
        (["generate", "m", "--processes", "2", "x"], ["generate", "m", "x"]),
        (["generate", "--processes=2", "m", "x"], ["generate", "m", "x"]),
        (["generate", "m", "--", "--processes"], ["generate", "m", "--", "--processes"]),
    ],
)
def test_ranks_get_the_command_without_processes(arguments, remaining):
    assert without_processes(arguments) == remaining


def is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_generate_prints_what_one_process_prints(folder):
    command = ["-m", "soli", "generate", folder, "-", "--max-new-tokens", str(TOKENS)]
    shared = soli(*command, "--processes", "2", "--speculate", text=TEXT)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout == continuation(folder) + "\n"
    assert shared.stderr.count("soli: ") == 1


def test_a_server_answers_and_ends_with_the_name_of_a_rank_that_was_killed(folder):
    server = Server(folder)
    assert server.complete() == continuation(folder)
    os.kill(server.ranks[1], signal.SIGKILL)
    status, error = server.end()
    assert status == 1
    assert f"soli: rank 1 (process {server.ranks[1]}) was ended by SIGKILL, and the others were stopped" in error
    assert "Traceback" not in error
    assert not any(map(is_alive, server.ranks.values()))


def fail_on_the_first_rank(folder: str) -> None:
    ranks = launched_ranks()
    group = join_group(ranks, CPU)
    model = load_part(folder, ranks, CPU, PartSettings())
    if not ranks.is_first:
        with joined(ranks):
            follow(model, CPU, group)
        return
    leader = Leader(model, ranks.world, group)
    reasons: list[str] = []
    leader.on_failure = reasons.append

    def fail(*values: torch.Tensor) -> None:
        raise ZeroDivisionError

    model.layers[1].self_attn.forward = fail
    for error in (ZeroDivisionError, SoliError):
        with pytest.raises(error):
            model(torch.tensor([[5, 6]]))
    assert len(reasons) == 1 and "stopped computing together after an error (ZeroDivisionError)" in reasons[0]
    os._exit(3)


@pytest.mark.slow
def test_an_error_in_a_step_ends_all_ranks(folder, tmp_path):
    processes = start_ranks(fail_on_the_first_rank, 2, tmp_path, folder)
    for process in processes:
        process.join(WITHIN)
    assert [process.exitcode for process in processes] == [3, 1]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["agent", "first rank", "other rank"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_process_ends_all(folder, target, number):
    server = Server(folder)
    process = {"agent": server.agent.pid, "first rank": server.ranks[0], "other rank": server.ranks[1]}[target]
    os.kill(process, number)
    status, error = server.end()
    assert status == (target == "other rank")
    assert "Traceback" not in error and "lost" not in error
    assert not any(map(is_alive, server.ranks.values()))


@pytest.mark.slow
def test_the_first_rank_killed_ends_the_others(folder):
    server = Server(folder)
    os.kill(server.ranks[0], signal.SIGKILL)
    status, error = server.end()
    assert status == 1 and f"rank 0 (process {server.ranks[0]}) was ended by SIGKILL" in error
    assert not any(map(is_alive, server.ranks.values()))


@pytest.mark.slow
def test_a_rank_killed_during_an_answer_ends_generate(folder):
    options = ["--max-new-tokens", "80", "--processes", "2"]
    agent = start("-m", "soli", "generate", folder, TEXT, "--logit-bias", "1=-100", *options)
    while len(ranks := ranks_of(agent)) < 2:
        time.sleep(0.05)
    time.sleep(2.0)
    os.kill(ranks[1], signal.SIGKILL)
    _, error = agent.communicate(timeout=WITHIN)
    assert agent.returncode == 1 and f"rank 1 (process {ranks[1]}) was ended by SIGKILL" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "nowhere", TEXT], "nowhere: there is no such folder"),
        (["generate", "FOLDER", TEXT, "--dtype", "int3"], "dtype is 'int3'"),
        (["generate", "FOLDER", TEXT, "--memory", "10kB"], "the part of each of 2 processes takes .* but 10,000 are"),
        (["generate", "FOLDER", TEXT, "--temperature", "-1"], "temperature"),
        (["serve", "FOLDER", "--port", "0", "--speculate", "--memory", "1kB"], "the part of each of 2 processes"),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(folder, arguments, words):
    command = [folder if argument == "FOLDER" else argument for argument in arguments]
    failed = soli(*TORCHRUN, *command)
    assert failed.returncode == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("soli: ")]
    assert len([line for line in lines if "serving" not in line]) == 1, failed.stderr
    assert re.search(words, "".join(lines))


@pytest.mark.slow
def test_with_processes_an_error_of_all_ranks_is_the_only_line(folder):
    failed = soli("-m", "soli", "generate", folder, TEXT, "--processes", "2", "--memory", "10kB")
    assert failed.returncode == 1
    assert re.fullmatch("soli: rank 0: .*the part of each of 2 processes takes .* but 10,000 are .*\n", failed.stderr)


def test_a_rank_that_the_agent_ends_is_not_the_one_that_failed():
    def failure(exitcode: int, timestamp: int) -> ProcessFailure:
        process = ProcessFailure(0, 77, exitcode, "")
        process.timestamp = timestamp
        return process

    status, ended, killed = failure(1, 30), failure(-signal.SIGTERM, 10), failure(-signal.SIGKILL, 20)
    assert "rank 1 (process 77) ended with status 1" in describe_failure({0: ended, 1: status})
    assert "rank 2 (process 77) was ended by SIGKILL" in describe_failure({0: ended, 1: status, 2: killed})
    assert "rank 0 (process 77) was ended by SIGTERM" in describe_failure({0: ended})


@pytest.mark.slow
def test_wrong_usage_is_shown_once(folder):
    failed = soli(*TORCHRUN, "generate", folder, TEXT, "--nowhere")
    assert failed.returncode == 1 and failed.stderr.count("No such option") == 1, failed.stderr


@pytest.mark.slow
def test_translate_and_eval_print_what_one_process_prints(tmp_path):
    texts = tmp_path / "texts"
    texts.write_text("The house stands by the river.\n今天天气很好。\n", encoding="utf-8")
    for command, text in (
        (["translate", "-", "--speculate"], "Good morning.\n你好。\n"),
        (["translate", "-", "--beams", "3"], "Good morning.\nWhere can I buy a ticket for the train?\n"),
        (["eval", "nano", "--text", str(texts), "--json"], ""),
    ):
        alone = soli("-m", "soli", *command, text=text)
        shared = soli("-m", "soli", *command, "--processes", "2", text=text)
        assert shared.returncode == 0, shared.stderr
        if command[0] == "translate":
            assert shared.stdout == alone.stdout and len(alone.stdout.splitlines()) == 2
        else:
            ours, theirs = (json.loads(output.stdout)["on_text"] for output in (shared, alone))
            assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-4)
            assert ours["mtp_acceptance"] == theirs["mtp_acceptance"]


@pytest.mark.slow
def test_sizes_are_refused_before_a_process_is_started(folder):
    failed = soli("-m", "soli", "generate", folder, TEXT, "--processes", "3")
    assert failed.returncode == 1
    assert failed.stderr == (
        "soli: 3 processes cannot share this model: num_attention_heads is 2 and n_routed_experts is 16, which their "
        "number must divide; use 2\n"
    )


@pytest.mark.slow
def test_python_under_torchrun(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, soli\n"
        "llm = soli.LLM(sys.argv[1])\n"
        f"print(llm.generate({TEXT!r}, max_new_tokens={TOKENS})[0].text)\n"
        "try:\n    soli.LLM(sys.argv[1])\nexcept soli.SoliError as error:\n    print(error, file=sys.stderr)\n"
    )
    alone = soli("-m", "soli", "generate", folder, TEXT, "--max-new-tokens", str(TOKENS))
    shared = soli(*TORCHRUN[:-2], str(script), folder)
    assert (shared.returncode, shared.stdout) == (0, alone.stdout), shared.stderr
    assert shared.stderr.count("this process shares a model with other ranks already") == 1


@pytest.mark.slow
def test_processes_generate_with_a_model_that_none_of_them_could_hold(tmp_path):
    tiny_tokenizer().save(tmp_path)
    model = tmp_path / "model"
    save_model(tiny_model("v3", vocab_size=330, **LARGE), model, format="fp32", tokenizer_from=tmp_path)
    memory = int(0.6 * (model / "model.safetensors").stat().st_size)
    command = ["-m", "soli", "generate", str(model), TEXT, "--max-new-tokens", "8"]
    shared = soli(*command, "--processes", "2", "--memory", str(memory))
    assert (shared.returncode, shared.stdout) == (0, soli(*command).stdout), shared.stderr
    assert "read from disk" not in shared.stderr


@pytest.mark.slow
def test_two_agents_with_a_rendezvous_share_a_model(folder):
    """As on two machines."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "tiny"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    generate = ["-m", "soli", "generate", folder, TEXT, "--max-new-tokens", str(TOKENS)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen([sys.executable, *torchrun, *generate], **pipes) for _ in range(2)]
    outputs = [agent.communicate(timeout=2 * WITHIN) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sorted(output for output, _ in outputs) == ["", soli(*generate).stdout]
