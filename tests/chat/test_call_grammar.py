"""With strict tools an answer is free until a call begins; from there no token can leave the tools' schemas."""

import json
import random
from functools import cache

import jsonschema
import pytest
from tokenizers import AddedToken

from soli.chat.parser import MessageParser
from soli.chat.parsers.call_grammar import strict_calls
from soli.chat.parsers.families import DEEPSEEK, FAMILIES, KIMI, REASONING
from soli.chat.parsers.pairs import DSML
from soli.data.tokenizer import Tokenizer
from soli.engine.constraint import Constraint, Constraints
from soli.errors import SoliError

STRICT = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1},
        "at": {"type": "array", "items": {"type": "boolean"}},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
PATTERN = {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}$"}}, "required": ["code"]}
SCHEMAS = {"weather": STRICT, "free": None, "weather_code": PATTERN}
TOOLS = {name: schema or {"type": "object"} for name, schema in SCHEMAS.items()}
B, E, b, S, e = (
    DEEPSEEK.section_begin, DEEPSEEK.section_end, DEEPSEEK.call_begin, DEEPSEEK.separator, DEEPSEEK.call_end,
)  # fmt: skip
GOOD = '{"city": "Paris", "unit": "kelvin", "days": 2}'


@cache
def tokenizer(family: str, added: str) -> Tokenizer:
    """Delimiters are special tokens, added ones, or only spelled out."""
    backend = Tokenizer.train(["weather city Paris function functions parameter invoke name string"] * 3, 400)._backend
    if added != "spelled":
        names = [*REASONING, *FAMILIES[family].tokens]
        backend.add_tokens([AddedToken(name, special=added == "special", normalized=False) for name in names])
    return Tokenizer(backend)


@cache
def constraints(family: str, added: str) -> Constraints:
    text = tokenizer(family, added)
    return Constraints(text, text.vocab_size, {text.eos_id})


def opened(family: str, added: str, parallel: bool = True) -> tuple[Tokenizer, Constraint]:
    text = tokenizer(family, added)
    names = {*REASONING, *FAMILIES[family].tokens}
    token_ids = {name: index for name, index in text.added_tokens().items() if name in names}
    spec = strict_calls(FAMILIES[family].new_format(TOOLS), SCHEMAS, token_ids, REASONING, parallel)
    return text, constraints(family, added).open(spec)


def accepted(text: str, family: str, added: str, parallel: bool = True) -> bool | str:
    """Whether the whole text may be an answer; False, or where it was rejected."""
    encoder, constraint = opened(family, added, parallel)
    ids = encoder.encode_spelled(text)
    for position, token in enumerate(ids):
        if not constraint.mask()[token]:
            return encoder.decode(ids[:position], visible=encoder.special_ids)
        constraint.accept(token)
    return bool(constraint.mask()[encoder.eos_id])


def kimi(head: str, arguments: str) -> str:
    return f"{KIMI.call_begin}{head}{KIMI.separator}{arguments}{KIMI.call_end}"


def dsml(text: str) -> str:
    return text.replace("D ", DSML)


DSML_GOOD = dsml(
    '<D invoke name="weather">\n<D parameter name="city" string="true">a </b> c</D parameter>\n'
    '<D parameter name="days" string="false">2</D parameter>\n</D invoke>'
)
GLM_GOOD = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>a </b> c</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)
ACCEPTED = {
    "deepseek_v31": [
        "Hello.",
        "<think>hm</think>Hello.",
        f"Hello.{B}{b}weather{S}{GOOD}{e}{E}",
        f"{B}{b}weather{S}{GOOD}{e}\n{b}free{S}anything }} {S} goes{e}{E} and text",
        f"{B}{b}function{S}weather\n```json\n{GOOD}\n```{e}{E}",
        f"{b}weather{S}{GOOD}{e}",
        f"<think>I call {B}{b}weather{S}{GOOD}{e}{E}</think>Done.",
        f"{B}{b}function{S}free\nx{e}{E}",
    ],
    "kimi_k2": [
        "Hello.",
        f"a{KIMI.section_begin}{kimi('functions.weather:0', GOOD)}{kimi('functions.free:1', 'x')}{KIMI.section_end}",
    ],
    "deepseek_v32": [
        "1 < 2 and <b>",
        dsml(f"a\n\n<D function_calls>\n{DSML_GOOD}\n</D function_calls>"),
        dsml(f"<D function_calls>\n{DSML_GOOD}\n{DSML_GOOD}\n</D function_calls>").replace(DSML, ""),
        dsml('<D invoke name="free">\n<D parameter name="x" string="true">y</D parameter>\n</D invoke>'),
        dsml('<D invoke name="weather_code">{"code": "AB"}</D invoke>'),
    ],
    "glm": [
        "1 < 2 and <b>",
        f"<think>hm</think>\n{GLM_GOOD}\n{GLM_GOOD}",
        "<tool_call>free\n<arg_key>x</arg_key><arg_value>y</arg_value>\n</tool_call>",
        '<tool_call>weather_code\n{"code": "AB"}\n</tool_call>',
    ],
}
REJECTED = {
    "deepseek_v31": [
        f"{B}nothing",
        f"{B}{b}other{S}",
        f"{B}{b}weather{S}{{}}",
        f'{B}{b}weather{S}{{"city": 1}}',
        f'{b}function{S}weather\n```json\n{{"city": "Paris", "days": 0}}',
        f'{B}{b}weather_code{S}{{"code": "abc"}}',
    ],
    "kimi_k2": [f"{KIMI.section_begin}{kimi('functions.weather:0', '{}')}", f"{KIMI.call_begin}functions.other"],
    "deepseek_v32": [
        dsml('<D invoke name="other">'),
        dsml('<D invoke name="weather">\n</D invoke>'),
        DSML_GOOD.replace(">2<", ">two<"),
        dsml('<invoke name="weather"><parameter name="other"'),
    ],
    "glm": [
        "<tool_call>other",
        "<tool_call>weather\n</tool_call>",
        GLM_GOOD.replace(">2<", ">two<"),
        '<tool_call>weather_code\n{"code": "abc"}',
    ],
}
ADDED = ["spelled", "added", "special"]


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("family", ACCEPTED)
def test_what_the_parser_reads_as_a_call_must_fit(family, added):
    for text in ACCEPTED[family]:
        assert accepted(text, family, added) is True, text
    for text in REJECTED[family]:
        assert accepted(text, family, added) is not True, text


def test_at_most_one_call_where_calls_must_not_be_parallel():
    one, two = f"{B}{b}weather{S}{GOOD}{e}{E}", f"{B}{b}weather{S}{GOOD}{e}{b}weather{S}{GOOD}{e}{E}"
    assert accepted(f"Hello.{one}", "deepseek_v31", "added", parallel=False) is True
    assert accepted("Hello.", "deepseek_v31", "added", parallel=False) is True
    assert accepted(two, "deepseek_v31", "added", parallel=False) is not True
    assert accepted(one + one, "deepseek_v31", "added", parallel=False) is not True
    assert accepted(GLM_GOOD + GLM_GOOD, "glm", "added", parallel=False) is not True


BEGINNINGS = {
    "deepseek_v31": [f"{B}{b}weather{S}", f"{b}function{S}weather\n", f"{B}{b}weather_code{S}", f"{B}{b}"],
    "deepseek_v3": [f"{B}{b}function{S}weather"],
    "kimi_k2": [f"{KIMI.section_begin}{KIMI.call_begin}functions.weather:0{KIMI.separator}"],
    "deepseek_v32": [dsml('<D function_calls>\n<D invoke name="weather">'), '<invoke name="weather_code">'],
    "glm": ["<tool_call>weather\n", "<tool_call>weather_code\n"],
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("family", BEGINNINGS)
def test_calls_of_random_tokens_fit_their_schemas(family, added):
    """Tokens are drawn from the masks alone, shortest first so that calls end."""
    generator = random.Random(7)
    calls = 0
    for beginning in BEGINNINGS[family] * 2:
        encoder, constraint = opened(family, added, parallel=False)
        ids = encoder.encode_spelled(f"So: {beginning}")
        for token in ids:
            assert constraint.mask()[token]
            constraint.accept(token)
        parser = MessageParser(FAMILIES[family].new_format(TOOLS))
        for _ in range(400):
            allowed = constraint.mask().nonzero()[0].tolist()
            if encoder.eos_id in allowed:
                break
            printable = [token for token in allowed if encoder.token_text(token).isascii()] or allowed
            token = generator.choice(printable)
            constraint.accept(token)
            ids.append(token)
        delta = parser.push(encoder.decode(ids, visible=encoder.special_ids), last=True)
        for call in delta.tool_calls:
            if encoder.eos_id in allowed and SCHEMAS[call.name] is not None:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
                calls += 1
    assert calls


def test_schemas_that_cannot_be_enforced_are_rejected():
    for family in FAMILIES:
        tools = {"f": {"type": "object", "not": {}}}
        with pytest.raises(SoliError, match="'not' at /not, which cannot be enforced"):
            strict_calls(FAMILIES[family].new_format(tools), tools, {}, REASONING, True)
