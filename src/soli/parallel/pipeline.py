"""Pipeline parallelism: each rank has the blocks of its stages, and torch's schedules move micro-batches between them.

The first stage also has the embedding, the last one norm, head and MTP modules. MTP modules and a tied head use the
embedding as well: where the last stage is on another rank, that rank has a copy, whose gradient and the first stage's
are added after the last micro-batch, so that both stay equal.

From stage to stage go hidden states (B, T, D) and one number, to which each stage adds its part (of the balance loss).

Shapes: B sequences of a micro-batch, W tokens of a window, T of its input, D hidden.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from soli.errors import SoliError
from soli.model.indexer import Selection
from soli.model.router import Routing
from soli.model.transformer import Transformer
from soli.parallel.ranks import local_tensor
from soli.parallel.stages import PipelineSchedule, divide_layers

# On an error it prints the whole schedule; the error itself is raised.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

# torch before it adds up the gradients of an operation's outputs, and counts what two paths share twice.
SPLITS_BACKWARD: Final = (2, 13)


class Task(Protocol):
    """What is computed from the stages' hidden states. Routings are by layer, such as ``layers.3``."""

    def carry(self, routing: Mapping[str, Routing], carried: Tensor | None, sequences: int) -> Tensor | None:
        """The number (0-d) that goes on to the next stage; `carried` comes from the one before, None at first. None
        until there is a routing."""

    def finish(
        self, hidden_BTD: Tensor, routing: Mapping[str, Routing], carried: Tensor | None, window_BW: Tensor
    ) -> Any:
        """What the last stage returns for its normed hidden states; in training the loss that gradients are of."""


class Absent(nn.Module):
    """In place of what other ranks have of a model."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0), persistent=False)  # its device is the model's


class StageModule(nn.Module):
    """Consecutive blocks of a model, and what belongs to its ends."""

    def __init__(self, model: Transformer, layers: range, number: int, stages: int) -> None:
        super().__init__()
        self.whole = [model]  # in a list: it is not a part of the stage
        self.layers, self.number = layers, number
        self.is_first, self.is_last = number == 0, number == stages - 1
        self.blocks = nn.ModuleList(model.layers[layer] for layer in layers)
        if self.is_first or (self.is_last and shares_embedding(model)):
            self.embed_tokens = model.embed_tokens
        if self.is_last:
            self.norm, self.lm_head, self.mtp = model.norm, model.lm_head, model.mtp
        self.task: Task | None = None
        self.windows: Sequence[Tensor] = ()
        self.length = self.position = 0

    def begin(self, task: Task, windows: Sequence[Tensor], length: int) -> None:
        """Compute `task` for these windows (B, W) in the next forward passes; the input is their first `length` ids."""
        self.task, self.windows, self.length, self.position = task, windows, length, 0

    def forward(self, *received: Tensor) -> Any:
        """Hidden states (and the number carried along) for the next stage, or the task's result. The first stage
        receives its window."""
        model, task = self.whole[0], self.task
        assert task is not None
        window_BW = self.windows[self.position]
        self.position += 1
        ids_BT = window_BW[:, : self.length]
        x_BTD = model.embed(ids_BT) if self.is_first else received[0]
        carried = None if self.is_first or len(received) == 1 else received[1]
        cos_sin = model.rope(torch.arange(self.length, device=ids_BT.device).expand_as(ids_BT))
        selection = Selection()
        routing: dict[str, Routing] = {}
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x_BTD, decision = block(x_BTD, cos_sin, None, None, selection)
            if decision is not None:
                routing[f"layers.{layer}"] = decision
        if self.is_last:
            return task.finish(model.norm(x_BTD), routing, carried, window_BW)
        carried = task.carry(routing, carried, len(window_BW))
        return (x_BTD,) if carried is None else (x_BTD, carried)


def shares_embedding(model: Transformer) -> bool:
    """Whether the last stage uses the embedding too."""
    return model.config.tie_word_embeddings or model.config.num_nextn_predict_layers > 0


def check_torch(schedule: PipelineSchedule, version: str = torch.__version__) -> None:
    """SoliError where this torch's schedule computes wrong gradients."""
    major_minor = tuple(int(number) for number in version.split(".")[:2])
    if schedule.splits_backward and major_minor < SPLITS_BACKWARD:
        raise SoliError(
            f"parallel.schedule is {schedule.name!r}, whose gradients of weights torch {version} computes wrongly; "
            "install torch 2.13 or newer, or choose 1F1B or Interleaved1F1B"
        )


def build_stages(model: Transformer, schedule: PipelineSchedule, rank: int, ranks: int) -> list[StageModule]:
    """The stages of one rank of a pipeline, by number; `model` loses what none of them has."""
    total = schedule.stages(ranks)
    layers = divide_layers(model.config, total)
    stages = [StageModule(model, layers[number], number, total) for number in schedule.stages_of(rank, ranks)]
    own_layers = {layer for stage in stages for layer in stage.layers}
    for layer in range(len(model.layers)):
        if layer not in own_layers:
            model.layers[layer] = Absent()
    if not any(stage.is_last for stage in stages):
        model.norm, model.lm_head, model.mtp = Absent(), Absent(), nn.ModuleList()  # type: ignore[assignment]
    if not any(hasattr(stage, "embed_tokens") for stage in stages):
        model.embed_tokens = Absent()  # type: ignore[assignment]
    return stages


class Pipeline:
    """The stages of this rank together with those of the other ranks of `group`."""

    def __init__(
        self,
        model: Transformer,
        schedule: PipelineSchedule,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """`model`, built without memory, loses what this rank has not."""
        check_torch(schedule)
        self.names = tuple(name for name, _ in model.named_parameters())  # of all ranks
        self.model, self.schedule = model, schedule
        self.group, self.device = group, device
        self.ranks, self.rank = group.size(), group.rank()
        self.stages = build_stages(model, schedule, self.rank, self.ranks)
        self.total = schedule.stages(self.ranks)
        self.layers = divide_layers(model.config, self.total)
        self.built: tuple[object, Any] = (None, None)
        first, last = schedule.rank_of(0, self.ranks), schedule.rank_of(self.total - 1, self.ranks)
        has_copy = first != last and shares_embedding(model) and self.rank in (first, last)
        self.peer = first + last - self.rank if has_copy else None  # that has the other copy of the embedding

    @property
    def has_copy(self) -> bool:
        """Whether this rank's embedding is a copy of the first stage's."""
        return self.peer is not None and not self.stages[0].is_first

    def train(self, window_BW: Tensor, micro_sequences: int, length: int, task: Task) -> None:
        """Gradients of a whole step, whose windows have micro-batches of `micro_sequences`, all of equal size."""
        windows = window_BW.split(micro_sequences)
        for stage in self.stages:
            stage.begin(task, windows, length)
        schedule = self._torch_schedule(windows, length)
        inputs = (window_BW,) if self.stages[0].is_first else ()
        try:
            schedule.step(*inputs, target=torch.zeros(len(windows)), return_outputs=False)
        except RuntimeError as error:
            raise _cause(error) from None
        self._add_copies()

    @torch.no_grad()
    def forward(self, window_BW: Tensor, length: int, task: Task) -> Any:
        """One forward pass over windows: the task's result on the rank of the last stage, None on the others."""
        result: Any = None
        for stage in self.stages:
            stage.begin(task, (window_BW,), length)
            source = self.schedule.rank_of(stage.number - 1, self.ranks)
            if stage.is_first:
                result = window_BW
            elif source != self.rank:
                result = self._empty_hidden(len(window_BW), length)
                dist.recv(result, group=self.group, group_src=source)
            result = stage(result)
            if not stage.is_last:
                (result,) = result
                target = self.schedule.rank_of(stage.number + 1, self.ranks)
                if target != self.rank:
                    dist.send(result.contiguous(), group=self.group, group_dst=target)
        return result if self.stages[-1].is_last else None

    def _torch_schedule(self, windows: Sequence[Tensor], length: int) -> Any:
        """torch's schedule for these micro-batches; it has buffers for all of them, so one is kept at a time."""
        key = len(windows), windows[0].shape, length
        if self.built[0] != key:
            kind = get_schedule_class(self.schedule.name)
            stages = [self._torch_stage(stage, windows[0], length) for stage in self.stages]
            argument = stages[0] if self.schedule.stages_per_rank == 1 else stages
            # The losses are sums over the step already, so gradients are not divided by the micro-batches.
            self.built = key, kind(argument, len(windows), loss_fn=lambda loss, _: loss, scale_grads=False)
        return self.built[1]

    def _torch_stage(self, stage: StageModule, window_BW: Tensor, length: int) -> PipelineStage:
        """With the shapes of what it receives and sends, which torch would otherwise find by a forward pass."""
        inputs = (window_BW,) if stage.is_first else self._sent(stage.number - 1, window_BW, length)
        outputs = (torch.empty(()),) if stage.is_last else self._sent(stage.number, window_BW, length)
        return PipelineStage(
            stage, stage.number, self.total, self.device, input_args=inputs, output_args=outputs, group=self.group
        )

    def _sent(self, number: int, window_BW: Tensor, length: int) -> tuple[Tensor, ...]:
        """Tensors like those that a stage sends on."""
        hidden_BTD = self._empty_hidden(len(window_BW), length, "meta").requires_grad_()
        has_mixture = any(map(self.model.config.is_moe_layer, range(self.layers[number].stop)))
        return (hidden_BTD, torch.empty((), device="meta", requires_grad=True)) if has_mixture else (hidden_BTD,)

    def _empty_hidden(self, sequences: int, length: int, device: str | None = None) -> Tensor:
        shape = sequences, length, self.model.config.hidden_size
        return torch.empty(shape, dtype=self.model.compute_dtype, device=device or self.device)

    def _add_copies(self) -> None:
        """Give both copies of the embedding the sum of their gradients."""
        if self.peer is None:
            return
        p = self.model.embed_tokens.weight
        if p.grad is None:  # MTP modules that are not trained yet
            p.grad = torch.zeros_like(p)
        own = local_tensor(p.grad)
        other = torch.empty_like(own)
        peer = dist.get_global_rank(self.group, self.peer)
        operations = [dist.P2POp(dist.isend, own, peer, self.group), dist.P2POp(dist.irecv, other, peer, self.group)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        own += other


def _cause(error: BaseException) -> BaseException:
    """The error that torch's schedule wraps in its own ones."""
    while isinstance(error.__cause__, RuntimeError | SoliError):
        error = error.__cause__
    return error
