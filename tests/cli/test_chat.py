"""`soli chat`: turns are remembered until /reset, answers are the engine's, other folders are rejected."""

import io
import sys

import pytest

from soli.cli import chat, main
from soli.engine.sampler import GREEDY, SamplingParams
from soli.errors import SoliError
from tests.engine.tiny import tiny_folder
from tests.serve.tiny_server import TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny_folder(tmp_path_factory.mktemp("chat"))
    with open(f"{path}/chat_template.jinja", "w", encoding="utf-8") as file:
        file.write(TEMPLATE)
    return path


def talk(monkeypatch, capsys, folder, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
    status = main(["chat", folder, "--temperature", "0", "--max-new-tokens", "6", *options])
    return status, *capsys.readouterr()


def test_each_line_gets_an_answer_and_reset_forgets(monkeypatch, capsys, folder):
    status, out, err = talk(monkeypatch, capsys, folder, ["hello", "the cat", "/reset", "hello", "", "/exit", "never"])
    assert status == 0 and not err
    answers = out.split("\n")[:-1]
    assert len(answers) >= 3
    llm, template = chat.open_chat(folder, "cpu", "auto")
    conversation = chat.Conversation(llm, template, GREEDY, 6, None)
    answers = ["".join(answer for _, answer in conversation.reply(line)) for line in ("hello", "the cat")]
    assert out == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n"
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 2
    prompts = [template.render([{"role": "user", "content": "hello"}])[0], template.render(conversation.messages)[0]]
    assert len(prompts[1]) > len(prompts[0])
    llm.close()


def test_the_system_message_survives_a_reset(folder):
    llm, template = chat.open_chat(folder, "cpu", "auto")
    conversation = chat.Conversation(llm, template, SamplingParams(temperature=1.0, seed=3), 4, "be brief")
    list(conversation.reply("hello"))
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    llm.close()


def test_a_question_without_an_answer_is_forgotten(folder):
    llm, template = chat.open_chat(folder, "cpu", "auto")
    conversation = chat.Conversation(llm, template, GREEDY, 4, None)
    list(conversation.reply("hello"))
    before = conversation.messages
    with pytest.raises(SoliError, match="positions"):
        list(conversation.reply("the cat " * 200))
    assert conversation.messages == before
    llm.close()


def test_an_answer_closed_early_is_kept_up_to_there(folder):
    llm, template = chat.open_chat(folder, "cpu", "auto")
    conversation = chat.Conversation(llm, template, GREEDY, 30, None)
    answer = conversation.reply("hello")
    text = ""
    while not text:
        text += next(answer)[1]
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    llm.close()


def test_unknown_commands_and_long_conversations_are_reported(monkeypatch, capsys, folder):
    status, out, err = talk(monkeypatch, capsys, folder, ["/help", "hello"])
    assert status == 0 and "there is no /help" in err and out
    status, _, err = talk(monkeypatch, capsys, folder, ["the cat " * 200])
    assert status == 1 and "positions" in err


def test_folders_without_a_template_are_rejected(capsys):
    assert main(["chat"]) == 1
    message = capsys.readouterr().err
    assert "nano has no chat template" in message and "soli translate" in message


def test_a_template_may_be_given(monkeypatch, capsys, folder, tmp_path):
    file = tmp_path / "other.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    status, other, err = talk(monkeypatch, capsys, folder, ["hello"], "--chat-template", str(file))
    assert status == 0 and not err
    assert other != talk(monkeypatch, capsys, folder, ["hello"])[1]
    file.write_text("{% broken")
    status, out, err = talk(monkeypatch, capsys, folder, ["hello"], "--chat-template", str(file))
    assert status == 1 and not out and "does not compile" in err and err.count("\n") == 1
