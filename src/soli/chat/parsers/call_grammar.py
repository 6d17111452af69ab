"""Grammars for answers with strict tools: text is free up to where a call begins, and from there the call must be one
of the request's tools, with arguments that fit its schema where it is strict.

The grammars are llguidance's Lark. Whatever the family's parser reads as the beginning of a call begins one here, so
that no call escapes; delimiters may be tokens or spelled out. Families that write pairs write pairs here too where each
value can be enforced on its own, and else (patterns, lengths, references) JSON, which their parsers read as well.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from soli.chat.parser import CallFormat
from soli.chat.parsers.delimited import DelimitedFormat, Delimiters, KimiFormat
from soli.chat.parsers.pairs import DSML, DSML_FORM, DsmlFormat, GlmFormat
from soli.engine.constraint import WHITE_SPACE, ConstraintSpec, checked_schema

SPACES = r"[ \t\r\n]*"
HEADER = f"%llguidance {{}}\nTEXT: /(?s:.*)/\nSPACE: /{SPACES}/\n"

PAIR_KEYWORDS = {"type", "properties", "required", "additionalProperties", "title", "description", "$schema"}

Schemas = Mapping[str, Mapping[str, Any] | None]  # by tool; None where arguments are not checked


def strict_calls(
    format_: CallFormat,
    tools: Schemas,
    token_ids: Mapping[str, int],
    reasoning: Sequence[str],
    parallel: bool = True,
    content: Mapping[str, Any] | None = None,
) -> ConstraintSpec:
    """The constraint of an answer. `token_ids`: of the delimiters that are tokens; `reasoning`: those of the reasoning;
    `parallel` False: at most one call, which ends the answer; `content`: the schema of an answer without calls, which
    has no reasoning either. SoliError for a schema that cannot be enforced."""
    rules = _Rules(token_ids)
    if isinstance(format_, DelimitedFormat):
        openings = _delimited(rules, format_.delimiters, isinstance(format_, KimiFormat), tools, parallel)
    elif isinstance(format_, DsmlFormat):
        openings = _dsml(rules, tools, parallel)
    else:
        assert isinstance(format_, GlmFormat)
        openings = _glm(rules, tools)
    before = "(?s:.*)" if content is None else SPACES
    calls = [f"{rule} {body}" for opening, body in openings for rule in rules.up_to(opening, before)]
    thoughts = [f"TEXT <[{token_ids[name]}]>" for name in reasoning if name in token_ids]
    rules.add("call", " | ".join(calls))
    if content is not None:
        start = f"SPACE {rules.json(content)} SPACE | call{' (call)* SPACE' * parallel}"
        return ConstraintSpec.grammar(f"{HEADER}start: {start}\n{rules.text}")
    if thoughts:
        rules.add("thought", " | ".join(thoughts))
    free = " | ".join(["thought"] * bool(thoughts) + ["call"] * parallel)
    start = f"({free})* " if free else ""
    start += "TEXT" if parallel else "(TEXT | call)"
    return ConstraintSpec.grammar(f"{HEADER}start: {start}\n{rules.text}")


class _Rules:
    """The rules of a grammar."""

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._token_ids = token_ids
        self._count = 0
        self.text = ""

    def add(self, name: str, body: str) -> str:
        self.text += f"{name}: {body}\n"
        return name.partition("[")[0]

    def new(self, body: str, option: str = "") -> str:
        """A rule with a name of its own."""
        self._count += 1
        return self.add(f"r{self._count}{option}", body)

    def literal(self, text: str) -> str:
        """A delimiter, with the token in it if there is one, or spelled out; or any other text."""
        before, token, after = self._parts(text)
        if token is None:
            return quoted(text)
        return f"({self._sequence(before, token, after)} | {quoted(text)})"

    def up_to(self, end: str, text: str = "(?s:.*)") -> list[str]:
        """Rules of a text, by its regular expression, and the first `end` behind it."""
        rules = [self.new(f"/{text}/ {quoted(end)}", "[lazy]")]
        before, token, after = self._parts(end)
        if token is not None:
            rules.append(self.new(f"/{text}{before.replace('/', chr(92) + '/')}/ {self._sequence('', token, after)}"))
        return rules

    def unchecked(self, first: str, end: str) -> str:
        """Any text up to `end`, which is a token or spelled out, other tokens included; `first`: a regular expression
        of its beginning."""
        tokens = ",".join(str(index) for name, index in self._token_ids.items() if name != end)
        ways = [self.literal(end), *self.up_to(end, f"{first}(?s:.*)")]
        if tokens:
            token = f"<[{tokens}]>"
            ways.append(f"/({first}(?s:.*))?/ {token} (TEXT {token})* ({' | '.join(self.up_to(end))})")
        return self.new(" | ".join(ways))

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that fits a schema."""
        checked = json.loads(checked_schema(schema)) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        return self.new(f"%json {json.dumps(checked, ensure_ascii=False)}")

    def _parts(self, text: str) -> tuple[str, int | None, str]:
        for name, index in self._token_ids.items():
            if name in text:
                before, _, after = text.partition(name)
                return before, index, after
        return text, None, ""

    def _sequence(self, before: str, token: int, after: str) -> str:
        return " ".join([quoted(before)] * bool(before) + [f"<[{token}]>"] + [quoted(after)] * bool(after))


def quoted(text: str) -> str:
    """A text as a string of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def _delimited(
    rules: _Rules, delimiters: Delimiters, is_kimi: bool, tools: Schemas, parallel: bool
) -> list[tuple[str, str]]:
    separator, end = rules.literal(delimiters.separator), rules.literal(delimiters.call_end)
    bodies: list[str] = []
    for name, schema in tools.items():
        tool = quoted(name)
        head = f'"functions."? {tool} (":" /[0-9]+/)? {separator}' if is_kimi else f"{tool} {separator}"
        if schema is None:
            arguments = rules.unchecked("", delimiters.call_end)
            in_fence = rules.unchecked("[^A-Za-z0-9_.:-]", delimiters.call_end)
        else:
            checked = rules.json(schema)
            arguments = f"SPACE {checked} SPACE {end}"
            in_fence = f'"\\n```json\\n" {checked} SPACE "```" SPACE {end}'
        bodies.append(f"{head} {arguments}")
        if not is_kimi:  # V3's and R1's form
            bodies.append(f'"function" {separator} {tool} {in_fence}')
    body = rules.new(" | ".join(bodies))
    begin = rules.literal(delimiters.call_begin)
    more = f"(SPACE {begin} {body})* " if parallel else ""
    section = rules.new(f"SPACE {begin} {body} {more}SPACE {rules.literal(delimiters.section_end)}")
    return [(delimiters.section_begin, section), (delimiters.call_begin, body)]


def _dsml(rules: _Rules, tools: Schemas, parallel: bool) -> list[tuple[str, str]]:
    def tag(name: str, start: str = "<") -> str:
        return f"({quoted(start)} {mark}? {quoted(name)})"

    mark = rules.literal(DSML)
    value_end = tag("parameter>", "</")
    values = " | ".join(rule for end in DSML_FORM.value_ends for rule in rules.up_to(end))
    text = rules.new(values)

    def pair(key: str, value: str, is_string: bool) -> str:
        head = f'name={quoted(key)} string="{"true" if is_string else "false"}">'
        return f"{tag('parameter')} {quoted(' ' + head)} {value if is_string else f'{value} SPACE {value_end}'}"

    def choice(value: str) -> str:
        return f"{quoted(value)} {value_end}"

    any_pair = f'{tag("parameter")} / name="[^"<>]*" string="(true|false)">/ {text}'
    bodies = []
    for name, schema in tools.items():
        arguments = f"(SPACE {any_pair})*" if schema is None else _pairs(rules, schema, pair, text, choice)
        bodies.append(f"{quoted(f' name={quoted(name)}>')} {arguments} SPACE {tag('invoke>', '</')}")
    body = rules.new(" | ".join(bodies))
    more = f"(SPACE {tag('invoke')} {body})* " if parallel else ""
    sections = [
        (opening, rules.new(f"SPACE {tag('invoke')} {body} {more}SPACE {tag(opening[1:].replace(DSML, ''), '</')}"))
        for opening in DsmlFormat.section_begins
    ]
    return [*sections, *((opening, body) for opening in DsmlFormat.call_begins)]


def _glm(rules: _Rules, tools: Schemas) -> list[tuple[str, str]]:
    def pair(key: str, value: str, is_string: bool) -> str:
        head = f"{rules.literal('<arg_key>')} {quoted(key)} {rules.literal('</arg_key>')} SPACE"
        end = "" if is_string else f"SPACE {rules.literal('</arg_value>')}"
        return f"{head} {rules.literal('<arg_value>')} {value} {end}"

    [begin] = GlmFormat.openings
    text = rules.new(" | ".join(rules.up_to("</arg_value>")))
    bodies = []
    for name, schema in tools.items():
        if schema is None:
            arguments = rules.unchecked("[^A-Za-z0-9_.-]", "</tool_call>")
        else:
            pairs = _pairs(rules, schema, pair, text, lambda value: f"{quoted(value)} {rules.literal('</arg_value>')}")
            arguments = f"{pairs} SPACE {rules.literal('</tool_call>')}"
        bodies.append(f"SPACE {quoted(name)} {arguments}")
    return [(begin, rules.new(" | ".join(bodies)))]


def _pairs(
    rules: _Rules,
    schema: Mapping[str, Any],
    pair: Callable[[str, str, bool], str],
    text: str,
    choice: Callable[[str], str],
) -> str:
    """Arguments as pairs in the schema's order, where each value can be enforced on its own, else as JSON."""
    checked_schema(schema)
    properties = schema.get("properties", {})
    if schema.keys() - PAIR_KEYWORDS or not all(map(_is_simple, properties.items())):
        return f"SPACE {rules.json(schema)}"
    arguments = ""
    for key, value in properties.items():
        is_string = isinstance(value, Mapping) and value.get("type") == "string"
        if not is_string:
            rule = rules.json(value) if isinstance(value, Mapping) else rules.json({})
        else:
            rule = rules.new(" | ".join(map(choice, value["enum"]))) if "enum" in value else text
        optional = "" if key in schema.get("required", ()) else "?"
        arguments += f" (SPACE {pair(key, rule, is_string)}){optional}"
    return arguments


def _is_simple(entry: tuple[str, Any]) -> bool:
    """Whether a property can be a pair: a text of any form or of a few, or JSON without references."""
    key, schema = entry
    if not isinstance(schema, Mapping) or not re.fullmatch(r"[^\"<>\s]+", key):
        return False
    if schema.get("type") == "string":
        return not schema.keys() - {"type", "description", "title", "default", "enum"}
    return "$ref" not in json.dumps(schema)
