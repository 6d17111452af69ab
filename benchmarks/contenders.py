"""The contenders in the speed tables of cpu.py and serve.py: Soli, llama.cpp, transformers, vLLM, memory bandwidth.

Each is opened on one model and measured on the same questions, in tokens per second of wall time:

    decode    one request: the tokens after the first, behind a prompt of `work.prompt` tokens
    prefill   one prompt of `work.prefill` tokens
    batch     `work.batch` requests together, prompt and answer: generated tokens over the time for all of it

Prompts are random tokens, drawn anew each time. A peer that this machine lacks raises Absent with the reason.
llama.cpp answers through its own llama-bench and llama-batched-bench, vLLM through peer_vllm.py in its own Python;
Soli, transformers and the
memory bandwidth run in processes of their own here, with the same number of threads. transformers answers with the
faster of its experts implementations, found in the warm-up round.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import record

from soli import machine

if TYPE_CHECKING:
    from soli.engine.text_model import TextModel

IMPLEMENTATIONS = ("eager", "grouped_mm")
MEMORY_BLOCK = 2**28  # float32 numbers: 1 GiB, past any cache
Ids = list[list[int]]
Ask = Callable[..., float]  # (question, whether to warm up) -> tokens per second


class Absent(Exception):
    """A contender that cannot take part here, and why."""


@dataclass(frozen=True)
class Work:
    """Token counts of the questions."""

    prompt: int = 128
    new: int = 128
    prefill: int = 512
    batch: int = 16


QUICK = Work(prompt=16, new=8, prefill=32, batch=2)


@dataclass(frozen=True)
class Lab:
    """Where models and peers are; None for peers that take no part."""

    folder: Path
    llama: Path | None  # the folder with llama-bench and llama-batched-bench
    vllm: Path | None  # the python that has vllm
    vllm_preload: str  # libraries that vLLM wants loaded first
    threads: int
    without: tuple[str, ...] = ()

    def needs(self, name: str, path: Path | None) -> Path:
        """`path`, or Absent when it is not there or `name` was left out."""
        if name in self.without:
            raise Absent("left out by --without")
        if path is None:
            raise Absent("no path was given")
        if not path.exists():
            raise Absent(f"{path} is not there")
        return path


def random_ids(count: int, length: int, vocab: int) -> Ids:
    import torch

    return torch.randint(2, vocab, (count, length)).tolist()


@contextmanager
def soli(lab: Lab, folder: Path, work: Work) -> Iterator[Ask]:
    """Soli on a folder in any format, its weights as stored."""
    with record.alone(build_soli, lab.needs("soli", folder), asdict(work), threads=lab.threads) as ask:
        yield ask


def build_soli(folder: Path, work: dict[str, int]) -> Callable[..., Any]:
    """For `record.alone`. Besides the questions: "resident", peak resident memory in MiB, and "load", the arrival times
    of tokens of requests that arrive at random. Many requests run as in a server, a single one offline."""
    from functools import cache

    from soli.engine.text_model import open_text_model

    text_model = open_text_model(str(folder), dtype="as-is")
    single = single_request(text_model, work)
    many = cache(lambda: engine_requests(text_model, work))

    def run(question: str, warm: bool, **more: float) -> Any:
        return many()(question, warm, **more) if question in ("batch", "load") else single(question, warm)

    return run


def engine_requests(text_model: TextModel, work: dict[str, int]) -> Callable[..., Any]:
    """Answers "batch" and "load" with an Engine."""
    from soli.engine.engine import Engine
    from soli.engine.request import Request
    from soli.serve.load_generator import arrivals, drive_engine

    engine = Engine(text_model)
    numbers: dict[int, int] = {}  # the engine's to the arrival's

    def step() -> list[int]:
        events = engine.step()
        for event in events:
            if event.finish_reason == "error":
                raise RuntimeError(event.error)
        return [numbers[event.request_id] for event in events if event.token is not None]

    def run(question: str, warm: bool, rate: float = 0.0, count: int = 0, seed: int = 0) -> Any:
        now = warm_up_work(Work(**work), warm)
        at = arrivals(rate, count, random.Random(seed)) if question == "load" else [0.0] * now.batch
        prompts = random_ids(len(at), now.prompt, text_model.model.config.vocab_size)

        def add(number: int) -> None:
            numbers[engine.add(Request(tuple(prompts[number]), now.new))] = number

        times = drive_engine(at, now.new, add, step)
        return times if question == "load" else now.batch * now.new / max(one[-1] for one in times)

    return run


def single_request(text_model: TextModel, work: dict[str, int]) -> Callable[[str, bool], float]:
    """Answers the questions about one request with an Engine sized for it."""
    from soli.engine.engine import Engine
    from soli.engine.offline import limits_for, stream
    from soli.engine.request import Event, Request

    vocab = text_model.model.config.vocab_size

    def events(prompt: int, new: int) -> Iterator[Event]:
        engine = Engine(text_model, limits_for(text_model, 1, prompt + new))
        return stream(engine, Request(tuple(random_ids(1, prompt, vocab)[0]), new))

    def run(question: str, warm: bool) -> float:
        now = warm_up_work(Work(**work), warm)
        if question == "resident":
            return peak_mib()
        if question == "prefill":
            prefill = events(now.prefill, 1)
            return now.prefill / seconds(lambda: list(prefill))
        times = [time.perf_counter() for event in events(now.prompt, now.new + 1) if event.token is not None]
        return now.new / (times[-1] - times[0])

    return run


@contextmanager
def transformers(lab: Lab, folder: Path, work: Work) -> Iterator[Ask]:
    """transformers' DeepseekV3ForCausalLM on a bf16 folder."""
    if machine.package_version("transformers") is None:
        raise Absent("it is not installed")
    with record.alone(build_transformers, lab.needs("transformers", folder), asdict(work), threads=lab.threads) as ask:
        yield ask


def build_transformers(folder: Path, work: dict[str, int]) -> Callable[[str, bool], float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    fastest: dict[str, str] = {}

    def generate(prompts: Ids, new: int, streamer: Any = None) -> None:
        ids_BT = torch.tensor(prompts)
        model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False,
            eos_token_id=None, pad_token_id=1, streamer=streamer,
        )  # fmt: skip

    def once(question: str, now: Work) -> float:
        vocab = model.config.vocab_size
        if question == "batch":
            prompts = random_ids(now.batch, now.prompt, vocab)
            return now.batch * now.new / seconds(lambda: generate(prompts, now.new))
        if question == "prefill":
            ids_BT = torch.tensor(random_ids(1, now.prefill, vocab))
            return now.prefill / seconds(lambda: model(ids_BT, logits_to_keep=1))
        clock = Clock()
        generate(random_ids(1, now.prompt, vocab), now.new + 1, clock)
        return now.new / (clock.times[-1] - clock.times[-now.new - 1])

    @torch.inference_mode()
    def run(question: str, warm: bool) -> float:
        if warm or question not in fastest:
            speeds = {}
            for name in IMPLEMENTATIONS:
                model.set_experts_implementation(name)
                speeds[name] = max(once(question, warm_up_work(Work(**work), True)) for _ in range(2))
            fastest[question] = max(speeds, key=lambda name: speeds[name])
        model.set_experts_implementation(fastest[question])
        return once(question, warm_up_work(Work(**work), warm))

    return run


class Clock:
    """A streamer that records when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def llama_cpp(lab: Lab, file: Path, work: Work) -> Iterator[Ask]:
    """llama.cpp's own benchmarks on a GGUF file, a process per measurement. "resident": its peak memory, in MiB."""
    tools = lab.needs("llama.cpp", lab.llama)
    lab.needs("llama.cpp", file)
    resident = 0.0

    def run(question: str, warm: bool) -> float:
        nonlocal resident
        now = warm_up_work(work, warm)
        threads = ["-t", str(lab.threads)]
        if question == "resident":
            return resident
        if question == "batch":
            size = ["-c", str(now.batch * (now.prompt + now.new)), "-b", "2048", "-ub", "512"]
            size += ["-npp", str(now.prompt), "-ntg", str(now.new), "-npl", str(now.batch)]
            command = ["llama-batched-bench", *threads, "-tb", str(lab.threads), *size, "--output-format", "jsonl"]
        elif question == "prefill":
            command = ["llama-bench", *threads, "-r", "1", "-o", "jsonl", "-p", str(now.prefill), "-n", "0"]
        else:
            size = ["-p", "0", "-n", str(now.new), "-d", str(now.prompt)]
            command = ["llama-bench", *threads, "-r", "1", "-o", "jsonl", *size]
        output, mib = run_tool([str(tools / command[0]), "-m", str(file), *command[1:]])
        resident = max(resident, mib)
        result = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
        return now.batch * now.new / result["t"] if question == "batch" else result["avg_ts"]

    yield run


def run_tool(command: list[str]) -> tuple[str, float]:
    """Output of a command and its peak resident memory in MiB. Absent when it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Absent(f"{' '.join(command)} ended with {process.returncode}")
    return output, usage.ru_maxrss / 1024


@contextmanager
def vllm(lab: Lab, folder: Path, work: Work) -> Iterator[Ask]:
    """vLLM's CPU build on a bf16 folder, through peer_vllm.py in its own Python; "load" as in `engine_requests`."""
    python = lab.needs("vLLM", lab.vllm)
    lab.needs("vLLM", folder)
    own = {
        "LD_PRELOAD": lab.vllm_preload, "OMP_NUM_THREADS": str(lab.threads), "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{lab.threads - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [str(python), str(record.HERE / "peer_vllm.py"), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | own,
    ) as process:  # fmt: skip
        answer(process)  # it has loaded

        def run(question: str, warm: bool, **more: float) -> Any:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"question": question, **asdict(warm_up_work(work, warm)), **more}) + "\n")
            process.stdin.flush()
            return answer(process)["value"]

        yield run
        assert process.stdin is not None
        process.stdin.close()


def answer(process: subprocess.Popen[str]) -> Any:
    """The next answer of peer_vllm.py, among the lines that vLLM logs. Absent when it has ended."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ANSWER "):
            return json.loads(line.removeprefix("ANSWER "))
    raise Absent(f"{process.args[0]} peer_vllm.py ended with {process.wait()}")  # type: ignore[index]


@contextmanager
def memory(lab: Lab) -> Iterator[Ask]:
    """GB per second that the threads read, by summing a block larger than any cache."""
    with record.alone(build_memory, threads=lab.threads) as ask:
        yield ask


def build_memory() -> Callable[[str, bool], float]:
    import torch

    block = torch.ones(MEMORY_BLOCK)
    return lambda question, warm: block.nbytes / statistics.median(seconds(block.sum) for _ in range(7)) / 1e9


def warm_up_work(work: Work, warm: bool) -> Work:
    """A warm-up's work: fewer new tokens of the same kind."""
    return replace(work, new=min(work.new, 16)) if warm else work


def seconds(run: Callable[[], object]) -> float:
    """Wall time of `run`."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
