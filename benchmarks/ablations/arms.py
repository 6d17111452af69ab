"""The arms of the ablations as data: DeepSeek-V3's recipe on a very small model, and what each arm changes in it.

Some arms have the shape of the bundled model. Every arm activates as many parameters per token as the baseline (or as
the bundled model), to 1 %, and sees as many tokens, unless it is there to spend the baseline's FLOPs instead: the arms
that vary the bundled model's shape do. Rates are the baseline's in every arm; none was tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import record  # noqa: F401  puts this tree's soli first

from soli.analysis.parameters import count, training_flops
from soli.train.settings import TrainSettings, read_settings

BASELINE = "baseline"
NANO = "nano"
TOLERANCE = 0.01  # of activated parameters; FLOPs, where an arm has as many by intent, are equal to a step
HELDOUT_TOKENS = 32_768

# Two thirds of what a token activates are embedding and head; the rest is 4 layers, the first of them dense.
MODEL = {
    "model_type": "deepseek_v3", "vocab_size": 6144, "hidden_size": 128, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "intermediate_size": 320, "moe_intermediate_size": 64, "n_routed_experts": 32,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_nextn_predict_layers": 1,
    "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "initializer_range": 0.02, "max_position_embeddings": 512,
}  # fmt: skip
RECIPE: dict[str, dict[str, Any]] = {
    "model": MODEL,
    "optimizer": {"name": "muon", "router_rate": 0.1},
    "schedule": {
        "sequence_length": 128,
        "batch_sequences": 16,
        "learning_rate": 5e-3,
        "final_learning_rate": 2e-4,
    },
    "balance": {"gamma": 2e-3, "alpha": 1e-4},
    "losses": {"mtp_weight": 0.3, "mtp_weight_late": 0.1},
    "run": {"micro_sequences": 16, "save_every": 0},
    "eval": {"tokens": HELDOUT_TOKENS, "samples": 0},
}
WARMUP, CONSTANT = 0.05, 0.55  # shares of the run; the cosine takes the rest
BIAS_STOPS, MTP_LATE = 0.95, 0.68  # of the run, as in V3 and nano-zh-en


@dataclass(frozen=True)
class Arm:
    """The baseline with `changes` ("section.field": value); `same_flops`: as many FLOPs as it, not as many tokens.

    `preset`: with this preset's shape in place of the baseline's. `other_size`: activates another number of parameters.
    """

    what: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    same_flops: bool = False
    preset: str | None = None
    other_size: bool = False

    @property
    def reference(self) -> str:
        """The arm that this one is as large and as long as."""
        return NANO if self.preset else BASELINE


@dataclass(frozen=True)
class Experiment:
    """A question and the arms that answer it; the first is what the others are compared with."""

    question: str
    arms: tuple[str, ...]


AUXILIARY = 3e-3  # V2's expert-level factor (arXiv 2405.04434, section 3.1.2)
V2_ROUTER = {"model.scoring_func": "softmax", "model.topk_method": "greedy", "balance.alpha": AUXILIARY}
SOFTMAX_BIAS = {"model.scoring_func": "softmax", "balance.gamma": 1.25e-4}  # scores are near 1/32 instead of 1/2
NO_MTP = {"model.num_nextn_predict_layers": 0}
NANO_RUN = NO_MTP | {"schedule.sequence_length": 256, "run.precision": "bf16"}  # as the first half of nano-zh-en
NANO_DENSE = {"model.n_routed_experts": 0, "model.intermediate_size": 674, "balance.gamma": 0.0}


def _nano_shape(what: str, heldout_tokens: int = HELDOUT_TOKENS, **shape: int) -> Arm:
    """The bundled model with another shape, for as many FLOPs; its FP8 files with tokenizer are at most 32 MB.

    Another vocabulary has a corpus of its own (soli data build --set data.vocab_size=...) and reads the held-out text
    that the others read, which is fewer tokens.
    """
    changes = NANO_RUN | {"eval.tokens": heldout_tokens} | {f"model.{name}": value for name, value in shape.items()}
    return Arm(f"bundled shape, {what}", changes, same_flops=True, preset="nano", other_size=True)


ARMS: dict[str, Arm] = {
    BASELINE: Arm("V3: sigmoid, 4 of 32 experts and a shared one, bias, alpha 1e-4, MTP"),
    # 8 units more than 4 + 1 experts: together as large as the routers that it lacks
    "dense": Arm(
        "no experts, wider layers", {"model.n_routed_experts": 0, "model.intermediate_size": 328, "balance.gamma": 0.0}
    ),
    "auxiliary": Arm("auxiliary loss alone, alpha 3e-3", {"balance.gamma": 0.0, "balance.alpha": AUXILIARY}),
    "neither": Arm("neither bias nor auxiliary loss", {"balance.gamma": 0.0, "balance.alpha": 0.0}),
    "no-mtp": Arm("no MTP, the same tokens", NO_MTP),
    "no-mtp-more": Arm("no MTP, the same FLOPs: more tokens", NO_MTP, same_flops=True),
    "softmax": Arm("softmax as V2 has it, auxiliary loss alone, alpha 3e-3", V2_ROUTER),
    "softmax-bias": Arm("softmax with the bias, gamma / 16", SOFTMAX_BIAS),
    "experts-8": Arm("4 of 8 experts", {"model.n_routed_experts": 8}),
    "experts-16": Arm("4 of 16 experts", {"model.n_routed_experts": 16}),
    "experts-64": Arm("4 of 64 experts", {"model.n_routed_experts": 64}),
    NANO: Arm("the bundled model's shape: 4 of 32 experts and a shared one", NANO_RUN, preset="nano"),
    "nano-dense": Arm("the bundled model's shape, no experts, wider layers", NANO_RUN | NANO_DENSE, preset="nano"),
    "nano-narrow": _nano_shape("192 wide, 48 experts", hidden_size=192, n_routed_experts=48),
    "nano-wide": _nano_shape("320 wide, 20 experts", hidden_size=320, n_routed_experts=20),
    "nano-shallow": _nano_shape("3 layers, 56 experts", num_hidden_layers=3, n_routed_experts=56),
    "nano-deep": _nano_shape("7 layers, 24 experts", num_hidden_layers=7, n_routed_experts=24),
    "nano-fine": _nano_shape(
        "8 of 64 experts of 64",
        n_routed_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=64,
        n_shared_experts=2,
    ),
    "nano-coarse": _nano_shape(
        "2 of 16 experts of 256", n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=256
    ),
    "nano-few": _nano_shape("2 of 32 experts", num_experts_per_tok=2),
    "nano-many": _nano_shape("8 of 32 experts", num_experts_per_tok=8),
    "nano-12k": _nano_shape(
        "12,288 tokens, 192 wide, 28 experts", 29_184, vocab_size=12_288, hidden_size=192, n_routed_experts=28
    ),
    "nano-16k": _nano_shape("16,384 tokens, 128 wide", 28_160, vocab_size=16_384, hidden_size=128),
}
NANO_SHAPES = tuple(name for name, arm in ARMS.items() if arm.other_size)

EXPERIMENTS: dict[str, Experiment] = {
    "a": Experiment("a mixture against a dense model of equal activated parameters", ("dense", BASELINE)),
    "b": Experiment("bias against auxiliary loss against neither", ("auxiliary", BASELINE, "neither")),
    "c": Experiment("with and without MTP", ("no-mtp", BASELINE, "no-mtp-more")),
    "d": Experiment("sigmoid with bias against softmax", ("softmax", BASELINE, "softmax-bias")),
    "e": Experiment(
        "the number of experts at fixed activated parameters",
        ("dense", "experts-8", "experts-16", BASELINE, "experts-64"),
    ),
    "f": Experiment("the bundled model against a dense one of equal activated parameters", ("nano-dense", NANO)),
    "g": Experiment("the bundled model's shape at equal training FLOPs, in 32 MB", (NANO, *NANO_SHAPES)),
}


def arm_settings(name: str, tokens: int, seed: int = 0) -> TrainSettings:
    """The whole run of an arm where the baseline gets `tokens` tokens; lengths are rounded to steps."""
    arm = ARMS[name]
    if arm.same_flops:
        ratio = flops_per_token(arm_settings(arm.reference, tokens)) / flops_per_token(_read(arm, tokens, 0))
        tokens = round(tokens * ratio)
    return _read(arm, tokens, seed)


def flops_per_token(settings: TrainSettings) -> int:
    """Forward and backward, MTP and attention included."""
    return training_flops(settings.model, settings.schedule.sequence_length)


def check_equal(tokens: int) -> None:
    """AssertionError unless every arm activates what the baseline does, and spends its FLOPs where it must."""
    for name, arm in ARMS.items():
        settings, base = (arm_settings(one, tokens) for one in (name, arm.reference))
        share = count(settings.model).activated / count(base.model).activated
        assert arm.other_size or abs(share - 1) <= TOLERANCE, f"{name} activates {share:.3f} times its reference's"
        if arm.same_flops:
            difference = run_flops(settings) - run_flops(base)
            step = flops_per_token(settings) * settings.schedule.sequence_length * settings.schedule.batch_sequences
            assert abs(difference) < step, f"{name} spends {difference:,} FLOPs more than the baseline"
        else:
            assert settings.schedule.total_tokens == base.schedule.total_tokens, f"{name} has tokens of its own"


def run_flops(settings: TrainSettings) -> int:
    return settings.schedule.total_tokens * flops_per_token(settings)


def _read(arm: Arm, tokens: int, seed: int) -> TrainSettings:
    recipe = {section: dict(table) for section, table in RECIPE.items()}
    if arm.preset:
        recipe["model"] = {"preset": arm.preset}
    for place, value in arm.changes.items():
        section, _, key = place.partition(".")
        recipe[section][key] = value
    step = recipe["schedule"]["sequence_length"] * recipe["schedule"]["batch_sequences"]
    whole, warmup, constant = (round(tokens * share / step) * step for share in (1, WARMUP, CONSTANT))
    recipe["schedule"] |= {"warmup_tokens": warmup, "constant_tokens": constant}
    recipe["schedule"]["cosine_tokens"] = whole - warmup - constant
    recipe["balance"]["gamma_tokens"] = round(whole * BIAS_STOPS)
    recipe["losses"]["mtp_late_after_tokens"] = round(whole * MTP_LATE)
    recipe["run"]["seed"] = seed
    return read_settings(recipe)
