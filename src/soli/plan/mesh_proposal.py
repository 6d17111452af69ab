"""The mesh of so many devices that takes the fewest GPU-hours of pretraining, of those that fit and that are accepted.

Searched are the sizes of [parallel], the pipeline's schedule, and options of [run] that leave the mathematics as they
are: micro_sequences, activation_checkpointing, and the precision where the recipe says `auto`. Whether a recipe can be
trained on a mesh is what TrainSettings itself says, for every stage of the run. Of the recipe's batches only the
rounding of the ramp is changed; where no mesh takes the others, the smallest that the best one takes. No torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import ceil, gcd, isqrt
from typing import Any

from soli.errors import SoliError
from soli.parallel.stages import SCHEDULES
from soli.plan.device_load import DeviceLoad
from soli.plan.devices import DeviceKind
from soli.plan.mesh import MARGIN, MeshPlan, plan_mesh, pretraining_flops
from soli.plan.mesh_sizes import MeshSizes
from soli.train.settings import ParallelSettings, TrainSettings

MOST_STAGES = 32
MOST_RANKS = 8  # that share a batch, for each of its sequences: the batch would have to grow
MOST_SEQUENCES = 8  # of a micro-batch, in those of the recipe
CANDIDATES = 500  # of the least memory, where none fits


@dataclass(frozen=True)
class Proposal:
    """`settings`: the recipe with the mesh and what else was changed, `changes` by the field's name for --set.
    `refusals`: why the recipe's own batches cannot be trained on this mesh. `stages`: bytes on each device in each
    stage of the run."""

    plan: MeshPlan
    settings: TrainSettings
    changes: dict[str, object]
    refusals: tuple[str, ...]
    stages: tuple[int, ...]


def propose_mesh(settings: TrainSettings, devices: int, device: DeviceKind, precision: str) -> Proposal | None:
    """The best mesh of `devices`; `precision` is what the recipe's `auto` stands for. Of several as good, the one with
    the recipe's own options. Where none fits, one of little memory; None where no sizes divide the experts."""
    recipe = settings
    settings = replace(recipe, parallel=ParallelSettings())
    candidates = [
        _Candidate(sizes, option, precision, sum(DeviceLoad(option, sizes, precision).memory().values()))
        for sizes, (option, precision) in product(_sizes(settings, devices), [*_options(settings, device, precision)])
        # Larger micro-batches save gathering more often.
        if not sizes.keep_gathered or option.run.micro_sequences <= settings.run.micro_sequences
    ]
    fitting = [one for one in candidates if one.memory <= MARGIN * device.memory]
    if fitting:
        ranked = sorted(fitting, key=lambda one: one.plan(device).expected_seconds)
    else:
        ranked = sorted(candidates, key=lambda one: one.memory)[:CANDIDATES]
    for adapt in (_as_is, _with_extension_batches, _with_batches):
        for one in ranked:
            accepted = adapt(one.settings, one.sizes)
            if accepted is not None:
                return _proposal(recipe, replace(one, settings=accepted).plan(device), accepted)
    return None


@dataclass(frozen=True)
class _Candidate:
    sizes: MeshSizes
    settings: TrainSettings
    precision: str
    memory: int

    def plan(self, device: DeviceKind) -> MeshPlan:
        return plan_mesh(self.settings, self.sizes, device, self.precision, pretraining_flops(self.settings))


def on_mesh(settings: TrainSettings, sizes: MeshSizes) -> TrainSettings:
    """The recipe with these sizes; SoliError where it cannot be trained so."""
    return replace(settings, parallel=ParallelSettings(**vars(sizes)))


def _options(settings: TrainSettings, device: DeviceKind, precision: str) -> Iterator[tuple[TrainSettings, str]]:
    """The recipe with the options of [run] that may be chosen, its own first, and the precision it computes in."""
    run = settings.run
    own = run.micro_sequences
    smaller = [own >> times for times in range(1, own.bit_length())]
    larger = [own << times for times in range(1, MOST_SEQUENCES.bit_length())]
    recomputes = dict.fromkeys((run.activation_checkpointing, True))
    precisions = {precision: run}
    if run.precision == "auto" and device.fp8_tflops and not run.compile:
        precisions["fp8"] = replace(run, precision="fp8")
    for (name, chosen), sequences, repeats in product(precisions.items(), [own, *smaller, *larger], recomputes):
        option = replace(chosen, micro_sequences=sequences, activation_checkpointing=repeats)
        yield replace(settings, run=option), name


def _sizes(settings: TrainSettings, devices: int) -> Iterator[MeshSizes]:
    """Every mesh of whole sizes whose stages have layers and whose ranks have experts."""
    experts, layers = settings.model.n_routed_experts or 1, settings.model.num_hidden_layers
    for pipeline in (n for n in range(1, MOST_STAGES + 1) if devices % n == 0 and n <= layers):
        ranks = devices // pipeline
        names = [name for name, schedule in SCHEDULES.items() if schedule.stages(pipeline) <= layers]
        if ranks > MOST_RANKS * settings.schedule.batch_sequences:
            continue
        for expert in _divisors(gcd(experts, ranks)):
            for copies in _divisors(ranks // expert):
                for whole, name in product((False, True), names if pipeline > 1 else names[:1]):
                    yield MeshSizes(ranks // expert // copies, expert, pipeline, copies, whole, name)


def _divisors(number: int) -> list[int]:
    smaller = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*smaller, *(number // n for n in smaller)})


def _as_is(settings: TrainSettings, sizes: MeshSizes) -> TrainSettings | None:
    """The recipe on this mesh, its ramp's batches rounded as its ranks need it; None where that is not accepted."""
    schedule = settings.schedule
    multiples = [schedule.batch_ramp_multiple]
    if schedule.batch_sequences_start is not None:
        multiples += [sizes.ranks, sizes.ranks * sizes.pipeline]
    for multiple in dict.fromkeys(multiples):
        rounded = replace(settings, schedule=replace(schedule, batch_ramp_multiple=multiple))
        if _on_mesh(replace(rounded, extension=()), sizes) is not None:
            return _on_mesh(rounded, sizes)
    return None


def _on_mesh(settings: TrainSettings, sizes: MeshSizes) -> TrainSettings | None:
    try:
        return on_mesh(settings, sizes)
    except SoliError:
        return None


def _with_extension_batches(settings: TrainSettings, sizes: MeshSizes) -> TrainSettings | None:
    """Extension phases with the smallest batches, from the recipe's on, that this mesh takes, and as many tokens."""
    accepted = _as_is(replace(settings, extension=()), sizes)
    for phase in settings.extension:
        if accepted is None:
            break
        before = accepted

        def with_batch(sequences: int, phase: Any = phase, before: TrainSettings = before) -> TrainSettings:
            steps = phase.steps and ceil(phase.steps * phase.batch_sequences / sequences)
            changed = replace(phase, batch_sequences=sequences, steps=steps)
            return replace(before, extension=(*before.extension, changed))

        accepted = _smallest_batch(phase.batch_sequences, sizes, with_batch)
    return accepted


def _with_batches(settings: TrainSettings, sizes: MeshSizes) -> TrainSettings | None:
    """As `_with_extension_batches`, with other batches of pretraining too."""
    before, schedule = settings, settings.schedule

    def with_batch(sequences: int) -> TrainSettings:
        changed = replace(schedule, batch_sequences=sequences, batch_sequences_start=None, batch_ramp_tokens=0)
        return on_mesh(replace(before, schedule=changed, extension=()), sizes)

    full = _smallest_batch(schedule.batch_sequences, sizes, with_batch)
    if full is None:
        return None
    if schedule.batch_sequences_start is not None:

        def with_start(sequences: int) -> TrainSettings:
            changed = replace(schedule, batch_sequences=batch, batch_sequences_start=sequences)
            accepted = _as_is(replace(before, schedule=changed, extension=()), sizes)
            if accepted is None:
                raise SoliError("not with this start")
            return accepted

        batch = full.schedule.batch_sequences
        full = _smallest_batch(schedule.batch_sequences_start, sizes, with_start)
    return full and _with_extension_batches(replace(settings, schedule=full.schedule), sizes)


def _smallest_batch(least: int, sizes: MeshSizes, change: Callable[[int], TrainSettings]) -> TrainSettings | None:
    """`change` of the smallest number of sequences that is accepted, from `least` on."""
    first = ceil(least / sizes.ranks)
    for share in range(first, first + 4 * MOST_STAGES):
        try:
            return change(share * sizes.ranks)
        except SoliError:
            continue
    return None


def _proposal(recipe: TrainSettings, plan: MeshPlan, accepted: TrainSettings) -> Proposal:
    memories = (
        sum(DeviceLoad(accepted, plan.sizes, plan.precision, stage=stage).memory().values())
        for stage in range(len(accepted.stages))
    )
    return Proposal(plan, accepted, dict(_changes(recipe, accepted)), _refusals(recipe, accepted), tuple(memories))


def _changes(recipe: TrainSettings, accepted: TrainSettings) -> Iterator[tuple[str, object]]:
    """Fields that differ, as --set names them."""
    pairs = [(name, getattr(recipe, name), getattr(accepted, name)) for name in ("parallel", "run", "schedule")]
    pairs += [
        (f"extension.{number}", *phases)
        for number, phases in enumerate(zip(recipe.extension, accepted.extension, strict=True))
    ]
    for section, before, after in pairs:
        for field, value in vars(after).items():
            if value != getattr(before, field):
                yield f"{section}.{field}", value


def _refusals(recipe: TrainSettings, accepted: TrainSettings) -> tuple[str, ...]:
    """Why each batch of the recipe that was changed cannot be trained on the accepted mesh, in the trainer's words."""
    reasons = []

    def with_batch(field: str) -> TrainSettings:
        return replace(accepted, schedule=replace(accepted.schedule, **{field: getattr(recipe.schedule, field)}))

    def with_phase(number: int) -> TrainSettings:
        phases = [*accepted.extension]
        phases[number] = recipe.extension[number]
        return replace(accepted, extension=tuple(phases))

    batches = [partial(with_batch, field) for field in ("batch_sequences", "batch_sequences_start")]
    for own in (*batches, *(partial(with_phase, number) for number in range(len(recipe.extension)))):
        try:
            own()
        except SoliError as error:
            reasons.append(str(error))
    return tuple(dict.fromkeys(reasons))
