"""Structured output: which tokens may come next so that the text fits a JSON schema, a regular expression, or JSON.

The grammars and the masks are llguidance's. Everything fails closed: a schema or expression that is invalid, not wholly
supported or unsatisfiable is rejected before a token is sampled, and a dead end later is an error, never free text.
(llguidance's own mask allows the end of text in its error state, so that state is checked every time.)

Every keyword of a JSON schema must be one that llguidance enforces, or one that only describes. llguidance itself
rejects keywords of the current standard that it does not implement; `checked_schema` comes first and also rejects those
of older drafts and dialects (`nullable`, `additionalItems`), which it would ignore silently, its own switch for
leniency (`x-guidance`), and schemas of a size or depth that nobody writes by hand.

Shapes: V vocabulary of the model.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from soli.errors import SoliError, library_errors
from soli.input_files import parse_json

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from soli.data.tokenizer import Tokenizer

MAX_COMPILED = 64
# A fifth of llguidance's own limits: a hostile expression costs 0.2 s and 100 MB at most, not a second and 500 MB.
PARSER_LIMITS = {"initial_lexer_fuel": 200_000, "max_lexer_states": 50_000}
# Between the parts of JSON: enough for indentation, not so much that a model can write white space to the end.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"

# Of a JSON schema: limits, and the keywords that are enforced or only describe.
MAX_CHARACTERS = 65_536  # characters
MAX_DEPTH = 48  # schemas inside schemas
SCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
SCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
SCHEMA_VALUES = {"items", "additionalProperties"}
NUMBER_VALUES = {
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
OTHER_ENFORCED = {"type", "const", "enum", "$ref", "required", "pattern", "format"}
ANNOTATIONS = {
    "$schema", "$id", "$comment", "title", "description", "default", "examples",
    "readOnly", "writeOnly", "deprecated",
}  # fmt: skip


@dataclass(frozen=True)
class ConstraintSpec:
    """What a text must be. SoliError for what is wrong with any tokenizer."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str

    def __post_init__(self) -> None:
        if self.kind == "json_schema":
            object.__setattr__(self, "text", checked_schema(self.text))
        elif self.kind == "regex" and not 0 < len(self.text) <= MAX_CHARACTERS:
            raise SoliError(f"the regular expression has {len(self.text):,} characters: give 1 to {MAX_CHARACTERS:,}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> ConstraintSpec:
        """JSON that fits a schema, given as an object or as JSON text."""
        return cls("json_schema", schema if isinstance(schema, str) else checked_schema(schema))

    @classmethod
    def json_object(cls) -> ConstraintSpec:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> ConstraintSpec:
        """A text that matches from its beginning to its end; Rust's syntax, no look-around, no back-references."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, lark: str) -> ConstraintSpec:
        """A text of llguidance's Lark, of this package's own making: nothing in it is checked here."""
        return cls("grammar", lark)


class ConstraintUnmet(SoliError):
    """A constraint that the text so far, the vocabulary or the limits of the matcher leave no way to meet."""


class Constraint:
    """The constraint of one request, in its state after the accepted tokens."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens (V) may come next, the end among them where the text may end; SoliError at a dead end."""
        with library_errors(_unmet):
            bits = self._matcher.compute_bitmask()
        self._raise_error()
        allowed_V = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little", count=self._vocab).view(np.bool_)
        if not allowed_V.any():
            raise ConstraintUnmet("no token of the vocabulary continues the text as the constraint requires: loosen it")
        return allowed_V

    def accept(self, token: int) -> None:
        """Appends a token; SoliError for one that the mask excludes, or when the limits of the matcher are exceeded."""
        with library_errors(_unmet):
            self._matcher.consume_token(token)
        self._raise_error()

    def rollback(self, tokens: int) -> None:
        """Removes the last `tokens` accepted tokens."""
        if tokens:
            self._matcher.rollback(tokens)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise _unmet(self._matcher.get_error())


class Constraints:
    """Opens constraints over one tokenizer and caches compiled ones. May be called from several threads.

    `stop_ids` end a text. Rejects a model without any, and tokenizers that llguidance cannot read.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, stop_ids: Collection[int]) -> None:
        import llguidance  # only once a request constrains its answer

        self._llguidance: Any = llguidance
        end_ids = sorted(token for token in stop_ids if token < tokenizer.vocab_size)
        if not end_ids:
            raise SoliError("structured output needs a model that ends its texts: give config.json an eos_token_id")
        with library_errors(_no_constraints):
            self._tokens = self._llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab, eos_token=end_ids)
        self._vocab = vocab
        self._compiled: OrderedDict[ConstraintSpec, LLMatcher] = OrderedDict()  # the last MAX_COMPILED
        self._lock = threading.Lock()  # of _compiled, held for no longer than a copy takes

    def open(self, spec: ConstraintSpec) -> Constraint:
        """A constraint before the first token; SoliError when the grammar is invalid or no text can satisfy it."""
        with self._lock:
            matcher = self._compiled.get(spec)
            if matcher is not None:
                self._compiled.move_to_end(spec)
                return Constraint(matcher.deep_copy(), self._vocab)
        matcher = self._compile(spec)
        with self._lock:
            self._compiled[spec] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Constraint(matcher.deep_copy(), self._vocab)

    def _compile(self, spec: ConstraintSpec) -> LLMatcher:
        with library_errors(_no_grammar):
            return self._checked_matcher(spec)

    def _checked_matcher(self, spec: ConstraintSpec) -> LLMatcher:
        matcher_class = self._llguidance.LLMatcher
        if spec.kind == "regex":
            grammar, name = matcher_class.grammar_from_regex(spec.text), "regular expression"
        elif spec.kind == "grammar":
            grammar, name = matcher_class.grammar_from_lark(spec.text), "schema of a strict tool"
        else:
            overrides = {"whitespace_pattern": WHITE_SPACE}
            grammar, name = matcher_class.grammar_from_json_schema(spec.text, overrides=overrides), "JSON schema"
        limits = self._llguidance.LLParserLimits(**PARSER_LIMITS)
        matcher = matcher_class(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise SoliError(f"the {name} is not supported ({_reason(matcher.get_error())}): change it")
        Constraint(matcher, self._vocab).mask()  # raises for a constraint that nothing satisfies
        return matcher


def _no_constraints(message: str) -> SoliError:
    reason = _reason(message)
    return SoliError(f"this tokenizer cannot be constrained ({reason}): structured output needs byte-level BPE")


def _no_grammar(message: str) -> SoliError:
    return SoliError(f"the constraint cannot be compiled ({_reason(message)}): simplify it")


def _unmet(message: str) -> SoliError:
    return ConstraintUnmet(f"the constraint cannot be met ({_reason(message)}): simplify it")


def _reason(message: str) -> str:
    """The one line of llguidance's message that says why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    why = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "".join(lines[:1]))
    return why[:200].rstrip(".:")


def checked_schema(schema: Mapping[str, Any] | str) -> str:
    """The schema, an object or its JSON, as JSON; a SoliError names the keyword that cannot be enforced and where."""
    try:
        source = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False, allow_nan=False)
        parsed = parse_json(source, "it")
        text = json.dumps(parsed, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError, SoliError) as error:
        raise SoliError(f"the JSON schema is not JSON ({error}): give a JSON object") from None
    if len(text) > MAX_CHARACTERS:
        raise SoliError(f"the JSON schema has {len(text):,} characters: the limit is {MAX_CHARACTERS:,}")
    _check_schema(parsed, "", 0)
    return text


def _check_schema(schema: Any, where: str, depth: int) -> None:
    if isinstance(schema, bool) and depth:
        return
    if not isinstance(schema, Mapping):
        raise SoliError(f"the JSON schema has {_short(schema)} at {where or 'its root'}: give an object there")
    if depth > MAX_DEPTH:
        raise SoliError(f"the JSON schema is nested more than {MAX_DEPTH} deep: use $defs and $ref")
    for key, value in schema.items():
        place = f"{where}/{key}"
        if key in SCHEMA_MAPS and isinstance(value, Mapping):
            for name, entry in value.items():
                _check_schema(entry, f"{place}/{name}", depth + 1)
        elif key in SCHEMA_LISTS and isinstance(value, list):
            for number, entry in enumerate(value):
                _check_schema(entry, f"{place}/{number}", depth + 1)
        elif key in SCHEMA_VALUES:
            _check_schema(value, place, depth + 1)
        elif key in SCHEMA_MAPS | SCHEMA_LISTS or (
            key in NUMBER_VALUES and (isinstance(value, bool) or not isinstance(value, int | float))
        ):
            raise SoliError(f"the JSON schema has {_short(value)} at {place}, which is invalid: correct it")
        elif key not in NUMBER_VALUES | OTHER_ENFORCED | ANNOTATIONS and (
            not key.startswith("x-") or key == "x-guidance"
        ):
            raise SoliError(f"the JSON schema uses {key!r} at {place}, which cannot be enforced: leave it out")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
