"""What a model's answers depend on, recorded so that a change can be seen before the next request.

`ModelState` compares modules, hooks, methods, attributes and tensors with those at its creation. A tensor that was
written in place is known by PyTorch's version counter: writes through `.data` pass it by, as they do autograd.
`modification` names the first module that does not compute what the classes of soli.model compute.
"""

from enum import Enum
from types import FunctionType
from typing import Final

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from soli.model.attention import LatentAttention
from soli.model.indexer import Indexer
from soli.model.layers import MLP, LayerNorm, Linear, RMSNorm
from soli.model.moe import MoE, RoutedExperts
from soli.model.router import Router
from soli.model.transformer import Block, MTPModule, Transformer

OWN_CLASSES: Final[tuple[type[nn.Module], ...]] = (
    Transformer, Block, MTPModule, LatentAttention, Indexer, MoE, RoutedExperts, Router, MLP, Linear, RMSNorm,
    LayerNorm, nn.Embedding, nn.ModuleList,
)  # fmt: skip


class Change(Enum):
    """NONE, VALUES (tensors were written in place), or STRUCTURE (anything else)."""

    NONE = 0
    VALUES = 1
    STRUCTURE = 2


class ModelState:
    """The state of `model` at creation. It keeps everything alive, so that nothing else can take an address or id."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [*model.modules()]
        self._attributes = [dict(vars(module)) for module in self._modules]
        self._members = [
            members for module in self._modules for members in (module._modules, module._parameters, module._buffers)
        ]
        # Only plain tensors have an address; a sharded or fake one is known by its identity.
        self._tensors = [
            tensor
            for module in self._modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None and type(tensor) in (Tensor, nn.Parameter)
        ]
        # The version counter does not exist for tensors that were made under torch.inference_mode.
        self._counts_versions = not any(tensor.is_inference() for tensor in self._tensors)
        self._keep_alive = [member for members in self._members for member in members.values()]
        self._structure = self._current_structure()
        self._versions = self._current_versions()

    def change(self) -> Change:
        """What is no longer as it was. Tensors without a version counter count as written."""
        try:
            same_attributes = self._attributes == [vars(module) for module in self._modules]
        except RuntimeError:  # a tensor as a plain attribute was replaced: it has no single truth value
            return Change.STRUCTURE
        if not same_attributes or self._structure != self._current_structure():
            return Change.STRUCTURE
        return Change.NONE if self._counts_versions and self._versions == self._current_versions() else Change.VALUES

    def accept_values(self) -> None:
        """Take the tensors' present values as the ones to compare with."""
        self._versions = self._current_versions()

    def _current_structure(self) -> tuple[object, ...]:
        """Identities of modules and tensors, addresses, hooks, methods."""
        member_ids = [id(member) for members in self._members for member in members.values()]
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        return member_ids, addresses, _hooks(self._modules), _class_methods()

    def _current_versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors] if self._counts_versions else []


def modification(model: nn.Module) -> str | None:
    """The first module that computes something else than its class in soli.model does, and how; None without one."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "every module has a global forward hook"
    for kind, methods in _class_methods().items():
        if methods != ORIGINAL_METHODS[kind]:
            return f"a method of {kind.__name__} was replaced"
    for name, module in model.named_modules():
        difference = _difference(module)
        if difference is not None:
            return f"{name or 'the model itself'} {difference}"
    return None


def _difference(module: nn.Module) -> str | None:
    kind = type(module)
    if kind not in OWN_CLASSES:
        return f"is of the class {kind.__name__}, which is not one of soli.model"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    for name, value in vars(module).items():
        if isinstance(getattr(kind, name, None), FunctionType) and not getattr(value, "equal_in_inference", False):
            return f"has its own {name}()"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            return f"has a {type(tensor).__name__} as its {name}"
    return None


def _hooks(modules: list[nn.Module]) -> list[object]:
    """All forward hooks, global ones included."""
    registries = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    for module in modules:
        registries += [hooks for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks]
    return [hook for hooks in registries for hook in hooks.values()]


def _class_methods() -> dict[type[nn.Module], list[object]]:
    return {kind: [member for member in vars(kind).values() if type(member) is FunctionType] for kind in OWN_CLASSES}


ORIGINAL_METHODS: Final = _class_methods()
