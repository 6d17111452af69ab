"""What templates find in messages: as transformers gives it, and in the form that each template was written for."""

import json
from datetime import datetime

import pytest
from tokenizers import AddedToken

from soli.chat.parsers.families import DEEPSEEK, detect_family
from soli.chat.sandbox import Sandbox
from soli.data.tokenizer import Tokenizer

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Paris", "n": [1]}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d <think>", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "hi"}
TOKENIZER = Tokenizer.train(["hello world"], 330)

# The conditions of DeepSeek-V3's first template and of R1's, in miniature.
V3 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[U ' + m['content'] + ']' }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{% for t in m['tool_calls'] %}"
    "{{ '[CALL ' + t['function']['name'] + ' ' + t['function']['arguments'] + ']' }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}{{ '[SAID ' + m['content'] + ']' }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ '[RESULT ' + m['content'] + ']' }}{% endif %}{% endfor %}"
)
R1 = V3.replace("m['role'] == 'assistant' and m['content'] is none", "m['role'] == 'assistant' and m['tool_calls']")
INSERTED = (
    "{% for m in messages %}{{ m.content }}{% for t in m.tool_calls %}[{{ t.function.name }}]{% endfor %}{% endfor %}"
)


def rendered(source, messages, tools=None, variables=None, tokenizer=TOKENIZER, **options) -> str:
    """The prompt as text, rendered in this process."""
    return as_text(parts(source, messages, tools, variables, tokenizer, **options), tokenizer)


def parts(source, messages, tools=None, variables=None, tokenizer=TOKENIZER, **options) -> list[str | int]:
    sources = {"default": source} if isinstance(source, str) else source
    added_tokens = tokenizer.added_tokens()
    family = detect_family(sources.values(), added_tokens, None).name
    sandbox = Sandbox(sources, {"bos_token": "<|bos|>"}, added_tokens, family)
    return sandbox.render(messages, tools, variables or {}, True, **options)[0]


def as_text(parts, tokenizer=TOKENIZER) -> str:
    return "".join(part if isinstance(part, str) else tokenizer.token_text(part) for part in parts)


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}, {"content": []}])
@pytest.mark.parametrize("source", [V3, R1], ids=["V3", "R1"])
def test_content_beside_calls_is_null_when_it_says_nothing(source, content):
    turn = {"role": "assistant", **content, "tool_calls": [CALL, CALL]}
    calls = '[CALL f {"city": "Paris", "n": [1]}]' * 2
    result = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    assert rendered(source, [USER, turn, result]) == f"[U hi]{calls}[RESULT sunny]"
    assert rendered(INSERTED, [USER, turn, result]) == "hi[f][f]sunny"
    answer = {"role": "assistant", **content}
    assert rendered(V3, [USER, answer]) == "[U hi][SAID ]"


def test_null_content_is_null_in_every_way_that_templates_look():
    turn = {"role": "assistant", "content": None, "tool_calls": []}
    turn["tool_calls"] = [CALL]
    source = (
        "{% set c = messages[0].content %}{{ [c is none, c is string, c == none, not c, c is defined] }}"
        "{{ c or 'nothing' }}{{ {'c': c} | tojson }}"
    )
    assert rendered(source, [turn]) == '[True, False, True, True, True]nothing{"c": null}'


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a }}", '{"city": "Paris", "n": [1]}'),
        ("{{ a | tojson }}", '{"city": "Paris", "n": [1]}'),
        ("{{ '' + a }}", '{"city": "Paris", "n": [1]}'),
        ("{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}", '{"city": "Paris", "n": [1]}'),
        ("{% for k, v in a.items() %}{{ k }}={{ v | tojson }};{% endfor %}", 'city="Paris";n=[1];'),
        ("{% for k, v in a | items %}{{ k }}={{ v | tojson }};{% endfor %}", 'city="Paris";n=[1];'),
        ("{% for k, v in a | dictsort %}{{ k }}={{ v }};{% endfor %}", "city=Paris;n=[1];"),
        ("{% for k in a %}{{ k }}={{ a[k] }};{% endfor %}", "city=Paris;n=[1];"),
        ("{{ a.get('city') }}{{ a['city'] }}{{ a.keys() | list }}", "ParisParis['city', 'n']"),
    ],
)
def test_arguments_are_text_and_a_mapping(source, expected):
    template = "{% set a = messages[0].tool_calls[0].function.arguments %}" + source
    assert rendered(template, [{"role": "assistant", "content": None, "tool_calls": [CALL]}]) == expected


def test_arguments_that_are_no_object_are_text_and_no_mapping():
    call = {"function": {"name": "f", "arguments": '{"half'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    source = "{{ messages[0].tool_calls[0].function.arguments }}"
    assert rendered(source, [turn]) == '{"half'
    with pytest.raises(Exception, match="arguments of a call in an earlier message are not a JSON object"):
        rendered(source.replace("arguments", "arguments.items()"), [turn])


def test_special_tokens_in_arguments_stay_text_in_both_forms():
    call = {"function": {"name": "f", "arguments": '{"\\u003c|eos|>": "\\u003c|user|>", "b": "<|user|>"}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    source = "{% for k, v in messages[0].tool_calls[0].function.arguments.items() %}{{ k }}{{ v }}{% endfor %}"
    tool = {"function": {"name": "f", "parameters": {"properties": {"<|user|>": {"type": "string"}}}}}
    [text] = parts(source + "{{ tools | tojson }}", [turn], [tool])
    assert text.startswith("<|eos|><|user|>b<|user|>[{")


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ c }}", "a b"),
        ("{{ 'x' + c }}", "xa b"),
        ("{{ c | trim }}", "a b"),
        ("{% for p in c %}[{{ p.type }} {{ p['text'] }}]{% endfor %}", "[text a ][text b]"),
        ("{% if c is string %}no{% else %}{% for p in c %}{{ p.text }}|{% endfor %}{% endif %}", "a |b|"),
        ("{% if c is string %}{{ c }}{% else %}{{ raise_exception('text alone') }}{% endif %}", "a b"),
        ("{{ c | length }}{{ c[1].text }}", "2b"),
        ("{{ c | tojson }}", '[{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]'),
    ],
)
def test_content_parts_are_a_list_and_text(source, expected):
    assert rendered("{% set c = messages[0].content %}" + source, PARTS) == expected


def test_training_tags_pass_as_in_transformers():
    source = (
        "{% for m in messages %}{% generation %}{% set seen = 1 %}{{ m['content'] }}{% endgeneration %}"
        "{{ seen is defined }}{% endfor %}"
    )
    messages = [USER, USER]
    assert rendered(source, messages) == transformers_text(source, messages) == "hiFalsehiFalse"
    assert rendered("{%- generation -%} x {%- endgeneration -%}", messages) == "x"


def transformers_text(source, messages, **options) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=source, **options)[0][0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools }}{{ documents is defined }}{{ documents }}{{ add_generation_prompt }}{{ unk_token }}",
        "{{ messages | tojson(indent=2) }}{{ '<猫>&' | tojson }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
        "{{ tools | tojson(separators=(',', ':')) }}{{ tools | tojson(ensure_ascii=True) }}",
        "{% if true %}\n  x\n{% endif %}\n{% for m in messages %}\n  {{- m.role }}{% continue %}{% endfor %}\ny",
        "{% set ns = namespace(a=1) %}{% set ns.a = dict(b=2) %}{{ ns.a }}{{ messages[0].missing }}",
        "{{ messages[0].content[:1] }}{{ messages[-1]['role'] }}{{ 'x'.join(['a', 'b']) }}",
    ],
)
def test_templates_are_given_what_transformers_gives(source):
    tools = [TOOL] if "tools" in source else None
    expected = transformers_text(source, [USER], tools=tools, add_generation_prompt=True)
    assert rendered(source, [USER], tools) == expected


def test_functions_of_templates_are_those_of_transformers():
    assert rendered("{{ strftime_now('%Y') }}", [USER]) == str(datetime.now().year)
    with pytest.raises(Exception, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}", [USER])


def test_documents_and_named_templates_can_be_chosen():
    sources = {"default": "d{{ documents }}", "tool_use": "t{{ tools | length }}", "rag": "{{ documents[0].text }}"}
    assert rendered(sources, [USER]) == "dNone"
    assert rendered(sources, [USER], [TOOL]) == "t1"
    assert rendered(sources, [USER], template="rag", documents=[{"text": "x <|user|>"}]) == "x <|user|>"
    with pytest.raises(Exception, match="no chat template 'other', only default, rag, tool_use"):
        rendered(sources, [USER], template="other")
    with pytest.raises(Exception, match="no use for documents"):
        rendered(sources, [USER], [TOOL], documents=[{"text": "x"}])


SPOKEN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim if trim else m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("content", ["It is ", "It is", [{"type": "text", "text": "It is "}]])
def test_the_last_message_can_be_continued(trim, content):
    messages = [USER, {"role": "assistant", "content": content}]
    expected = "[user]hi[/][assistant]It is" + (" " if content != "It is" and not trim else "")
    if isinstance(content, str):
        options = {"trim": trim, "continue_final_message": True, "add_generation_prompt": False}
        assert transformers_text(SPOKEN, messages, **options) == expected
    assert rendered(SPOKEN, messages, variables={"trim": trim}, continue_final_message=True) == expected
    assert rendered(SPOKEN, messages, add_generation_prompt=False).endswith("[/]")
    with pytest.raises(Exception, match="no text to continue"):
        rendered(SPOKEN, [USER, {"role": "assistant", "content": ""}], continue_final_message=True)


def test_a_continued_message_may_be_inside_its_reasoning():
    sandbox = Sandbox({"default": SPOKEN}, {}, {}, "deepseek_v31")
    for content, is_inside in (("<think>hm", True), ("<think>hm</think>So", False), ("So", False)):
        messages = [USER, {"role": "assistant", "content": content}]
        assert sandbox.render(messages, None, {}, True, continue_final_message=True)[1] is is_inside


def test_a_template_may_open_reasoning_before_a_continued_message():
    source = "[A]{% if messages[-1].prefix and thinking %}<think>{% endif %}{{ messages[-1].content }}[/]"
    sandbox = Sandbox({"default": source}, {}, {}, "deepseek_v31")
    messages = [USER, {"role": "assistant", "content": "hm", "prefix": True}]
    for thinking in (False, True):
        prompt = sandbox.render(messages, None, {"thinking": thinking}, True, continue_final_message=True)
        assert prompt == (["[A]<think>hm"] if thinking else ["[A]hm"], thinking)


def test_reasoning_has_the_names_that_transformers_gives_it():
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert rendered(source, [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]) == "hmhm"


QUIET = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


def deepseek_tokenizer() -> Tokenizer:
    backend = Tokenizer.train(["hello world"], 330)._backend
    backend.add_tokens([AddedToken(text, special=False) for text in vars(DEEPSEEK).values()])
    return Tokenizer(backend)


@pytest.mark.parametrize("messages", [[USER], [{"role": "system", "content": "Be brief."}, USER]])
def test_tools_are_told_to_a_model_whose_template_knows_none(messages):
    tokenizer = deepseek_tokenizer()
    v3 = QUIET + "{# <｜tool▁calls▁begin｜> ```json #}"
    for source, form in ((QUIET, "tool_call_name"), (v3, "function<｜tool▁sep｜>")):
        prompt = parts(source, messages, [TOOL], tokenizer=tokenizer)
        text = as_text(prompt, tokenizer)
        assert form in text and '"type": "object"' in text and text.endswith("<|user|>hi<|assistant|>")
        assert text.startswith("<|bos|><|system|>" + ("Be brief.\n\n" if len(messages) > 1 else ""))
        assert tokenizer.token_id("<｜tool▁calls▁begin｜>") in prompt  # the form's delimiters are tokens
        plain = parts(source, messages, tokenizer=tokenizer)
        assert tokenizer.token_id("<｜tool▁calls▁begin｜>") not in plain


def test_a_template_without_a_system_message_has_the_tools_in_the_first_user_message():
    ignoring = "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% endif %}{% endfor %}"
    rejecting = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + ignoring
    for source in (ignoring, rejecting):
        text = rendered(source, [USER, USER], [TOOL])
        assert text.startswith("[U]## Tools") and text.count("## Tools") == 1 and text.endswith("\n\nhi[U]hi")
    with pytest.raises(Exception, match="no place to tell the model about tools"):
        rendered("nothing", [USER], [TOOL])


def test_tools_and_messages_keep_their_special_tokens_as_text():
    [text] = parts("{{ messages[0].content }}{{ tools | tojson }}", [USER], [TOOL])
    assert json.loads(text[2:]) == [TOOL]
