"""The families whose calls are read, and which one a model folder belongs to.

A family is known by the delimiters in its chat template, else by the tokens of its vocabulary, else by its model_type;
DeepSeek's form is assumed for all others. `soli serve --tool-parser NAME` chooses it by name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from soli.chat.parser import CLOSE, OPEN, CallFormat
from soli.chat.parsers.delimited import DeepSeekFormat, Delimiters, KimiFormat
from soli.chat.parsers.pairs import DSML, DsmlFormat, GlmFormat
from soli.errors import SoliError

DEEPSEEK = Delimiters(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)
KIMI = Delimiters(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)

GLM_TOKENS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MODEL_TYPES = {
    "deepseek_v32": "deepseek_v32",
    "kimi_k2": "kimi_k2",
    "kimi_k25": "kimi_k2",
    "glm4_moe_lite": "glm",
    "glm_moe_dsa": "glm",
}

Tools = Mapping[str, Mapping[str, Any]]  # the schemas of the tools' arguments by name


@dataclass(frozen=True)
class Family:
    """`tokens`: names of tokens that its parser reads, beside the reasoning's; `signs`: what of its form no other
    family has, in a template or among the tokens."""

    name: str
    tokens: tuple[str, ...]
    signs: tuple[str, ...]
    new_format: Callable[[Tools], CallFormat]


def _delimited(name: str, delimiters: Delimiters, new_format: Callable[[Tools], CallFormat]) -> Family:
    return Family(name, astuple(delimiters), (delimiters.section_begin, delimiters.call_begin), new_format)


def _deepseek(name: str) -> Family:
    return _delimited(name, DEEPSEEK, lambda tools: DeepSeekFormat(DEEPSEEK, tools))


# The order in which they are looked for: DeepSeek-V3.2's vocabulary has V3.1's tokens as well. V3 and R1 write calls as
# V3.1 does but for the place of the name: one parser reads both forms.
FAMILIES = {
    family.name: family
    for family in (
        Family("deepseek_v32", (DSML,), (DSML,), DsmlFormat),
        _delimited("kimi_k2", KIMI, lambda tools: KimiFormat(KIMI, tools)),
        Family("glm", GLM_TOKENS, ("<arg_key>",), GlmFormat),
        _deepseek("deepseek_v31"),
        _deepseek("deepseek_v3"),
    )
}
ALIASES = {"deepseek_r1": "deepseek_v3", "glm45": "glm", "glm47": "glm"}
REASONING = (OPEN, CLOSE)


def family_by_name(name: str) -> Family:
    """The family that a user chose; SoliError for a name that there is not."""
    family = FAMILIES.get(ALIASES.get(name, name))
    if family is None:
        raise SoliError(f"there is no tool parser {name!r}: choose {', '.join(sorted([*FAMILIES, *ALIASES]))}")
    return family


def splits_reasoning(name: str) -> bool:
    """Whether a reasoning parser that a user chose splits reasoning off: all families write `<think>`. SoliError for a
    name that there is not."""
    names = {"auto", "none", "think", *FAMILIES, *ALIASES}
    if name not in names:
        raise SoliError(f"there is no reasoning parser {name!r}: choose {', '.join(sorted(names))}")
    return name != "none"


def detect_family(templates: Iterable[str], added_tokens: Iterable[str], model_type: str | None) -> Family:
    """The family of a folder by its templates, tokens and model_type. DeepSeek-V3.2-Exp has V3.2's vocabulary and a
    template in V3.1's form."""
    source = "\n".join(templates)
    for text in (source, "\n".join(added_tokens)):
        for family in FAMILIES.values():
            if any(sign in text for sign in family.signs):
                # V3's and R1's templates write the arguments of calls in a fence, V3.1's do not.
                return FAMILIES["deepseek_v3"] if family.name == "deepseek_v31" and "```json" in source else family
    return FAMILIES[MODEL_TYPES.get(model_type or "", "deepseek_v31")]
