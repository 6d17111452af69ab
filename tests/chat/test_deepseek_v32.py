"""DeepSeek-V3.2's prompt, for which its folder has no template: the published examples, and what is between them."""

import json

import pytest

from soli.chat.deepseek_v32_template import TEMPLATE, TOOL_PROMPT
from soli.chat.sandbox import Sandbox
from soli.chat.templates import ChatTemplate
from soli.data.tokenizer import Tokenizer
from tests.engine.tiny import tiny_folder

NAMES = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
SANDBOX = Sandbox({"default": TEMPLATE}, NAMES, {}, "deepseek_v32")
TOOL = {"type": "function", "function": {"name": "search", "description": "d", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "hello"}


def rendered(messages, tools=None, **variables) -> tuple[str, bool]:
    parts, is_inside = SANDBOX.render(messages, tools, variables, True)
    return "".join(map(str, parts)), is_inside


def calling(*arguments, **fields):
    calls = [{"function": {"name": "search", "arguments": json.dumps(values)}} for values in arguments]
    return {"role": "assistant", "content": None, "tool_calls": calls, **fields}


def test_the_documented_example():
    answer = {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."}
    messages = [USER, answer, {"role": "user", "content": "1+1=?"}]
    expected = (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜>"
    )
    assert rendered(messages, thinking=True) == (f"{expected}<think>", True)
    assert rendered(messages) == (f"{expected}</think>", False)


@pytest.mark.parametrize("thinking", [False, True])
def test_calls_and_results_are_written_as_dsml(thinking):
    call = calling({"q": "猫 <b>", "n": 1, "f": {"a": [True]}}, {}, reasoning_content="hm")
    results = [{"role": "tool", "content": "r1"}, {"role": "tool", "content": "r2"}]
    system = {"role": "system", "content": "Be brief."}
    text, is_inside = rendered([system, USER, call, *results], [TOOL], thinking=thinking)
    tools = TOOL_PROMPT.replace("SCHEMAS", json.dumps(TOOL["function"]))
    assert text == (
        f"<｜begin▁of▁sentence｜>Be brief.\n\n{tools}<｜User｜>hello<｜Assistant｜"
        + (">" + "<think>hm</think>" if thinking else "></think>")
        + """

<｜DSML｜function_calls>
<｜DSML｜invoke name="search">
<｜DSML｜parameter name="q" string="true">猫 <b></｜DSML｜parameter>
<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>
<｜DSML｜parameter name="f" string="false">{"a": [true]}</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="search">

</｜DSML｜invoke>
</｜DSML｜function_calls><｜end▁of▁sentence｜>

<function_results>
<result>r1</result>
<result>r2</result>
</function_results>

"""
        + ("<think>" if thinking else "</think>")
    )
    assert is_inside is thinking


def test_tools_without_a_system_message_and_developers():
    text, _ = rendered([USER], [TOOL])
    assert text.startswith("<｜begin▁of▁sentence｜>\n\n## Tools\n") and text.endswith(
        "</functions>\n<｜User｜>hello<｜Assistant｜></think>"
    )
    text, _ = rendered([{"role": "developer", "content": "x"}])
    assert text.endswith("<｜User｜>\n\n# The user's message is: x<｜Assistant｜></think>")


def test_the_folder_of_the_family_has_this_template(tmp_path):
    folder = tiny_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    assert ChatTemplate.from_folder(tmp_path / "model", tokenizer) is None
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "deepseek_v32"}))
    template = ChatTemplate.from_folder(tmp_path / "model", tokenizer)
    ids, is_inside = template.render([USER], [TOOL], {"thinking": True})
    assert template.family.name == "deepseek_v32" and is_inside
    assert tokenizer.token_id("<|bos|>") in ids and "## Tools" in tokenizer.decode(ids)
    template.close()
