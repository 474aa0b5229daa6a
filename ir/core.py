"""SSA values, operations, blocks and regions.

A module is an `Operation` named "module" whose one region holds functions; a function is an operation with a region, and
so on down to loop bodies: one structure all the way. Operations of a block form a linked list, so that
inserting and erasing cost O(1). Every value knows its uses.

Entry points: `Operation.create`, `Block.append`, `Operation.walk`, `Value.replace_all_uses_with`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .attributes import attribute_equal
from .types import Type

if TYPE_CHECKING:
    from .opdef import OpDef

__all__ = [
    "UNKNOWN",
    "Block",
    "BlockArg",
    "IRError",
    "Location",
    "OpResult",
    "Operation",
    "Region",
    "Value",
    "clone_region",
    "equivalent",
]


class IRError(Exception):
    """Malformed IR or an impossible request on it. The message says what, where and what to do next."""


@dataclass(frozen=True)
class Location:
    """Where an op comes from: a Python file and line, and the path of the nn.Module around it."""

    file: str = ""
    line: int = 0
    module: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else "<unknown>"
        return f"{place} ({self.module})" if self.module else place


UNKNOWN = Location()


class Value:
    """A typed SSA value. `uses` maps (operation, operand index) to None, in the order the uses were made."""

    __slots__ = ("name", "type", "uses")

    def __init__(self, type: Type, name: str = ""):
        self.type = type
        self.uses: dict[tuple[Operation, int], None] = {}
        self.name = name

    @property
    def owner(self) -> Operation | Block:
        raise NotImplementedError  # abstract: OpResult and BlockArg define it

    @property
    def defining_op(self) -> Operation | None:
        return None

    @property
    def users(self) -> list[Operation]:
        """The operations that use this value, each once, in order."""
        return list(dict.fromkeys(op for op, _ in self.uses))

    def replace_all_uses_with(self, other: Value) -> None:
        if other is self:
            return
        for op, i in list(self.uses):
            op.set_operand(i, other)
        if not other.name:
            other.name = self.name

    def replace_uses_if(self, other: Value, condition: Callable[[Operation], bool]) -> None:
        for op, i in list(self.uses):
            if condition(op):
                op.set_operand(i, other)


class OpResult(Value):
    __slots__ = ("index", "op")

    def __init__(self, op: Operation, index: int, type: Type, name: str = ""):
        super().__init__(type, name)
        self.op = op
        self.index = index

    @property
    def owner(self) -> Operation:
        return self.op

    @property
    def defining_op(self) -> Operation:
        return self.op


class BlockArg(Value):
    __slots__ = ("block", "index")

    def __init__(self, block: Block, index: int, type: Type, name: str = ""):
        super().__init__(type, name)
        self.block = block
        self.index = index

    @property
    def owner(self) -> Block:
        return self.block


class Operation:
    """One operation. Its meaning is its `OpDef`, found by name in the registry."""

    __slots__ = ("_next", "_operands", "_prev", "attributes", "location", "name", "opdef", "parent", "regions", "results")

    def __init__(self, opdef: OpDef, operands: Sequence[Value], attributes: dict[str, Any], result_types: Sequence[Type],
                 regions: Sequence[Region], location: Location):
        self.opdef = opdef
        self.name = opdef.name
        self._operands: list[Value] = []
        self.attributes = attributes
        self.results = [OpResult(self, i, t) for i, t in enumerate(result_types)]
        self.regions = list(regions)
        for r in self.regions:
            r.parent = self
        self.location = location
        self.parent: Block | None = None
        self._prev: Operation | None = None
        self._next: Operation | None = None
        for v in operands:
            self.add_operand(v)

    @staticmethod
    def create(name: str, operands: Sequence[Value] = (), attributes: dict[str, Any] | None = None,
               result_types: Sequence[Type] = (), regions: Sequence[Region] = (), location: Location = UNKNOWN) -> Operation:
        """A detached operation. IRError if `name` is not registered (with the nearest names)."""
        from .opdef import lookup  # opdef registers on import and needs these classes
        return Operation(lookup(name), operands, dict(attributes or {}), result_types, regions, location)

    # -- operands and results

    @property
    def operands(self) -> tuple[Value, ...]:
        return tuple(self._operands)

    def set_operand(self, i: int, value: Value) -> None:
        old = self._operands[i]
        del old.uses[(self, i)]
        self._operands[i] = value
        value.uses[(self, i)] = None

    def add_operand(self, value: Value) -> None:
        if not isinstance(value, Value):
            raise TypeError(f"operand {len(self._operands)} of '{self.name}' is a {type(value).__name__}, not a Value")
        value.uses[(self, len(self._operands))] = None
        self._operands.append(value)

    def set_operands(self, values: Sequence[Value]) -> None:
        for i, old in enumerate(self._operands):
            del old.uses[(self, i)]
        self._operands = []
        for v in values:
            self.add_operand(v)

    @property
    def result(self) -> OpResult:
        """The single result; IRError if there is not exactly one."""
        if len(self.results) != 1:
            raise IRError(f"'{self.name}' has {len(self.results)} results, not one")
        return self.results[0]

    def __getitem__(self, key: str) -> Any:
        """An attribute, or the op definition's default for it."""
        if key in self.attributes:
            return self.attributes[key]
        spec = self.opdef.attrs.get(key)
        if spec is None or spec.required:
            raise KeyError(f"'{self.name}' has no attribute '{key}'")
        return spec.default

    def has_trait(self, trait: Any) -> bool:
        return trait in self.opdef.traits

    @property
    def region(self) -> Region:
        if len(self.regions) != 1:
            raise IRError(f"'{self.name}' has {len(self.regions)} regions, not one")
        return self.regions[0]

    @property
    def body(self) -> Block:
        """The single block of the single region."""
        return self.region.block

    # -- position

    @property
    def next(self) -> Operation | None:
        return self._next

    @property
    def prev(self) -> Operation | None:
        return self._prev

    @property
    def parent_op(self) -> Operation | None:
        return self.parent.parent.parent if self.parent and self.parent.parent else None

    def detach(self) -> Operation:
        if self.parent is not None:
            self.parent._unlink(self)
        return self

    def erase(self) -> None:
        """Removes the operation for good. IRError if a result is still used."""
        for r in self.results:
            if r.uses:
                raise IRError(f"'{self.name}' is erased while result {r.index} is used by '{next(iter(r.uses))[0].name}'")
        self.detach()
        self.drop_references()

    def drop_references(self) -> None:
        self.set_operands(())
        for region in self.regions:
            for block in region.blocks:
                for op in block:
                    op.drop_references()

    def move_before(self, other: Operation) -> None:
        assert other.parent is not None
        self.detach()
        other.parent.insert_before(other, self)

    def walk(self) -> Iterator[Operation]:
        """This operation and all nested ones, outer first. The current op may be erased while walking."""
        yield self
        for region in self.regions:
            for block in region.blocks:
                op = block.first
                while op is not None:
                    following = op._next
                    yield from op.walk()
                    op = following

    def clone(self, mapping: dict[Value, Value] | None = None) -> Operation:
        """A detached deep copy; operands and nested uses are renamed through `mapping`, which learns the new results."""
        mapping = {} if mapping is None else mapping
        new = Operation(self.opdef, [mapping.get(v, v) for v in self._operands], dict(self.attributes),
                        [r.type for r in self.results], (), self.location)
        for old_r, new_r in zip(self.results, new.results, strict=True):
            new_r.name = old_r.name
            mapping[old_r] = new_r
        for region in self.regions:
            copied = clone_region(region, mapping)
            copied.parent = new
            new.regions.append(copied)
        return new

    def __str__(self) -> str:
        from .printer import print_op
        return print_op(self)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Block:
    """A list of operations with arguments."""

    __slots__ = ("_length", "args", "first", "last", "parent")

    def __init__(self, arg_types: Sequence[Type] = (), names: Sequence[str] = ()):
        self.args: list[BlockArg] = []
        self.parent: Region | None = None
        self.first: Operation | None = None
        self.last: Operation | None = None
        self._length = 0
        for i, t in enumerate(arg_types):
            self.add_arg(t, names[i] if i < len(names) else "")

    def add_arg(self, type: Type, name: str = "") -> BlockArg:
        arg = BlockArg(self, len(self.args), type, name)
        self.args.append(arg)
        return arg

    def erase_arg(self, i: int) -> None:
        if self.args[i].uses:
            raise IRError(f"block argument {i} is erased while in use")
        del self.args[i]
        for j, a in enumerate(self.args):
            a.index = j

    def __iter__(self) -> Iterator[Operation]:
        op = self.first
        while op is not None:
            following = op._next
            yield op
            op = following

    def reversed(self) -> Iterator[Operation]:
        op = self.last
        while op is not None:
            before = op._prev
            yield op
            op = before

    def __len__(self) -> int:
        return self._length

    @property
    def ops(self) -> list[Operation]:
        return list(self)

    @property
    def terminator(self) -> Operation:
        if self.last is None:
            raise IRError("the block is empty: it has no terminator")
        return self.last

    def append(self, op: Operation) -> Operation:
        assert op.parent is None, f"{op.name} is already in a block"
        op.parent = self
        op._prev, op._next = self.last, None
        if self.last is None:
            self.first = op
        else:
            self.last._next = op
        self.last = op
        self._length += 1
        return op

    def insert_before(self, anchor: Operation, op: Operation) -> Operation:
        assert op.parent is None and anchor.parent is self
        op.parent = self
        op._prev, op._next = anchor._prev, anchor
        if anchor._prev is None:
            self.first = op
        else:
            anchor._prev._next = op
        anchor._prev = op
        self._length += 1
        return op

    def insert_after(self, anchor: Operation, op: Operation) -> Operation:
        return self.append(op) if anchor._next is None else self.insert_before(anchor._next, op)

    def _unlink(self, op: Operation) -> None:
        if op._prev is None:
            self.first = op._next
        else:
            op._prev._next = op._next
        if op._next is None:
            self.last = op._prev
        else:
            op._next._prev = op._prev
        op.parent = op._prev = op._next = None
        self._length -= 1


class Region:
    """A list of blocks. Control flow is structured in aicc, so a region has one block; the list leaves room."""

    __slots__ = ("blocks", "parent")

    def __init__(self, blocks: Iterable[Block] = ()):
        self.blocks: list[Block] = []
        self.parent: Operation | None = None
        for b in blocks:
            b.parent = self
            self.blocks.append(b)

    @property
    def block(self) -> Block:
        if len(self.blocks) != 1:
            raise IRError(f"expected a region of one block, found {len(self.blocks)}")
        return self.blocks[0]


def clone_region(region: Region, mapping: dict[Value, Value]) -> Region:
    """A deep copy; `mapping` learns the new block arguments and results."""
    new = Region()
    for block in region.blocks:
        b = Block()
        b.parent = new
        for a in block.args:
            mapping[a] = b.add_arg(a.type, a.name)
        for op in block:
            b.append(op.clone(mapping))
        new.blocks.append(b)
    return new


def equivalent(a: Operation, b: Operation, *, locations: bool = False, same: dict[Value, Value] | None = None) -> bool:
    """Structural equality up to the names of values. `same`: what stands in `b` for values from outside `a`; what they define is added."""
    return _equivalent(a, b, {} if same is None else same, locations)


def _equivalent(a: Operation, b: Operation, same: dict[Value, Value], locations: bool) -> bool:
    if (a.name != b.name or len(a._operands) != len(b._operands) or len(a.results) != len(b.results)
            or len(a.regions) != len(b.regions) or not attribute_equal(a.attributes, b.attributes)
            or (locations and a.location != b.location)):
        return False
    if any(same.get(x, x) is not y for x, y in zip(a._operands, b._operands, strict=True)):
        return False
    for x, y in zip(a.results, b.results, strict=True):
        if x.type != y.type:
            return False
        same[x] = y
    for ra, rb in zip(a.regions, b.regions, strict=True):
        if len(ra.blocks) != len(rb.blocks):
            return False
        for ba, bb in zip(ra.blocks, rb.blocks, strict=True):
            if len(ba.args) != len(bb.args) or len(ba) != len(bb):
                return False
            for p, q in zip(ba.args, bb.args, strict=True):
                if p.type != q.type:
                    return False
                same[p] = q
            if not all(_equivalent(x, y, same, locations) for x, y in zip(ba, bb, strict=True)):
                return False
    return True
