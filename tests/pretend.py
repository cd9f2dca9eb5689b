"""A device that no machine has: it looks like CUDA to the program, and computes on the CPU.

Within `with pretended_device() as device`, what the program puts on torch.device("cuda", 0) becomes
a DeviceTensor, which holds a CPU tensor. As on a GPU, an operator that gets tensors of both sorts
is an error, but for copies and scalars. Counted are

    operators  what the host launches: all but views, allocations and copies from the host
    waits      where the host stands still until the device has done its work: numbers and truth
               values that are read, copies to the CPU, copies from memory that is not pinned, masks
               whose number of hits is a shape, and torch.cuda.synchronize

torch knows no device of that kind without CUDA, so underneath it is "meta". Two modes make it: one
sees calls from Python, with their devices, the other what arrives below autograd.
"""

import collections
import contextlib
import functools
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
META = torch.device("meta")
READS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount}
READS |= {aten._unique2, aten.unique_consecutive, aten.unique_dim}
COPIES = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
# Neither launched nor waited for.
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
FREE |= {aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view, aten.is_same_size}
FREE |= {aten._reshape_alias, aten._local_scalar_dense}


class DeviceMixError(RuntimeError):
    """Report an operator that got tensors of the device and tensors of the CPU."""


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device; `held` is the CPU tensor with its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        """Make a tensor without memory, of the shape, strides and dtype of `held`."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=META,
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Refuse: nothing computes where the device is not pretended."""
        raise DeviceMixError(f"{func} outside of `with pretended_device`")

    @property
    def device(self):
        """The device that the program believes in."""
        return CUDA


def on_device(value):
    """Return whether `value` is a tensor of the pretended device."""
    return isinstance(value, DeviceTensor)


def held_by(value):
    """Return the CPU tensor of a DeviceTensor, anything else as it is."""
    return value.held if on_device(value) else value


def mapped(function, value):
    """Return an operator's argument or result with `function` applied, also inside of lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, item) for item in value)
    return function(value)


def tensors_in(values):
    """Return the tensors among an operator's arguments."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def known(value):
    """Return "meta" for the pretended device, anything else as it is."""
    is_cuda = isinstance(value, (torch.device, str)) and str(value).startswith("cuda")
    return META if is_cuda else value


class FromPython(TorchFunctionMode):
    """Calls from Python: "cuda" becomes "meta" on the way in; a tensor's properties are CUDA's."""

    def __init__(self, owner):
        super().__init__()
        self.owner = owner
        self.of_tensors = {
            torch.Tensor.is_cuda.__get__: lambda tensor: True,
            torch.Tensor.device.__get__: lambda tensor, *_: CUDA,
            torch.Tensor.data.__set__: lambda tensor, new: setattr(tensor, "held", new.held),
            torch.Tensor.tolist: self.tolist,
        }

    def tolist(self, tensor):
        """Return the numbers of a DeviceTensor."""
        self.owner.waits["tolist"] += 1
        return tensor.held.tolist()

    def pin(self, tensor):
        """Return a copy in what counts as pinned memory."""
        copy = tensor.clone()
        self.owner.pinned[copy.data_ptr()] = copy  # kept, or its address would be used again
        return copy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call func, with devices that torch knows."""
        kwargs = kwargs or {}
        if args and on_device(args[0]) and func in self.of_tensors:
            return self.of_tensors[func](*args)
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return self.pin(*args)
        given = {name: known(value) for name, value in kwargs.items()}
        if func in (torch.tensor, torch.as_tensor):  # they copy where no mode sees it
            device = given.pop("device", None)
            made = func(*args, **given)
            return made if device is None else made.to(device)
        return func(*map(known, args), **given)


@functools.cache
def is_composite(func):
    """Return whether an operator is made of others, into which autograd would take it apart."""
    return func._can_decompose()


class PretendDevice(TorchDispatchMode):
    """The device, while it is entered, and what was counted since reset()."""

    def __init__(self):
        super().__init__()
        self.pinned = {}  # {address: tensor}
        self.waits = collections.Counter()
        self.operators = collections.Counter()

    def reset(self):
        """Forget what was counted."""
        self.waits.clear()
        self.operators.clear()

    @property
    def counts(self):
        """(operators, waits) since reset()."""
        return self.operators.total(), self.waits.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute an operator on what its tensors hold."""
        kwargs = dict(kwargs or {})
        tensors = tensors_in((*args, *kwargs.values()))
        ours = any(map(on_device, tensors))
        targets = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)]
        to_us = META in targets
        if not (ours or to_us):
            return func(*args, **kwargs)
        if is_composite(func):
            with self, torch._C.DisableTorchFunction():
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        refuse_mix(func, tensors)
        if to_us:
            kwargs["device"] = torch.device("cpu")
        with torch._C.DisableTorchFunction():
            inner = {name: mapped(held_by, value) for name, value in kwargs.items()}
            result = func(*(mapped(held_by, value) for value in args), **inner)
        into = args[0] if func.overloadpacket == aten.copy_ else None
        away = (targets and not to_us) or (into is not None and not on_device(into))
        self.count(func, tensors, away, args, kwargs)
        return self.results(func, tensors, result, away)

    @staticmethod
    def results(func, tensors, result, away):
        """Return what the CPU computed: arguments that were changed in place, or new tensors."""
        changed = {id(held_by(t)): t for t in tensors} if func._schema.is_mutable else {}

        def found(value):
            if id(value) in changed:
                return changed[id(value)]
            return DeviceTensor(value) if isinstance(value, torch.Tensor) and not away else value

        # torch keeps a view of a tensor that is no inference tensor to the rules of autograd.
        plain_view = func.is_view and not tensors[0].is_inference()
        with torch.inference_mode(torch.is_inference_mode_enabled() and not plain_view):
            return mapped(found, result)

    def count(self, func, tensors, away, args, kwargs):
        """Count an operator and the wait that it is."""
        name = func.overloadpacket
        from_host = name in COPIES and not all(map(on_device, tensors))
        if away:
            self.waits["to the CPU"] += 1
        elif from_host:
            source = next(t for t in tensors if not on_device(t))
            pinned = source.untyped_storage().data_ptr() in self.pinned
            if not (pinned and kwargs.get("non_blocking")):
                self.waits["from pageable memory"] += 1
        elif name in READS:
            self.waits[str(name)] += 1
        elif name in INDEXED and not (len(args) > 2 and args[2].numel() == 1):  # that is a fill
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            self.waits["mask"] += len(masks)
        if not (func.is_view or away or from_host or name in FREE):
            self.operators[str(func)] += 1


def refuse_mix(func, tensors):
    """Raise DeviceMixError where CUDA would; also for CPU indices, which it copies and waits."""
    cpu = [tuple(t.shape) for t in tensors if not on_device(t) and t.dim()]
    if any(t.is_meta and not on_device(t) for t in tensors):
        raise DeviceMixError(f"{func}: a tensor lost its numbers")
    if cpu and any(map(on_device, tensors)) and func.overloadpacket not in COPIES:
        raise DeviceMixError(f"{func} of tensors on the device and on the CPU, {cpu}")


@contextlib.contextmanager
def pretended_device():
    """Yield a PretendDevice that everything in the block runs on.

    torch's own code takes its tensors for those of a device that it has kernels for.
    """
    device = PretendDevice()
    wait = functools.partial(device.waits.update, ["synchronize"])
    kinds = [*_foreach_utils._get_foreach_kernels_supported_devices(), "meta"]
    name = "_get_foreach_kernels_supported_devices"
    types = [*_foreach_utils._foreach_supported_types, DeviceTensor]
    with (
        mock.patch.object(torch.cuda, "synchronize", wait),
        mock.patch.object(_foreach_utils, name, lambda: kinds),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", types),
        FromPython(device),
        device,
    ):
        yield device
