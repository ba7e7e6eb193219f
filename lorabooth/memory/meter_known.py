"""What ops make of shapes, remembered: most of a rehearsal are ops that were seen before.

Torch's fake tensors remember it too, but finding and remaking an output takes them several times as long.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

UNKNOWN = object()
"""What nobody has seen yet, or what may not be remembered."""
_CPU = torch.device("cpu")
_NAMESPACES = ("aten", "prims", "bitsandbytes")
# Outputs that depend on values; ops that change what their inputs are; constants.
_NEVER = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)
_NEVER_BY_NAME = frozenset({"aten::lift", "aten::lift_fresh", "aten::lift_fresh_copy", "aten::set_"})
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class _Same:
    """An input, returned."""

    place: int


@dataclass(frozen=True, slots=True)
class _Fresh:
    """A new tensor, or a view of the input at `place`."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    place: int | None


class _UnsuitableError(Exception):
    """An argument that makes an op one to compute anew."""


class Maker:
    """Makes the tensors of one world; called where a world's op is computed, below autograd and all modes."""

    def __init__(self, mode: FakeTensorMode) -> None:
        """Make tensors of `mode`.

        What a fake tensor knows of itself besides its shape is the same for all that are labelled "cpu":
        looked up once, because torch's constructor takes longer than all else.
        """
        self._facts = dict(vars(FakeTensor(mode, torch.empty(0, device="meta"), _CPU)))

    def made(self, told: _Same | _Fresh, args: Sequence[Any]) -> Any:
        """An output of a call with such arguments."""
        if isinstance(told, _Same):
            return args[told.place]
        if told.place is None:
            plain = torch.empty_strided(told.shape, told.stride, dtype=told.dtype, device="meta")
        else:
            plain = torch.empty(0, dtype=told.dtype, device="meta")
            plain.set_(args[told.place].untyped_storage(), told.offset, told.shape, told.stride)
        fake: Any = Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=_CPU
        )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._facts)
        return fake


class KnownOps:
    """(op, shapes and scalars) -> shapes, for all worlds that share it; not for several threads at once.

    Remembered are ops of torch and bitsandbytes whose outputs follow from their inputs' shapes: new strided
    tensors, views of one input, or an input itself. A fake tensor below autograd is nothing besides.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self._made: dict[Hashable, tuple[bool, tuple[_Same | _Fresh, ...]]] = {}
        self._suits: dict[Any, bool] = {}

    def key(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
        """What identifies a call; None for one that is not to be remembered."""
        suits = self._suits.get(func)
        if suits is None:
            suits = self._suits[func] = _suits(func)
        if not suits:
            return None
        found: list[Any] = [func, torch.get_default_dtype()]
        try:
            _note(args, found)
            for name, value in kwargs.items():
                found.append(name)
                _note_one(value, found)
        except _UnsuitableError:
            return None
        return tuple(found)

    def remade(self, maker: Maker, key: Hashable, args: Sequence[Any]) -> Any:
        """The outputs of a call that is known, made anew by a world's `maker`, or `UNKNOWN`."""
        known = self._made.get(key) if key is not None else None
        if known is None:
            return UNKNOWN
        is_tuple, outputs = known
        if not is_tuple:
            return maker.made(outputs[0], args)
        return tuple(maker.made(output, args) for output in outputs)

    def learn(self, key: Hashable, args: Sequence[Any], made: Any) -> None:
        """Remember what a call made, if that can be made anew."""
        if key is None:
            return
        outputs = made if isinstance(made, tuple | list) else (made,)
        told = [_told(output, args) for output in outputs]
        if type(made) in (tuple, FakeTensor) and all(each is not None for each in told):
            self._made[key] = (isinstance(made, tuple), tuple(each for each in told if each is not None))


def _suits(func: Any) -> bool:
    return (
        isinstance(func, OpOverload)
        and func.namespace in _NAMESPACES
        and not any(tag in func.tags for tag in _NEVER)
        and func._schema.name not in _NEVER_BY_NAME
        and "resize" not in func._schema.name
        and not torch._C._dispatch_has_kernel_for_dispatch_key(
            func._name, torch._C.DispatchKey.CompositeImplicitAutograd
        )
    )


def _note(values: Sequence[Any], found: list[Any]) -> None:
    for value in values:
        _note_one(value, found)


def _note_one(value: Any, found: list[Any]) -> None:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value._fake_device != _CPU or value.layout is not torch.strided:
            raise _UnsuitableError
        found += (value.shape, value.stride(), value.storage_offset(), value.dtype)
    elif kind in _PLAIN:
        # By their kind as well: 1, 1.0 and True are equal.
        found += (kind, value)
    elif kind in (list, tuple, torch.Size):
        found += (list, len(value))
        _note(value, found)
    elif kind is torch.Generator:
        found.append(kind)  # numbers are not drawn here
    else:
        raise _UnsuitableError


def _told(output: Any, args: Sequence[Any]) -> _Same | _Fresh | None:
    """How to make an output anew; None if that is not known."""
    for place, arg in enumerate(args):
        if arg is output:
            return _Same(place)
    if type(output) is not FakeTensor or output.constant is not None or output.requires_grad:
        return None
    if output._fake_device != _CPU or output.layout is not torch.strided:
        return None
    storage = output.untyped_storage()
    owners = [
        place
        for place, arg in enumerate(args)
        if type(arg) is FakeTensor and arg.untyped_storage()._cdata == storage._cdata
    ]
    facts = (output.shape, output.stride(), int(output.storage_offset()), output.dtype)
    if owners:
        return _Fresh(*facts, owners[0])
    if output.storage_offset() or storage.nbytes() != _least_bytes(output):
        return None
    return _Fresh(*facts, None)


def _least_bytes(tensor: Tensor) -> int:
    """What `empty_strided` takes for such a tensor."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()
