"""Which matrix products a vendor's library computes: on GPUs, dense ones where cuBLASLt is modelled to be faster than a generated kernel.

Pass `library`, early (while each op of the model is still an op of its own): a contraction, with what the library does along the way (a
conversion of the result, a bias, a residual, a ReLU), becomes a `tensor.library`: its region says what it means. All other readers stay
kernels of their own. Left to generated kernels are
  - small and skinny products: a matrix-vector product is bound by memory, and its reader fuses for nothing;
  - contractions of attention (batched products of activations with a reduction in between), which stream through one kernel;
  - those whose operands have no strides that a library could be told.
The choice compares modelled times (`library_cost.py`), and says them in a remark.

Pass `library-operands`, after layouts are settled: operands that have got a layout that the library cannot read are copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import Block, Builder, Dim, IRError, Operation, Region, Target, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of
from ..ir.expr import Expr, as_int, evaluate, free_symbols, product, substitute
from ..ir.passes import Pass, PassContext, register
from .library_cost import Work, generated_seconds, host_is_early, library_seconds, turning_pays, unpack_seconds
from .products import Product, is_linear, read_product, walk_of
from .siblings import sibling_of
from .stream_growth import MAX_WIDTH
from .structured import EXPENSIVE, body_ops, identity_map, is_contraction, is_pointwise, reshape_like
from .tiling.roles import Roles, roles_of

__all__ = ["WORKSPACE", "WORKSPACE_SLACK", "Library", "LibraryOperands", "library_shape"]

TENSOR_MAPS = 90
"""The compute capability on which generated products reach the library's speed, so that what they fuse is gained."""
OLDEST = 80
"""The lowest compute capability for which the library is asked."""
WORKSPACE = {80: 8 << 20, 90: 32 << 20}
"""Bytes of temporary memory for one product, by compute capability (what NVIDIA advises)."""
RESULTS = {"bf16": ("bf16", "f32"), "f16": ("f16", "f32"), "f32": ("f32",), "f64": ("f64",)}
"""Types of the result, by the type of the operands."""
WORKSPACE_SLACK = 256
"""Bytes more that are allocated, for the library wants them aligned to this."""
USUAL_SIZE = 1024
"""What a symbolic size is taken to be when the times are compared."""
SKINNY = 16
MARGIN = 1e-6
"""Seconds that the library must win by: its calls cost the host more, and what is generated fuses further."""
HEAVY_OPS, LIGHT = {"arith.erf": 1.0, "arith.tanh": 0.6}, 0.25
"""How much functions cost in an epilogue, in units of one erf."""
READ = 1.5
"""How much reading one more tensor of the result's size costs there: matrix units' registers hold odd pieces of rows."""
REACH = 60
"""How many ops attention may have between its two products."""


@register
@dataclass(frozen=True)
class Library(Pass):
    """See the module docstring. `epilogues`: whether the library may do more than convert the result; `always`: without asking the model;
    `replayed`: launches cost the host nothing (CUDA graphs); nor do they in programs that keep the device busy for longer than the host."""

    name: ClassVar[str] = "library"
    epilogues: bool = True
    always: bool = False
    replayed: bool = False

    def run(self, module: Operation, ctx: PassContext) -> None:
        if not ctx.target.is_gpu or ctx.target.capability < OLDEST:
            ctx.remark("note", "no library for this target")
            return
        taken = 0
        for func in [f for f in module.body if f.name == "func"]:
            sizes = {s: max(low or 0, min(USUAL_SIZE, USUAL_SIZE if high is None else high)) for s, (low, high) in func["symbols"].items()}
            attention = _attention(func)
            hidden = self.replayed or host_is_early(ctx.target, _works(func, sizes))
            for op in list(func.body):
                if op.parent is not None and is_contraction(op) and element_type(op.result.type).is_float:
                    taken += self._consider(op, func, sizes, op in attention, hidden, ctx)
        ctx.remark("done", f"{taken} matrix products by the library")

    def _consider(self, op: Operation, func: Operation, sizes: dict[str, int], streams: bool, hidden: bool, ctx: PassContext) -> bool:
        found = _readable(op, func)
        if isinstance(found, str) and not streams and _turn(op, sizes, ctx.target, func):
            ctx.remark("done", f"an operand of a product is copied into its order: {found}", op.location)
            found = _readable(op, func)
        if isinstance(found, str):
            ctx.remark("note", f"a product is generated: {found}", op.location)
            return False
        shape = tuple(int(evaluate(s, sizes)) for s in found.sizes)
        text = _text(found, op)
        if streams and not self.always:
            ctx.remark("note", f"{text} is generated: it is part of attention", op.location)
            return False
        chain = _Chain.of(op, found, self.epilogues)
        if not self.always:
            if ctx.target.capability == TENSOR_MAPS and sibling_of(op) is not None and all(n % 128 == 0 for n in shape[1:]):
                ctx.remark("note", f"{text} is generated: it is computed beside another product that its reader needs too", op.location)
                return False
            if min(shape[1:3]) <= SKINNY:
                ctx.remark("note", f"{text} is generated: with {min(shape[1:3])} rows or columns it is bound by memory", op.location)
                return False
            heavy = _heavy_readers(chain.value)
            work = Work(_computed_in(op, ctx.target), shape, element_type(chain.value.type).bytes, heavy is not None, heavy or 0.0, hidden)
            theirs = library_seconds(ctx.target, work) + _unpacking(op, ctx.target)
            ours = generated_seconds(ctx.target, work)
            verdict = f"{_names(chain)}modelled {theirs * 1e6:.0f} us by cuBLASLt, {ours * 1e6:.0f} us generated"
            if theirs + MARGIN >= ours:
                ctx.remark("note", f"{text} is generated: {verdict}", op.location)
                return False
        else:
            verdict = f"{_names(chain)}as asked"
        chain.outline(f"{text}: {verdict}")
        ctx.remark("done", f"{text} by cuBLASLt: {verdict}", op.location)
        return True


def _computed_in(op: Operation, target: Target) -> str:
    """The type that a product is computed in."""
    return "tf32" if "tf32" in target.features and element_type(op.operands[0].type).name == "f32" else _input_type(op)


def _works(func: Operation, sizes: dict[str, int]) -> list[Work]:
    """All products that the library could compute, by themselves."""
    ops = [op for op in func.body if is_contraction(op) and element_type(op.result.type).is_float]
    found = [(op, _readable(op, func)) for op in ops]
    return [Work(_input_type(op), tuple(int(evaluate(s, sizes)) for s in p.sizes), element_type(op.result.type).bytes)
            for op, p in found if not isinstance(p, str)]


def _gets_another_layout(v: Value, func: Operation) -> bool:
    """It is a result in another order than it has now (channels last): the pass `layout` is going to give it that."""
    assert isinstance(v.type, TensorType)
    attrs = func["result_attrs"]
    return v.defining_op is not None and any(
        r is v and k < len(attrs) and attrs[k].get("strides") and tuple(attrs[k]["strides"]) != v.type.layout
        for k, r in enumerate(func.body.terminator.operands))


def _turn(op: Operation, sizes: dict[str, int], target: Target, func: Operation) -> bool:
    """Copies the operands that are no matrix in memory and whose contiguous dimension is not summed over (heads that were moved, in the gradient
    of a weight), where that costs less than a generated kernel loses on them. True if anything was copied."""
    roles, types = roles_of(op), [element_type(v.type).name for v in op.operands]
    if roles is None or types[0] != types[1] or types[0] not in RESULTS or any(fill_of(op, i) is not None for i in range(2)):
        return False
    work = 2.0 * as_int(product(evaluate(d, sizes) for d in op["dims"]))
    copied = 0
    for i, own in ((roles.left, roles.m), (roles.right, roles.n)):
        order, strides, v = (*roles.batch, *roles.k, *own), walk_of(op, i), op.operands[i]
        assert isinstance(v.type, TensorType)
        if strides is not None and all(is_linear(op["dims"], group, strides) for group in (roles.batch, roles.k, own)):
            continue
        if _gets_another_layout(v, func):
            continue
        innermost = {s for e, stride in zip(op["maps"][i], v.type.layout, strict=True) if stride == 1 for s in free_symbols(e)}
        if not innermost or not innermost <= {f"d{d}" for d in own}:
            continue
        moved = 2.0 * v.type.dtype.bytes * as_int(product(evaluate(op["dims"][d], sizes) for d in order))
        if not turning_pays(target, types[0], work, moved):
            continue
        renamed = {f"d{d}": sym(f"d{j}") for j, d in enumerate(order)}
        copy = Builder.before_op(op).generic([v], [tuple(substitute(e, renamed) for e in op["maps"][i])], [op["dims"][d] for d in order],
                                             lambda b, x: x, name=v.name)
        op.set_operand(i, copy.result)
        maps = list(op["maps"])
        maps[i] = tuple(sym(f"d{d}") for d in order)
        op.attributes["maps"] = tuple(maps)
        copied += 1
    return copied > 0


def _input_type(op: Operation) -> str:
    return element_type(op.operands[0].type).name


def _text(found: Product, op: Operation) -> str:
    batch, m, n, k = found.sizes
    return f"{'' if batch == 1 else f'{batch} x '}{m}x{n}x{k} {_input_type(op)}"


def _names(chain: _Chain) -> str:
    names = [r for r in chain.roles if r not in ("a", "b")] + ([chain.act] if chain.act != "none" else [])
    return f"with {' and '.join('residual' if n == 'c' else n for n in names)}, " if names else ""


def _readable(op: Operation, func: Operation) -> Product | str:
    """The product, if the library has its types and it has something to sum."""
    types = [element_type(v.type).name for v in op.operands]
    if types[0] != types[1] or types[0] not in RESULTS:
        return f"operands of {types[0]} and {types[1]}"
    if element_type(op.result.type).name != ("f64" if types[0] == "f64" else "f32"):
        return f"a sum in {element_type(op.result.type)}"
    if any(o.name == "arith.cast" and element_type(o.result.type) != element_type(op.result.type) for o in body_ops(op)):
        return "operands are rounded first"
    found = read_product(op)
    if isinstance(found, Product):
        k = found.sizes[3]
        ranges = func["symbols"]
        if k == 0 or (isinstance(k, Expr) and any(ranges.get(s, (0,))[0] in (0, None) for s in free_symbols(k))):
            return "there may be nothing to sum"
    return found


def _unpacking(op: Operation, target: Target) -> float:
    """Seconds for operands that are computed from fewer bytes: the library wants them in memory, a generated kernel unpacks them while it loads."""
    total = 0.0
    for v in op.operands:
        t = v.type
        assert isinstance(t, TensorType)
        read = _source_bytes(v)
        if isinstance(t.numel, int) and read is not None and read < t.numel * t.dtype.bytes:
            total += unpack_seconds(target, read, t.numel * t.dtype.bytes)
    return total


def _source_bytes(v: Value, depth: int = 12) -> int | None:
    """Bytes that the pointwise ops before `v`, which serve it alone, read; None if there are none."""
    maker = v.defining_op
    if maker is None or not is_pointwise(maker) or depth == 0 or any(len(r.users) != 1 for r in maker.results):
        return None
    total = 0
    for x in dict.fromkeys(maker.operands):
        t = x.type
        assert isinstance(t, TensorType)
        if not isinstance(t.numel, int):
            return None
        total += _source_bytes(x, depth - 1) or t.numel * t.dtype.bytes
    return total


def _heavy_readers(v: Value) -> float | None:
    """How much the pointwise ops compute that would be fused with the product: None if there are none, and it must be written anyway."""
    total: float | None = None
    while len(v.users) == 1 and is_pointwise(v.users[0]) and len(v.users[0].results) == 1:
        user = v.users[0]
        if all(o.name == "arith.cast" for o in body_ops(user)):
            break  # merges into whoever reads it
        wide = sum(_elements(x) == _elements(v) for x in user.operands if x is not v)
        total = (total or 0.0) + READ * wide + sum(HEAVY_OPS.get(o.name, LIGHT if o.name in EXPENSIVE else 0.0) for o in body_ops(user))
        v = user.result
    return total


def _elements(v: Value) -> Dim:
    return v.type.numel if isinstance(v.type, TensorType) else 1


# -- attention --------------------------------------------------------------------------------------------------------

def _attention(func: Operation) -> set[Operation]:
    """Batched products of activations between which there are only pointwise ops and reductions: of these at least one, or else sizes as narrow
    as those of a head (the backward pass, where the reductions are known)."""
    batched = {op: roles for op in func.body if is_contraction(op) and (roles := roles_of(op)) is not None and roles.batch}
    found: set[Operation] = set()
    for op in batched:
        seen: set[tuple[Operation, bool]] = set()
        stack = [(u, False) for u in op.result.users]
        while stack and len(seen) < REACH:
            user, reduced = stack.pop()
            if (user, reduced) in seen or user.name != "tensor.generic":
                continue
            seen.add((user, reduced))
            if is_contraction(user):
                if user in batched and (reduced or _narrow_between(op, batched[op], user, batched[user])):
                    found |= {op, user}
                continue
            stack += [(u, reduced or user["reductions"] > 0) for r in user.results for u in r.users]
    return found


def _narrow_between(first: Operation, made: Roles, second: Operation, read: Roles) -> bool:
    """The space between the products is larger than what they read and make, along dimensions that one program can hold."""
    width = product(first["dims"][d] for d in made.k)
    own = [n for side in (read.m, read.n) if isinstance(n := product(second["dims"][d] for d in side), int)]
    if not isinstance(width, int) or not own or max(width, min(own)) > MAX_WIDTH:
        return False
    length = product(second["dims"][d] for d in read.k)
    return not isinstance(length, int) or length >= max(width, min(own))


# -- what the library does along the way ------------------------------------------------------------------------------

class _Chain:
    """A product and its readers as one call. `operands` by role; `value` is the result so far."""

    def __init__(self, op: Operation, found: Product):
        self.members = [op]
        self.value: Value = op.result
        self.operands = [op.operands[found.left], op.operands[1 - found.left]]
        self.roles = ["a", "b"]
        self.act = "none"
        self.found = found
        self.results = RESULTS[_input_type(op)]

    @staticmethod
    def of(op: Operation, found: Product, epilogues: bool) -> _Chain:
        chain = _Chain(op, found)
        while chain._extend(epilogues):
            pass
        while len(chain.members) > 1 and len(chain.value.defining_op.operands) == 1 and _widens(chain.value.defining_op):  # type: ignore[union-attr, arg-type]
            chain.members.pop()  # free for readers, and it would cost memory here
            chain.value = chain.members[-1].result
        return chain

    def _extend(self, epilogues: bool) -> bool:
        users = self.value.users
        if len(users) != 1 or len(self.value.uses) != 1 or not is_pointwise(users[0]) or len(users[0].results) != 1:
            return False
        user = users[0]
        at = user.operands.index(self.value)
        m, t = user["maps"][at], self.value.type
        assert isinstance(t, TensorType)
        if m is None or fill_of(user, at) is not None or not reshape_like(m, user["dims"], t.shape):
            return False
        dtype = element_type(user.result.type)
        kind = _kind(user, at)
        if dtype.name not in self.results or kind is None or (kind != "same" and not epilogues):
            return False
        held = [element_type(v.type) for r, v in zip(self.roles, self.operands, strict=True) if r in ("bias", "c")]
        if any(d != dtype for d in held):
            return False
        if kind == "relu":
            if self.act != "none":
                return False
            self.act = "relu"
        elif kind == "add":
            role = self._role(user, 1 - at)
            if role is None or role in self.roles or self.act != "none" or element_type(user.operands[1 - at].type) != dtype:
                return False
            self.roles.append(role)
            self.operands.append(user.operands[1 - at])
        self.members.append(user)
        self.value = user.result
        return True

    def _role(self, user: Operation, i: int) -> str | None:
        """What the other summand is: one number per column, or one per element in the same order."""
        t, m = user.operands[i].type, user["maps"][i]
        assert isinstance(t, TensorType)
        if m is None or fill_of(user, i) is not None:
            return None
        n = self.found.sizes[2]
        dims = user["dims"]
        last = identity_map(len(dims))[-1]
        if t.rank == 1 and t.shape == (n,) and dims[-1] == n and m == (last,) and t.layout == (1,):
            return "bias"
        whole = t.strides is None and reshape_like(m, dims, t.shape)
        return "c" if whole else None

    def outline(self, why: str) -> Operation:
        """Moves the members into a `tensor.library` at the place of the last."""
        last, inside = self.members[-1], set(self.members)
        assert last.parent is not None
        block = Block([v.type for v in self.operands], list(self.roles))
        attrs: dict[str, Any] = {"library": "cublaslt", "roles": tuple(self.roles), "act": self.act, "why": why}
        t = last.result.type
        assert isinstance(t, TensorType)
        made = Builder(last.parent, last, self.members[0].location).create(
            "tensor.library", self.operands, attrs, [TensorType(t.shape, t.dtype)], [Region([block])])
        made.result.name = last.result.name
        last.result.replace_all_uses_with(made.result)
        first = self.members[0]
        first.set_operand(self.found.left, block.args[0])
        first.set_operand(1 - self.found.left, block.args[1])
        for v, arg in zip(self.operands[2:], block.args[2:], strict=True):
            v.replace_uses_if(arg, lambda user: user in inside)
        for op in self.members:
            block.append(op.detach())
        Builder(block, None, last.location).create("tensor.yield", [last.result])
        return made


def _widens(op: Operation) -> bool:
    """Its result takes more memory than its operand, and says no more."""
    return all(o.name == "arith.cast" for o in body_ops(op)) and element_type(op.result.type).bytes > element_type(op.operands[0].type).bytes


def _kind(user: Operation, at: int) -> str | None:
    """What a pointwise op does with its operand `at`: "same" (but for conversions), "relu", "add" (of its other operand), or None."""
    arg = user.body.args[at]

    def origin(v: Value) -> Value:
        while v.defining_op is not None and v.defining_op.name == "arith.cast" and element_type(v.defining_op.operands[0].type).is_float:
            v = v.defining_op.operands[0]
        return v

    if not element_type(user.result.type).is_float:
        return None
    v = origin(user.body.terminator.operands[0])
    if v is arg:
        return "same" if len(user.operands) == 1 else None
    op = v.defining_op
    if op is None or len(op.operands) != 2:
        return None
    sides = [origin(x) for x in op.operands]
    if op.name == "arith.max" and arg in sides and len(user.operands) == 1:
        other = sides[1 - sides.index(arg)].defining_op
        return "relu" if other is not None and other.name == "arith.constant" and other["value"] == 0 else None
    if op.name == "arith.add" and len(user.operands) == 2 and set(sides) == set(user.body.args):
        return "add"
    return None


# -- afterwards -------------------------------------------------------------------------------------------------------

@register
@dataclass(frozen=True)
class LibraryOperands(Pass):
    """After: every `tensor.library` can be described to its library (`product_of` succeeds)."""

    name: ClassVar[str] = "library-operands"

    def run(self, module: Operation, ctx: PassContext) -> None:
        copies = 0
        for func in [f for f in module.body if f.name == "func"]:
            for op in list(func.body):
                if op.name == "tensor.library":
                    copies += _settle(op)
        ctx.remark("done", f"{copies} operands copied for the library")


def _settle(op: Operation) -> int:
    wrong = [i for i, (role, v) in enumerate(zip(op["roles"], op.operands, strict=True))
             if role in ("bias", "c") and _strides(v) is not None]
    if isinstance(read_product(op.body.ops[0], _types(op)), str):
        wrong += [i for i in (0, 1) if _strides(op.operands[i]) is not None]
    for i in wrong:
        v = op.operands[i]
        assert isinstance(v.type, TensorType)
        copy = Builder.before_op(op).generic([v], [identity_map(v.type.rank)], v.type.shape, lambda b, x: x, name=v.name)
        op.set_operand(i, copy.result)
    for arg, v in zip(op.body.args, op.operands, strict=True):
        arg.type = v.type
    return len(wrong)


def _strides(v: Value) -> tuple[Dim, ...] | None:
    return v.type.strides if isinstance(v.type, TensorType) else None


def _types(op: Operation) -> list[TensorType]:
    """The types of the product's operands, in its own order, with the layouts that they have outside."""
    product = op.body.ops[0]
    outer = dict(zip(op.body.args, op.operands, strict=True))
    return [outer[v].type for v in product.operands]  # type: ignore[index, misc]


def library_shape(op: Operation, target: Target) -> dict[str, Any]:
    """What cuBLASLt is told of a `tensor.library`, as `runtime/cublaslt.py` describes it. IRError before `library-operands` has run."""
    found = read_product(op.body.ops[0], _types(op))
    if isinstance(found, str):
        raise IRError(f"the library cannot compute this product: {found}")
    types = {role: element_type(v.type).name for role, v in zip(op["roles"], op.operands, strict=True)} | {"d": element_type(op.result.type).name}
    compute = "f64" if types["a"] == "f64" else "tf32" if types["a"] == "f32" and "tf32" in target.features else "f32"
    return {"sizes": found.sizes, "a": found.a, "b": found.b, "d": found.d, "c": found.d if "c" in types else (), "offset_a": found.offset_a,
            "offset_b": found.offset_b, "types": types, "compute": compute, "bias": "bias" in types, "act": op["act"],
            "workspace": WORKSPACE[90 if target.capability >= 90 else 80], **({"guess": op["guess"]} if op["guess"] else {})}

