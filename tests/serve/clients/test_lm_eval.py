"""The lm_eval package scores a multiple-choice task against a server as teacher forcing does in process."""

import json

import httpx
import pytest
import torch

from soli.engine.text_model import open_text_model
from tests.serve.process import chat_folder, server_process, wait_until_ready

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'soli[clients]'")

ITEMS = [
    ("The sun rises in the", ["east", "spoon", "seven"]),
    ("Good morning, how are", ["you", "house", "green"]),
    ("She drank a cup of", ["tea", "stone", "running"]),
    ("He is my", ["friend", "because", "under"]),
    ("今天天气很", ["好", "书", "吃"]),
    ("The house stands by the", ["river", "quickly", "thought"]),
    ("We went to the", ["city", "eaten", "of"]),
    ("一个人在", ["家里", "因为", "如果"]),
    ("The first thing he", ["saw", "table", "blue"]),
    ("I have two", ["brothers", "the", "very"]),
    ("It was a cold", ["night", "went", "is"]),
    ("The king and the", ["queen", "has", "soon"]),
    ("他们去了", ["北京", "很", "的"]),
    ("Open the", ["door", "and", "if"]),
    ("The children play in the", ["garden", "said", "are"]),
    ("What is your", ["name", "of", "went"]),
    ("水是", ["冷的", "书", "他们"]),
    ("They said that they would", ["come", "chair", "red"]),
    ("A long time", ["ago", "wood", "ate"]),
    ("The ship sailed over the", ["sea", "why", "him"]),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The folder of a task over the items, from a local JSON file."""
    folder = tmp_path_factory.mktemp("task")
    lines = [{"text": text, "choices": choices, "gold": 0} for text, choices in ITEMS]
    (folder / "items.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    config = {
        "task": "soli_items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
    }
    (folder / "soli_items.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    kinds = {"until": ["\n", "."], "max_gen_toks": 8, "temperature": 0, "do_sample": False}
    config |= {"task": "soli_texts", "output_type": "generate_until", "generation_kwargs": kinds}
    config |= {"metric_list": [{"metric": "bypass"}], "doc_to_target": "{{choices[0]}}"}
    del config["doc_to_choice"]
    (folder / "soli_texts.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server():
    with server_process() as (_, url, _):
        wait_until_ready(url)
        yield url


def run(name, task, server, kind="local-completions", route="completions", **arguments):
    """lm_eval's results of a task."""
    from lm_eval.tasks import TaskManager

    options = {"model": "nano", "base_url": f"{server}/v1/{route}"} | arguments
    if kind == "local-completions":
        folder = str(open_text_model_folder())
        options = {"tokenizer_backend": "huggingface", "tokenizer": folder, "max_length": 512} | options
    return lm_eval.simple_evaluate(
        model=kind,
        model_args=options,
        tasks=[name],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        batch_size=options.pop("batch_size", 1),
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=kind == "local-chat-completions",
    )


def evaluate(task, server, **arguments):
    """The log-likelihood of every choice, and whether it is the greedy one; and the task's accuracy."""
    results = run("soli_items", task, server, **arguments)
    samples = sorted(results["samples"]["soli_items"], key=lambda sample: sample["doc_id"])
    answers = [[(float(value), bool(greedy)) for value, greedy in sample["filtered_resps"]] for sample in samples]
    return answers, results["results"]["soli_items"]["acc,none"]


def open_text_model_folder():
    from soli.checkpoint import open_checkpoint

    return open_checkpoint("nano").folder


@pytest.fixture(scope="module")
def expected():
    """By teacher forcing: the sum over the tokens that lm_eval makes of a choice, and whether each is the likeliest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(open_text_model_folder())
    model = open_text_model("nano").model
    answers = []
    for text, choices in ITEMS:
        answers.append([])
        for choice in choices:
            context = tokenizer(text, add_special_tokens=False).input_ids
            ids = tokenizer(f"{text} {choice}", add_special_tokens=False).input_ids
            with torch.inference_mode():
                logits_TV = model.head(model.backbone(torch.tensor([ids])).hidden_BTD)[0].double()
            log_TV = torch.log_softmax(logits_TV, dim=-1)[len(context) - 1 : -1]
            continuation = torch.tensor(ids[len(context) :])
            greedy = bool((log_TV.argmax(dim=-1) == continuation).all())
            answers[-1].append((float(log_TV.gather(1, continuation[:, None]).sum()), greedy))
    return answers


@pytest.mark.parametrize(
    "arguments",
    [{}, {"batch_size": 8}, {"num_concurrent": 4, "batch_size": 2}, {"tokenizer_backend": "auto"}],
    ids=["one by one", "in batches", "concurrently", "the default tokenizer backend"],
)
def test_log_likelihoods_are_those_of_teacher_forcing(task, server, expected, arguments):
    answers, accuracy = evaluate(task, server, **arguments)
    assert len(answers) == 20
    for item, choices in zip(answers, expected, strict=True):
        assert [value for value, _ in item] == pytest.approx([value for value, _ in choices], abs=1e-4)
        assert [greedy for _, greedy in item] == [greedy for _, greedy in choices]
    best = [max(range(3), key=lambda choice: item[choice][0]) for item in expected]
    assert accuracy == pytest.approx(best.count(0) / 20)


def test_texts_are_those_of_the_server(task, server):
    results = run("soli_texts", task, server, batch_size=4, tokenized_requests=False)
    samples = sorted(results["samples"]["soli_texts"], key=lambda sample: sample["doc_id"])
    body = {"prompt": [text for text, _ in ITEMS[:16]], "max_tokens": 8, "temperature": 0, "stop": ["\n", "."]}
    choices = httpx.post(f"{server}/v1/completions", json=body, timeout=60).json()["choices"]
    assert [sample["resps"][0][0] for sample in samples[:16]] == [choice["text"] for choice in choices]


def test_chats_are_answered(task, tmp_path):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with server_process(model=chat_folder(tmp_path / "nano", template)) as (_, url, _):
        wait_until_ready(url)
        results = run("soli_texts", task, url, "local-chat-completions", "chat/completions", num_concurrent=2)
    assert len(results["samples"]["soli_texts"]) == 20
