"""Structured output: which tokens may come next so that the text fits a JSON schema, a regular expression, or JSON.

The grammars and the masks are llguidance's. Everything fails closed: a schema or expression that is invalid, not wholly
supported or satisfied by nothing is refused before a token is drawn, and a dead end on the way is an error, never free
text. (llguidance's own mask allows the end of text in its error state, so that state is looked for every time.)

Shapes: V vocabulary of the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from soli.engine.json_schema import LONGEST, checked_schema
from soli.errors import SoliError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from soli.data.tokenizer import Tokenizer
    from soli.engine.text_model import TextModel

COMPILED_KEPT = 64
# A fifth of llguidance's own limits: a hostile expression costs 0.2 s and 100 MB at most, not a second and 500 MB.
LIMITS = {"initial_lexer_fuel": 200_000, "max_lexer_states": 50_000}
# Between the parts of JSON: enough for indentation, not so much that a model can write white space to the end.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"


@dataclass(frozen=True)
class ConstraintSpec:
    """What a text must be. Refuses with a SoliError what can be seen to be wrong without a tokenizer."""

    kind: Literal["json_schema", "regex"]
    text: str

    def __post_init__(self) -> None:
        if self.kind == "json_schema":
            object.__setattr__(self, "text", checked_schema(self.text))
        elif not 0 < len(self.text) <= LONGEST:
            raise SoliError(f"the regular expression has {len(self.text):,} characters: give 1 to {LONGEST:,}")

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


class Constraint:
    """The constraint of one request, at the end of the tokens it has accepted."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but its end can follow."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens (V) may come next, the end among them where the text may end; SoliError at a dead end."""
        bits = self._matcher.compute_bitmask()
        self._refuse_errors()
        allowed_V = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little", count=self._vocab).view(np.bool_)
        if not allowed_V.any():
            raise SoliError("no token of the vocabulary can go on to what the constraint asks for: loosen it")
        return allowed_V

    def accept(self, token: int) -> None:
        """The text goes on with this token; SoliError for one that the mask excludes, or past what can be computed."""
        self._matcher.consume_token(token)
        self._refuse_errors()

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` accepted."""
        if tokens:
            self._matcher.rollback(tokens)
            self._refuse_errors()

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            raise SoliError(f"the constraint cannot be met ({_reason(self._matcher.get_error())}): simplify it")


class Constraints:
    """Opens constraints over one tokenizer; keeps the last compiled ones. May be called from several threads.

    `stop_ids` end a text. Refuses a model without any, and tokenizers that llguidance cannot read.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, stop_ids: Collection[int]) -> None:
        import llguidance  # only once a request constrains its answer

        self._llguidance: Any = llguidance
        ends = sorted(token for token in stop_ids if token < tokenizer.vocab_size)
        if not ends:
            raise SoliError("structured output needs a model that ends its texts: give config.json an eos_token_id")
        try:
            self._tokens = self._llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab, eos_token=ends)
        except Exception as error:  # the Rust side raises what it likes
            raise SoliError(
                f"this tokenizer cannot be constrained ({_reason(str(error))}): structured output needs byte-level BPE"
            ) from error
        self._vocab = vocab
        self._compiled: OrderedDict[ConstraintSpec, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, text_model: TextModel) -> Constraints:
        """Those of a model that reads and writes text."""
        return cls(text_model.tokenizer, text_model.model.config.vocab_size, text_model.stop_ids)

    def open(self, spec: ConstraintSpec) -> Constraint:
        """A constraint at its beginning; SoliError when the grammar is invalid or no text can satisfy it."""
        with self._lock:
            matcher = self._compiled.get(spec)
            if matcher is None:
                self._compiled[spec] = matcher = self._compile(spec)
                if len(self._compiled) > COMPILED_KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(spec)
            return Constraint(matcher.deep_copy(), self._vocab)

    def _compile(self, spec: ConstraintSpec) -> LLMatcher:
        grammar_from = self._llguidance.LLMatcher
        if spec.kind == "regex":
            grammar, name = grammar_from.grammar_from_regex(spec.text), "regular expression"
        else:
            overrides = {"whitespace_pattern": WHITE_SPACE}
            grammar, name = grammar_from.grammar_from_json_schema(spec.text, overrides=overrides), "JSON schema"
        limits = self._llguidance.LLParserLimits(**LIMITS)
        matcher = self._llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise SoliError(f"the {name} is not supported ({_reason(matcher.get_error())}): change it")
        Constraint(matcher, self._vocab).mask()  # what nothing can satisfy shows here
        return matcher


def _reason(message: str) -> str:
    """The one line of llguidance's message that says why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    why = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "".join(lines[:1]))
    return why[:200].rstrip(".:")
