# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Watches every operator that runs: which bytes of which storage it reads and writes, on which stream of clocks.py; and
reports what no event orders.

A storage that is freed goes back to the stream that it was allocated on, as PyTorch's caching allocator does: the next
allocation there may be the same memory, so whatever another stream did with it must come before.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.streams.clocks import Device, place_of_caller, place_of_file

# What torch's schemas do not say of collectives: the arguments that are read and written.
COLLECTIVES = {
    "c10d::_allgather_base_": ((1,), (0,)),
    "c10d::_reduce_scatter_base_": ((1,), (0,)),
    "c10d::alltoall_base_": ((1,), (0,)),
    "c10d::allgather_": ((1,), (0,)),
    "c10d::allreduce_": ((0,), (0,)),
    "c10d::broadcast_": ((0,), (0,)),
    "c10d::barrier": ((), ()),
}
# Their results, or the sizes of these, are for the host.
READ_BY_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}
# Ask for shape and kind of a tensor, not for its elements.
ABOUT = {"aten::is_pinned", *(f"aten::{kind}_like" for kind in ("empty", "zeros", "ones", "full"))}
ABOUT |= {f"aten::new_{kind}" for kind in ("empty", "empty_strided", "zeros", "ones", "full")}
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.as_tensor}
FROM_VALUES = {torch.tensor, torch.as_tensor}


@dataclass(frozen=True)
class Access:
    """Holds who did something to some bytes: the operation's number on its stream."""

    stream: int
    number: int
    what: str


@dataclass
class Span:
    """Holds the newest accesses to the bytes from ``begin`` to ``end``: the write, and each stream's read since."""

    begin: int
    end: int
    write: Access | None = None
    reads: dict[int, Access] = field(default_factory=dict)

    def part(self, begin: int, end: int) -> Span:
        """Returns what is known of these bytes of it."""
        return replace(self, begin=begin, end=end, reads=dict(self.reads))


class Memory:
    """Holds what is known of one storage.

    Attributes:
        is_of_host: pinned, or made without a device.
        users: the newest access of each stream.
    """

    def __init__(self, alive: StorageWeakRef, nbytes: int, home: int):
        self.alive = alive
        self.home = home
        self.is_of_host = False
        self.users: dict[int, Access] = {}
        self.spans = [Span(0, nbytes)]

    def take(self, begin: int, end: int) -> Iterator[Span]:
        """Yields the spans that cover these bytes, cut at both ends."""
        if self.spans[-1].end < end:  # it has grown
            self.spans.append(Span(self.spans[-1].end, end))
        cut = []
        for span in self.spans:
            edges = [span.begin, *(edge for edge in (begin, end) if span.begin < edge < span.end), span.end]
            cut += [span.part(*ends) for ends in zip(edges, edges[1:])] if len(edges) > 2 else [span]
        self.spans = cut
        yield from (span for span in cut if begin <= span.begin and span.end <= end)
        merged = cut[:1]
        for span in cut[1:]:
            if (span.write, span.reads) == (merged[-1].write, merged[-1].reads):
                merged[-1].end = span.end
            else:
                merged.append(span)
        self.spans = merged


def extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the first byte of its storage that a tensor may touch, and the one behind the last."""
    begin = tensor.storage_offset() * tensor.element_size()
    if not tensor.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


class Accesses:
    """Enters accesses, and compares each with those before it."""

    def __init__(self, device: Device):
        self._device = device
        self._memories: dict[int, Memory] = {}
        self._foreign: dict[int, Memory] = {}  # used on another stream than their own
        self._freed: dict[int, list[Access]] = {}  # by the stream whose memory it is again

    def memory(self, tensor: Tensor) -> Memory:
        """Returns what is known of the tensor's storage; new ones are of the current stream."""
        storage = tensor.untyped_storage()
        alive = StorageWeakRef(storage)  # while it lives no other storage has its address
        found = self._memories.get(alive.cdata)
        if found is None:
            home = self._device.current_stream().number
            found = self._memories[alive.cdata] = Memory(alive, storage.nbytes(), home)
        return found

    def begin(self, what: str) -> Access:
        """Enqueues an operation on the current stream."""
        stream = self._device.current_stream()
        return Access(stream.number, stream.advance(), what)

    def allocate(self, access: Access) -> None:
        """Lets the operation take memory of its stream's, which may be any that was freed before."""
        for key, memory in list(self._foreign.items()):
            if memory.alive.expired():
                del self._foreign[key]
                others = (user for user in memory.users.values() if user.stream != memory.home)
                self._freed.setdefault(memory.home, []).extend(others)
        for user in self._freed.pop(access.stream, ()):
            self._require(user, access, "freed and reused")

    def read(self, tensor: Tensor, access: Access) -> None:
        """Enters that the operation reads the tensor."""
        memory = self._use(tensor, access)
        for span in memory.take(*extent(tensor)):
            if span.write is not None:
                self._require(span.write, access, "read before it is written")
            span.reads[access.stream] = access

    def write(self, tensor: Tensor, access: Access) -> None:
        """Enters that the operation writes the tensor."""
        memory = self._use(tensor, access)
        for span in memory.take(*extent(tensor)):
            if span.write is not None:
                self._require(span.write, access, "written twice in any order")
            for reader in span.reads.values():
                self._require(reader, access, "overwritten while it is read")
            span.write, span.reads = access, {}

    def read_by_host(self, tensors: list[Tensor], by: str) -> None:
        """Lets the host read tensors: in its own memory what it has seen to be over, others behind a wait."""
        pinned = [tensor for tensor in tensors if self.memory(tensor).is_of_host]
        if len(pinned) < len(tensors):
            self._device.wait(self._device.current_stream().clock, by)
        for tensor in pinned:
            for span in self.memory(tensor).take(*extent(tensor)):
                write = span.write
                if write is not None and self._device.seen.get(write.stream, 0) < write.number:
                    self._device.report(
                        f"read by the host before it is written: {self._told(write)}; {place_of_caller()}"
                    )

    def _use(self, tensor: Tensor, access: Access) -> Memory:
        memory = self.memory(tensor)
        memory.users[access.stream] = access
        if access.stream != memory.home and not memory.is_of_host:
            self._foreign[memory.alive.cdata] = memory
        return memory

    def _require(self, first: Access, second: Access, otherwise: str) -> None:
        clock = self._device.stream_of(second.stream).clock
        if first.stream != second.stream and clock.get(first.stream, 0) < first.number:
            self._device.report(f"{otherwise}: {self._told(first)}; {self._told(second)}")

    def _told(self, access: Access) -> str:
        return f"{access.what} on {self._device.stream_of(access.stream).name}"


@dataclass(frozen=True)
class Operands:
    """Says what an operator does with which arguments, by their places; views it neither reads nor writes.

    Attributes:
        names: of all arguments.
        makes: the places of new tensors in its results.
    """

    names: tuple[str, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    makes: tuple[int, ...]
    has_one_result: bool

    @classmethod
    @functools.cache
    def of(cls, function) -> Operands:
        """Returns those of an operator, by its schema."""
        schema = function._schema
        names = tuple(argument.name for argument in schema.arguments)
        if schema.name.startswith("c10d::"):
            return cls(names, *COLLECTIVES[schema.name], makes=(), has_one_result=False)
        aliases = [argument.alias_info for argument in schema.arguments]
        asks = schema.name not in ABOUT
        return cls(
            names,
            reads=tuple(at for at, alias in enumerate(aliases) if asks and alias is None),
            writes=tuple(at for at, alias in enumerate(aliases) if alias is not None and alias.is_write),
            makes=tuple(at for at, returned in enumerate(schema.returns) if returned.alias_info is None),
            has_one_result=len(schema.returns) == 1,
        )

    def given(self, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors that a call reads, and those that it writes."""
        values = [*args, *map(kwargs.get, self.names[len(args) :])]
        return _tensors(values, self.reads), _tensors(values, self.writes)

    def made(self, result) -> list[Tensor]:
        """Returns the new tensors of a call's result."""
        return _tensors([result] if self.has_one_result else result, self.makes)


def _tensors(values, places: tuple[int, ...]) -> list[Tensor]:
    found = []
    for at in places:
        value = values[at]
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


class WatchOperators(TorchDispatchMode):
    """Enters what every operator reads and writes."""

    def __init__(self, device: Device, accesses: Accesses):
        super().__init__()
        self.calls: Counter[str] = Counter()  # by name
        self._device, self._accesses = device, accesses

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs, accesses = function._schema.name, dict(kwargs or {}), self._accesses
        self.calls[name] += 1
        operands = Operands.of(function)
        reads, writes = operands.given(args, kwargs)
        is_pinned = bool(kwargs.pop("pin_memory", False))
        of_host = [accesses.memory(tensor).is_of_host for tensor in reads + writes]
        by_host = is_pinned or (bool(of_host) and all(of_host))
        crosses = name == "aten::copy_" and any(of_host) and not by_host
        access = None
        if not by_host:
            access = accesses.begin(f"{name} in {place_of_caller()}")
            for tensor in reads:
                accesses.read(tensor, access)
            for tensor in writes:
                accesses.write(tensor, access)
        if name in READ_BY_HOST:
            accesses.read_by_host(reads, name)
        elif crosses and not (args[2:] or kwargs.get("non_blocking")):
            self._device.wait(self._device.current_stream().clock, "copy")
        elif not crosses:  # what lies with the host it reads itself
            accesses.read_by_host([tensor for tensor in reads if accesses.memory(tensor).is_of_host], name)
        result = function(*args, **kwargs)
        for tensor in operands.made(result):
            if access is None:
                accesses.memory(tensor).is_of_host = True
            else:
                accesses.allocate(access)
                accesses.write(tensor, access)
        return result


class WatchHost(TorchFunctionMode):
    """Sees what no operator shows: lists made of tensors, and where this package's new tensors lie."""

    def __init__(self, device: Device, accesses: Accesses):
        super().__init__()
        self._device, self._accesses = device, accesses

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.tolist:
            self._accesses.read_by_host([args[0]], "tolist")
        result = function(*args, **kwargs)
        if function in FACTORIES and place_of_file(inspect.currentframe().f_back.f_code.co_filename):
            if kwargs.get("device") is None:
                self._accesses.memory(result).is_of_host = True
            elif function in FROM_VALUES:
                self._device.wait(self._device.current_stream().clock, function.__name__)
        return result


@contextmanager
def watched(device: Device) -> Iterator[WatchOperators]:
    """Puts the model in the place of CUDA inside the block, and watches all operators there."""
    cuda = {
        "Stream": device.make_stream,
        "Event": device.make_event,
        "current_stream": device.current_stream,
        "stream": device.on,
    }
    accesses = Accesses(device)
    operators = WatchOperators(device, accesses)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        patches.enter_context(mock.patch.object(torch.cuda.nvtx, "range", lambda name: nullcontext()))
        patches.enter_context(WatchHost(device, accesses))
        patches.enter_context(operators)
        yield operators
