"""Traps 5, 8, 13, 14, 23: a run of several ranks computes what one process computes.

Bit-identical where the sums are the same: with data parallelism alone, a rank's share being one micro-batch, the
gradients of ranks are added in the order in which one process adds those of its micro-batches. (Shards have multiples
of 16 values here: torch's fused AdamW rounds what is left over of a vector register otherwise.) Everywhere else sums
have another order: an expert adds up the tokens of all ranks in one product, a norm adds up shards. Such a run is as
far from one process as that one is from itself with other micro-batches, which reorder the same sums; it may be
REORDERED times as far. Experts are selected alike: counts and biases are always bit-identical.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import VECTORS, Trained, train_each, train_steps
from tests.engine.tiny import FAMILY_KINDS, SPARSE_KINDS

BATCH = 8  # sequences of a step
STEPS = 20
REORDERED = 4.0
UNCLIPPED = {"clip": 1e9}  # the norm, which is added up in another order, then changes nothing


def sections(micro: int, sizes: tuple[int, int, int] = (1, 1, 1), **changes: dict) -> dict:
    """Changes of the toy's recipe: sequences of a micro-batch, (data, expert, replicate), and others by section."""
    parallel = dict(zip(("data", "expert", "replicate"), sizes, strict=True))
    run = {"micro_sequences": micro, **changes.get("run", {})}
    return {**changes, "run": run, "parallel": {**changes.get("parallel", {}), **parallel}}


def assert_selects_alike(many: Trained, one: Trained) -> None:
    assert all(torch.equal(a, b) for a, b in zip(many.counts, one.counts, strict=True))
    biases = [name for name in one.state if name.endswith("e_score_correction_bias")]
    assert biases and not set(biases) & set(many.differing(one))


def assert_as_close_as_other_micro_batches(many: Trained, one: Trained, other: Trained) -> None:
    """`other`: one process with other micro-batches than `one`."""
    assert_selects_alike(many, one)
    assert one.distance(other) > 0
    assert one.distance(many) <= REORDERED * one.distance(other)
    assert many.norms == pytest.approx(one.norms, rel=1e-5)
    assert many.losses == [pytest.approx(losses, rel=1e-5) for losses in one.losses]


EXACT = {  # with data parallelism alone
    "AdamW": {"optimizer": UNCLIPPED},
    "Muon": {"optimizer": UNCLIPPED | {"name": "muon"}},
    "bf16 moments": {"optimizer": UNCLIPPED | {"moments": "bf16"}},
    "recomputed": {"optimizer": UNCLIPPED, "run": {"activation_checkpointing": True}},
}
CLOSE = {  # on any mesh, clipped, micro-batches of one sequence
    "AdamW": {},
    "Muon, recomputed": {"optimizer": {"name": "muon"}, "run": {"activation_checkpointing": True}},
    "no MTP": {"model": {"num_nextn_predict_layers": 0}},
    "alpha, gathered once": {"balance": {"gamma": 0.01, "alpha": 0.01}, "parallel": {"keep_gathered": True}},
}
MESHES = {2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1), (4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]}


def check_exact(folder: Path, data: Path, world: int, names: list[str]) -> None:
    """Data-parallel ranks, each with one micro-batch, against one process with as many micro-batches."""
    micro = BATCH // world
    recipes = [sections(micro, (world, 1, 1), model=VECTORS, **EXACT[name]) for name in names]
    by_rank = run_ranks(train_each, world, folder / "ranks", data, folder / "many", STEPS, recipes)
    for number, name in enumerate(names):
        one = train_steps(data, folder / f"one{number}", STEPS, sections(micro, model=VECTORS, **EXACT[name]))
        for many in (runs[number] for runs in by_rank):
            assert many.differing(one) == [], name
            assert many.losses == one.losses
            assert many.norms == pytest.approx(one.norms, rel=1e-6)
            assert_selects_alike(many, one)


def check_close(folder: Path, data: Path, world: int, cases: list[tuple[tuple[int, int, int], str]]) -> None:
    """Any mesh, accumulating micro-batches of one sequence, against one process."""
    recipes = [sections(1, sizes, **CLOSE[name]) for sizes, name in cases]
    by_rank = run_ranks(train_each, world, folder / "ranks", data, folder / "many", STEPS, recipes)
    for name in {name for _, name in cases}:
        one = train_steps(data, folder / f"one {name}", STEPS, sections(BATCH, **CLOSE[name]))
        other = train_steps(data, folder / f"other {name}", STEPS, sections(2, **CLOSE[name]))
        for number in (number for number, case in enumerate(cases) if case[1] == name):
            for runs in by_rank:
                assert runs[number].differing(by_rank[0][number]) == []
                assert_as_close_as_other_micro_batches(runs[number], one, other)


def test_two_ranks(tmp_path, data):
    check_exact(tmp_path / "exact", data, 2, ["Muon"])


def test_two_ranks_with_expert_parallelism(tmp_path, data):
    check_close(tmp_path, data, 2, [((1, 2, 1), "Muon, recomputed")])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_ranks_have_the_bits_of_one_process(tmp_path, data, world):
    check_exact(tmp_path, data, world, list(EXACT))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_any_mesh_is_as_close_as_other_micro_batches(tmp_path, data, world):
    check_close(tmp_path, data, world, [(sizes, name) for sizes in MESHES[world] for name in CLOSE])


def family_sections(kind: str) -> dict:
    """Two ranks that share the experts, or the parameters of a model without them."""
    model = {"num_hidden_layers": 3, **FAMILY_KINDS[kind]}
    return {"model": model, "parallel": {"data": 2} if model.get("n_routed_experts") == 0 else {"expert": 2}}


@pytest.mark.slow
def test_every_family_trains_on_two_ranks(tmp_path, data):
    kinds = [kind for kind, changes in FAMILY_KINDS.items() if changes not in SPARSE_KINDS.values()]
    recipes = [family_sections(kind) for kind in kinds]
    by_rank = run_ranks(train_each, 2, tmp_path / "ranks", data, tmp_path / "many", 3, recipes)
    for number, kind in enumerate(kinds):
        sections = {"model": recipes[number]["model"]}
        one = train_steps(data, tmp_path / kind, 3, sections)
        for runs in by_rank:
            assert all(torch.equal(a, b) for a, b in zip(runs[number].counts, one.counts, strict=True)), kind
            assert one.distance(runs[number]) < 1e-4, kind
            assert runs[number].losses == [pytest.approx(losses, rel=1e-5) for losses in one.losses], kind


@pytest.mark.slow
def test_fewer_experts_than_ranks_are_shared_in_parts(tmp_path, data):
    """Two experts on 2 x 2 ranks: each stores a part of every matrix, and Muon gathers them."""
    model = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    changes = {"model": model, "optimizer": {"name": "muon"}}
    one = train_steps(data, tmp_path / "one", 3, sections(BATCH, **changes))
    other = train_steps(data, tmp_path / "other", 3, sections(2, **changes))
    recipe = sections(BATCH // 4, (2, 2, 1), **changes)
    for many in run_ranks(train_steps, 4, tmp_path / "ranks", data, tmp_path / "many", 3, recipe):
        assert_as_close_as_other_micro_batches(many, one, other)
