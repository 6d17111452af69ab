"""A model shared by several ranks answers as in one process: every family, every feature of the engine."""

import copy
import gc
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soli.checkpoint import open_checkpoint, save_model
from soli.config import ModelConfig
from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.latent_cache import LatentCache
from soli.engine.offline import answer_all
from soli.engine.request import Answer, EngineLimits, Request
from soli.engine.sampler import SamplingParams
from soli.engine.text_model import text_model
from soli.errors import SoliError
from soli.formats.quantized import CODECS, QuantizedWeight
from soli.model.transformer import Transformer
from soli.parallel import calls
from soli.parallel.calls import Call, Leader
from soli.parallel.inference import PartSettings, join_group, load_part
from soli.parallel.model_part import ModelPart
from soli.parallel.ranks import Ranks, launched_ranks
from soli.parallel.tensor_parallel import Sums
from tests.distributed.ranks import run_ranks
from tests.distributed.shared_models import (
    CPU,
    LARGE,
    LIMITS,
    Case,
    each,
    limited,
    load_limited,
    logits_of_one_process,
    logits_of_ranks,
    of_one_process,
    of_ranks,
)
from tests.engine.tiny import BASE, FAMILY_KINDS, KINDS, tiny_model, tiny_tokenizer

QUICK = ["v3", "v2 by groups", "v3.2", "v3 without q_lora or groups", "a norm after the mixture", "youtu"]
LOGPROB = 1e-4  # sums in another order, in float32, of logits around 10
POSITIONS = 96
WORDS = [
    "the a old young house river tree of in under and he she they walk sees took was not my friend book small day",
    "我 你 他 今天 明天 天气 很好 朋友 在 河 旁边 的 房子 书 不 是 去 来 小 大 水 每天",
]


def folder_of(kind: str, folder: Path, format: str = "fp32", **changes: int) -> str:
    path = folder / f"{kind} {format} {changes}".replace("/", "-")
    if not path.exists():
        model = tiny_model(kind, vocab_size=330, max_position_embeddings=POSITIONS, **changes)
        for name, bias in model.named_parameters():
            if name.endswith("proj.bias") or name.endswith("mqa.bias"):
                bias.data.normal_(generator=torch.Generator().manual_seed(3))
        save_model(model, path, format=format)
    return str(path)


def prompts(count: int, longest: int = 40) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [tuple(torch.randint(3, 330, (length,), generator=draw).tolist()) for length in lengths]


def requests(count: int, **options: object) -> list[Request]:
    return [Request(prompt, 12, logprobs=2, **options) for prompt in prompts(count)]


def assert_same(shared: list[Answer], alone: list[Answer], tolerance: float = LOGPROB) -> None:
    assert [answer.ids for answer in shared] == [answer.ids for answer in alone]
    assert [answer.text for answer in shared] == [answer.text for answer in alone]
    for mine, other in zip(shared, alone, strict=True):
        ours = [entry.logprob for entry in (*mine.logprobs, *(mine.prompt_logprobs or ()))]
        theirs = [entry.logprob for entry in (*other.logprobs, *(other.prompt_logprobs or ()))]
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, and what the tests save."""
    path = tmp_path_factory.mktemp("models")
    tiny_tokenizer().save(path)
    return path


def test_two_ranks_answer_as_one_process_in_several_families(tmp_path, folder):
    folders = [*(folder_of(kind, folder) for kind in QUICK), folder_of("v3", folder, attention_bias=True)]
    cases = [Case(path, str(folder), requests(10)) for path in folders]
    shared, nothing = run_ranks(of_ranks, 2, tmp_path, cases)
    assert nothing == []
    assert len({answer.ids for answered in shared for answer in answered}) > 50
    for case, answered in zip(cases, shared, strict=True):
        assert_same(answered, of_one_process(case))


@pytest.mark.slow
def test_four_ranks_answer_as_one_process_with_every_feature(tmp_path, folder):
    model = folder_of("v3", folder, num_attention_heads=4)
    sampled = SamplingParams(temperature=1.0, top_k=20, seed=5)
    masked = frozenset({(1, 0), (1, 5), (2, 7)})
    cases = [
        Case(model, str(folder), requests(6, trace=True, prompt_logprobs=1, masked_experts=masked)),
        Case(model, str(folder), requests(6, sampling=sampled), replace(LIMITS, speculate=True)),
        Case(model, str(folder), 2 * requests(4)),  # the second time from the prefix cache
    ]
    shared, *_ = run_ranks(of_ranks, 4, tmp_path, cases)
    for case, answered in zip(cases, shared, strict=True):
        alone = of_one_process(case)
        assert_same(answered, alone)
        assert [answer.usage for answer in answered] == [answer.usage for answer in alone]
    assert sum(answer.usage.accepted for answer in shared[1]) > 0
    assert sum(answer.usage.cached for answer in shared[2]) > 0
    for mine, other in zip(shared[0], of_one_process(cases[0]), strict=True):
        for ours, theirs in zip(mine.routing, other.routing, strict=True):
            assert torch.equal(ours.expert_ids_TK, theirs.expert_ids_TK)


def sums(numbers: int) -> list[torch.Tensor]:
    ranks = launched_ranks()
    join_group(ranks, CPU)
    partial = torch.randn(3, numbers, generator=torch.Generator().manual_seed(ranks.rank))
    gathered, scattered = Sums(ranks.world, scattered_from=2**30), Sums(ranks.world, scattered_from=0)
    kinds = (partial, partial.bfloat16())
    return [each_sums.total(kind) for kind in kinds for each_sums in (gathered, scattered)]


def test_a_sum_has_the_same_bits_on_all_ranks_however_it_is_taken(tmp_path):
    results = run_ranks(sums, 4, tmp_path, 333)
    expected = sum(torch.randn(3, 333, generator=torch.Generator().manual_seed(rank)) for rank in range(4))
    for float_gathered, float_scattered, gathered, scattered in results:
        assert torch.equal(float_gathered, expected) and torch.equal(float_scattered, expected)
        assert torch.equal(gathered, scattered) and torch.equal(gathered, results[0][2])
        assert torch.allclose(gathered.float(), expected, atol=0.05)


def changed(model: Transformer, case: Case, leader: Leader) -> list[str]:
    """The errors of what one rank cannot do alone."""
    shared = replace(text_model(model, Tokenizer.from_folder(Path(case.tokenizer))), leader=leader)
    engine = Engine(shared, case.limits)
    model.layers[0].mlp.register_forward_hook(lambda *values: None)
    errors = []
    for compute in (lambda: [*answer_all(engine, case.requests)], lambda: Engine(shared, case.limits, runner="fused")):
        with pytest.raises(SoliError) as caught:
            compute()
        errors.append(str(caught.value))
    return errors


def test_a_model_that_is_changed_on_one_rank_is_refused(tmp_path, folder):
    case = Case(folder_of("v3", folder), str(folder), requests(2))
    [[hooked, fused]], _ = run_ranks(each, 2, tmp_path, [case], changed)
    assert hooked == "the model was changed on one of the 2 ranks that share it: load it again"
    assert fused.startswith("the fused runner cannot be had: 2 ranks share it")


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*KINDS, *FAMILY_KINDS}))
def test_every_family_is_shared(tmp_path, folder, kind):
    has_mtp = tiny_model(kind).config.num_nextn_predict_layers > 0
    limits = replace(LIMITS, speculate=has_mtp, prefix_sharing=False)
    cases = [Case(folder_of(kind, folder), str(folder), requests(20), limits)]
    shared, _ = run_ranks(of_ranks, 2, tmp_path, cases)
    for case, answered in zip(cases, shared, strict=True):
        assert_same(answered, of_one_process(case))


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({}, 3, "3 processes cannot share this model: num_attention_heads is 2 and n_routed_experts is 16, .* use 2"),
        ({"n_routed_experts": 12}, 8, "num_attention_heads is 2 and n_routed_experts is 12, .* use 2"),
        ({"num_attention_heads": 12}, 3, "this model: n_routed_experts is 16, .* use 2 or 4"),
        ({"intermediate_size": 1}, 2, "2 processes cannot share this model: intermediate_size is 1; use fewer"),
        ({"num_attention_heads": 3}, 2, "num_attention_heads is 3, .* use 1"),
    ],
)
def test_heads_and_experts_that_cannot_be_shared_are_refused_by_name(changes, world, words):
    config = ModelConfig.from_dict(BASE | changes)
    with pytest.raises(SoliError, match=words):
        ModelPart(config, 0, world)


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("size", [6144, 768, 128, 97])
def test_widths_are_shared_without_gap_or_overlap(size, in_blocks):
    config = ModelConfig.from_dict(BASE | {"num_attention_heads": 4})
    parts = [ModelPart(config, rank, 4, in_blocks).rows(size) for rank in range(4)]
    assert [row for part in parts for row in part] == [*range(size)]
    assert min(map(len, parts)) > 0


@pytest.mark.parametrize("format", ["fp8", "int8", "int4", "bf16"])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_part_of_a_quantized_weight_has_the_same_values(format, dimension):
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    whole = CODECS[format].quantize(weight)
    part = whole.part(dimension, 128, 256)
    assert torch.equal(part.dequantize(), whole.dequantize().narrow(dimension, 128, 128))


def test_parts_that_are_no_whole_blocks_are_refused_with_what_fits(folder):
    sizes = {"num_attention_heads": 4, "v_head_dim": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}
    four_heads = folder_of("v3", folder, "fp8", **BLOCKS | sizes)
    settings = PartSettings(quantized=True)
    with pytest.raises(SoliError, match=r"no whole number of fp8 blocks of 128; 4 processes cannot share .* use 2 pro"):
        load_part(four_heads, Ranks(0, 4, 0, 4), CPU, settings)
    load_part(four_heads, Ranks(1, 2, 1, 2), CPU, settings)
    load_part(four_heads, Ranks(1, 4, 1, 4), CPU, PartSettings(torch.bfloat16))


def test_a_part_that_exceeds_the_memory_is_refused(folder):
    path = folder_of("v3", folder)
    with pytest.raises(SoliError, match=r"the part of each of 2 processes takes [\d,]+ bytes, but 90,000 are allowed"):
        load_part(path, Ranks(0, 2, 0, 2), CPU, PartSettings(memory=90_000))


@pytest.mark.parametrize("dimension", [0, 1])
def test_a_part_of_a_weight_of_other_programs_has_the_same_values(dimension):
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 96, generator=draw).to(torch.float8_e4m3fn)
    pairs = torch.randint(0, 256, (64, 48), generator=draw, dtype=torch.uint8)
    for whole in (
        QuantizedWeight("fp8_row", rows, torch.rand(64, generator=draw), (64, 96), 0),
        QuantizedWeight("fp4", pairs, torch.rand(64, 3, generator=draw), (64, 96), 32),
    ):
        part = whole.part(dimension, 32, 64)
        assert torch.equal(part.dequantize(), whole.dequantize().narrow(dimension, 32, 32))


def test_caches_that_are_gone_are_freed_on_the_other_ranks(monkeypatch):
    announced: list[Call] = []
    monkeypatch.setattr(calls, "_broadcast", lambda call, group: announced.append(call))
    model = copy.deepcopy(tiny_model())
    Leader(model, 2, None)
    ids_BT = torch.tensor([[5, 6, 7]])
    for _ in range(3):
        step = LatentCache.whole_rows([8]).step([0], [0], [3])
        model.backbone(ids_BT, step.positions_T[None], step)
        del step
        gc.collect()
    assert [list(call.freed) for call in announced] == [[], [0], [1]]


def test_a_part_of_a_block_is_refused():
    whole = CODECS["fp8"].quantize(torch.randn(256, 256))
    with pytest.raises(SoliError, match="rows 0 to 95 of 256 are no whole number of fp8 blocks of 128"):
        whole.part(0, 0, 96)


BLOCKS = {  # of two ranks each has whole blocks
    "hidden_size": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_shared_experts": 2,
    "num_attention_heads": 8,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
}


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_quantized_weights_stay_quantized(tmp_path, folder, format):
    settings = PartSettings(torch.float32, quantized=True)  # of activations
    case = Case(folder_of("v3", folder, format, **BLOCKS), str(folder), requests(6), settings=settings)
    [answered], _ = run_ranks(of_ranks, 2, tmp_path, [case])
    assert_same(answered, of_one_process(case))


def nano_cases(count: int, tokens: int, **settings: object) -> Case:
    """The bundled model, and sentences without sense as prompts."""
    nano = open_checkpoint("nano").folder
    tokenizer = Tokenizer.from_folder(nano)
    draw = random.Random(count)
    texts = [" ".join(draw.choices(draw.choice(WORDS).split(), k=draw.randint(2, 30))) for _ in range(count)]
    prompts = [tuple(ids) for ids in tokenizer.encode_batch(texts)]
    limits = EngineLimits(cache_bytes=2**26, max_running=16)
    return Case(
        str(nano), str(nano), [Request(ids, tokens, logprobs=0) for ids in prompts], limits, PartSettings(**settings)
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_200_prompts_of_the_bundled_model_have_the_same_tokens(tmp_path, world):
    case = nano_cases(200, 24, dtype=torch.float32)
    [answered], *_ = run_ranks(of_ranks, world, tmp_path, [case])
    assert len(answered) == 200
    assert_same(answered, of_one_process(case))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_one_process(tmp_path, world):
    case, exact_case = (nano_cases(40, 1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    [shared], *_ = run_ranks(logits_of_ranks, world, tmp_path, [case])
    exact, alone = logits_of_one_process(exact_case), logits_of_one_process(case)
    own = torch.cat([(one - other).flatten() for one, other in zip(alone, exact, strict=True)])
    error = torch.cat([(one - other).flatten() for one, other in zip(shared, exact, strict=True)])
    assert error.square().mean().sqrt() <= 1.5 * own.square().mean().sqrt()


@pytest.mark.slow
def test_ranks_start_a_model_that_none_of_them_could_hold(tmp_path, folder):
    case = Case(folder_of("v3", folder, **LARGE), str(folder), requests(4))
    (answered, first), (_, second) = run_ranks(limited, 2, tmp_path, [case], 0.6)
    assert_same(answered, of_one_process(case))
    assert max(first, second) <= 0.6
    [error] = run_ranks(load_limited, 1, tmp_path, case.folder, 0.6)
    assert re.search(r"the model needs [\d,]+ bytes .* but [\d,]+ bytes .* are available", error)
