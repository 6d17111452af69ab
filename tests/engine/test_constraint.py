"""Structured output: what an untrained model writes under a constraint fits it; everything else is rejected."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

import soli
from soli.data.tokenizer import Tokenizer
from soli.engine.constraint import Constraint, Constraints, ConstraintSpec, checked_schema
from soli.engine.sampler import GREEDY, SamplerState, SamplingParams, sample
from soli.errors import SoliError

TOKENIZER = Tokenizer.from_folder(Path(soli.__file__).parent / "models" / "nano")
V, EOS = 6144 + 56, 1  # a model's vocabulary may be larger than its tokenizer's
CONSTRAINTS = Constraints(TOKENIZER, V, {EOS})

SCHEMA = {
    "type": "object",
    "properties": {
        "名": {"type": "string", "enum": ["猫", "狗"]},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
        "either": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["名", "age", "tags", "either"],
    "additionalProperties": False,
}


def fits(value) -> bool:
    return (
        list(value) == ["名", "age", "tags", "either"]
        and value["名"] in ("猫", "狗")
        and 3 <= value["age"] <= 120
        and 1 <= len(value["tags"]) <= 3
        and all(isinstance(tag, str) and len(tag) <= 4 for tag in value["tags"])
        and value["either"] in (None, True, False)
    )


def written(spec: ConstraintSpec, params: SamplingParams, limit: int = 400) -> str:
    """What random logits come to under the constraint, up to its end."""
    state = SamplerState(params, [], V, CONSTRAINTS.open(spec))
    logits = torch.Generator().manual_seed(params.seed or 0)
    ids: list[int] = []
    for _ in range(limit):
        if state.finished:
            break
        [drawn] = sample(torch.randn(1, V, generator=logits) * 3, [state])
        assert not isinstance(drawn, SoliError), drawn
        if drawn.token == EOS:
            break
        state.accept(drawn.token)
        ids.append(drawn.token)
    return b"".join(map(TOKENIZER.text_bytes, ids)).decode("utf-8")  # not lossy: half a character is a failure


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 3, "min_p": 0.1}])
def test_what_is_written_fits_the_schema(seed, params):
    assert fits(json.loads(written(ConstraintSpec.json_schema(SCHEMA), SamplingParams(seed=seed, **params))))


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{4}-[0-9]{2}", "(猫|狗😀){2,5}b?", r"(?i)yes|no", "a/b\nstart: x", r"^\d{3}$"]
)
def test_what_is_written_matches_the_expression(pattern):
    for seed in range(3):
        text = written(ConstraintSpec.regex(pattern), SamplingParams(1.0, seed=seed))
        assert re.fullmatch(pattern, text), text


def test_any_json_object():
    constraint = CONSTRAINTS.open(ConstraintSpec.json_object())
    ids = TOKENIZER.encode('{"猫": [1, {"x": "😀\\n"}], "y": null}')
    for token in ids:
        assert constraint.mask()[token] and not constraint.finished
        constraint.accept(token)
    assert constraint.finished and constraint.mask().nonzero()[0].tolist() == [EOS]
    for wrong in ("[", "1", '"', "a", " ", "<|eos|>"):
        assert not CONSTRAINTS.open(ConstraintSpec.json_object()).mask()[TOKENIZER.encode(wrong)[0]]


def test_white_space_is_bounded():
    constraint = CONSTRAINTS.open(ConstraintSpec.json_object())
    for token in TOKENIZER.encode("{"):
        constraint.accept(token)
    space = TOKENIZER.encode(" ")[0]
    for _ in range(20):
        assert constraint.mask()[space]
        constraint.accept(space)
    assert not constraint.mask()[space]


@given(st.lists(st.integers(0, 2**31), max_size=25), st.data())
@settings(max_examples=30)
def test_what_is_taken_back_leaves_no_trace(choices, data):
    spec = ConstraintSpec.json_schema(SCHEMA)
    constraint, masks, ids = CONSTRAINTS.open(spec), [], []
    for choice in choices:
        masks.append(constraint.mask())
        allowed = [token for token in masks[-1].nonzero()[0] if token != EOS]
        if not allowed:
            break
        ids.append(int(allowed[choice % len(allowed)]))
        constraint.accept(ids[-1])
    back = data.draw(st.integers(0, len(ids)))
    constraint.rollback(back)
    assert back == 0 or (constraint.mask() == masks[len(ids) - back]).all()
    for token in ids[len(ids) - back :]:
        constraint.accept(token)
    fresh = CONSTRAINTS.open(spec)
    for token in ids:
        fresh.accept(token)
    assert (constraint.mask() == fresh.mask()).all()


def test_the_library_reads_tokens_as_the_stream_does():
    for token in range(TOKENIZER.vocab_size):
        own = TOKENIZER.text_bytes(token)
        assert own in (b"", b"\xff") or CONSTRAINTS._tokens.decode_bytes([token]) == own


REJECTED_SCHEMAS = [
    ({"type": "objekt"}, "objekt"),
    ({"properties": {"a": {"not": {"type": "string"}}}}, "'not' at /properties/a/not"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "string", "nullable": True}, "nullable"),
    ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
    ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance"),
    ({"type": "array", "items": [{"type": "integer"}]}, "at /items"),
    ({"type": "integer", "exclusiveMinimum": True}, "at /exclusiveMinimum"),
    ({"properties": [1]}, "at /properties"),
    ({"if": {"type": "string"}, "then": {"maxLength": 1}}, "'if'"),
    ({"type": "string", "pattern": "(?=a)b"}, "look"),
    ({"type": "string", "format": "nonsense"}, "nonsense"),
    ({"$ref": "http://example.org/schema"}, "not present"),
    ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"$ref": "#"}, "cannot be met"),
    (False, "false at its root"),
    ("{", "not JSON"),
    ('{"minimum": NaN}', "not JSON"),
    ("[1]", "[1] at its root"),
    ("[" * 100_000, "not JSON"),
    ({"description": "x" * 70_000}, "65,536"),
]


@pytest.mark.parametrize(("schema", "message"), REJECTED_SCHEMAS, ids=[message for _, message in REJECTED_SCHEMAS])
def test_schemas_that_cannot_be_enforced_are_rejected(schema, message):
    with pytest.raises(SoliError, match=re.escape(message)) as rejection:
        CONSTRAINTS.open(ConstraintSpec.json_schema(schema))
    assert "\n" not in str(rejection.value) and len(str(rejection.value)) < 400


def test_depth_is_bounded_and_descriptions_are_not_schemas():
    schema: dict = {"type": "integer"}
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SoliError, match="48 deep"):
        ConstraintSpec.json_schema(schema)
    described = {
        "title": "not",
        "default": {"not": 1},
        "examples": [{"if": 1}],
        "x-order": 3,
        "enum": [{"nullable": 1}],
    }
    assert json.loads(checked_schema(described)) == described
    assert json.loads(checked_schema({"properties": {"not": True}})) == {"properties": {"not": True}}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a|b", "unclosed group"),
        ("a(?=b)", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"[^\s\S]", "cannot be met"),
        (r"a[^\s\S]", "cannot be met"),
        ("", "0 characters"),
    ],
)
def test_expressions_that_cannot_be_enforced_are_rejected(pattern, message):
    with pytest.raises(SoliError, match=message):
        CONSTRAINTS.open(ConstraintSpec.regex(pattern))


def test_a_dead_end_is_an_error_of_its_request_alone():
    class NothingAllowed:
        def compute_bitmask(self) -> bytes:
            return bytes(V // 8)

        def is_error(self) -> bool:
            return False

    stuck, free = SamplerState(GREEDY, [], V, Constraint(NothingAllowed(), V)), SamplerState(GREEDY, [], V)
    dead, good = sample(torch.eye(2, V), [stuck, free])
    assert isinstance(dead, SoliError) and "no token of the vocabulary" in str(dead)
    assert not isinstance(good, SoliError) and good.token == 1


def test_errors_on_the_way_are_errors_not_the_end_of_the_text():
    bomb = CONSTRAINTS.open(ConstraintSpec.regex("a{200000}b{3,90000}"))
    with pytest.raises(SoliError, match="too many expressions"):
        for _ in range(40):
            bomb.accept(int(bomb.mask().nonzero()[0][0]))
    assert not bomb.finished
    excluded = CONSTRAINTS.open(ConstraintSpec.regex("ab"))
    with pytest.raises(SoliError, match="cannot be met"):
        excluded.accept(TOKENIZER.encode("猫")[0])
    with pytest.raises(SoliError, match="cannot be met"):
        excluded.mask()


def test_a_vocabulary_that_cannot_write_it_is_a_dead_end():
    backend = tokenizers.Tokenizer(models.BPE({"<|eos|>": 0, "a": 1, "b": 2}, []))
    backend.add_special_tokens(["<|eos|>"])
    backend.decoder = decoders.ByteLevel()
    constraints = Constraints(Tokenizer(backend), 3, {0})
    assert constraints.open(ConstraintSpec.regex("[ac]")).mask().tolist() == [False, True, False]
    with pytest.raises(SoliError, match="cannot be met"):
        constraints.open(ConstraintSpec.regex("c"))


def test_models_and_tokenizers_that_cannot_be_constrained_are_rejected():
    with pytest.raises(SoliError, match="eos_token_id"):
        Constraints(TOKENIZER, V, ())
    with pytest.raises(SoliError, match="byte-level"):
        Constraints(Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))), 2, {1})


def test_penalties_and_bias_do_not_lift_the_mask():
    token = TOKENIZER.encode("猫")[0]
    params = SamplingParams(1.0, seed=0, logit_bias={token: 100}, repetition_penalty=0.5)
    state = SamplerState(params, [token], V, CONSTRAINTS.open(ConstraintSpec.regex("[0-9]")))
    processed_V = state.process(np.ones(V, np.float32))
    assert processed_V[token] == -np.inf and np.isfinite(processed_V).sum() == 10
