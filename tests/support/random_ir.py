"""Random modules at the tensor level, such as no frontend makes: any affine maps, padding, several results, reductions of every kind, scatters.

    module, inputs = random_tensor_module(seed, ops)

Values are small integers held as floats (or integers), and bodies keep them small, so that sums are exact in any order and every pass must give the
same numbers exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from aicc.ir import DTYPES, Block, Builder, Operation, Region, ScalarType, TensorType, Value, make_func, make_module, sym
from aicc.ir.expr import Dim, evaluate

F32, I64, I1 = DTYPES["f32"], DTYPES["i64"], DTYPES["i1"]
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33)
TORCH = {"f32": torch.float32, "i64": torch.int64, "i1": torch.bool}
MOST = 4000  # points of an iteration space


@dataclass
class _Maker:
    rng: Random
    b: Builder
    values: list[Value] = field(default_factory=list)
    bound: dict[Value, float] = field(default_factory=dict)  # no element is larger
    symbols: dict[str, int] = field(default_factory=dict)

    def size(self, e: Dim) -> int:
        return int(evaluate(e, self.symbols))

    def pick(self, kinds: tuple[str, ...] = ("float", "int")) -> Value:
        found = [v for v in self.values if v.type.dtype.kind in kinds]  # type: ignore[attr-defined]
        return self.rng.choice(found[-4:] if self.rng.random() < 0.7 else found)

    # -- index maps

    def reading(self, v: Value, dims: list[Dim]) -> tuple[tuple[Dim, ...], Any]:
        """(map, fill): an expression per dimension of `v` over dims d0, d1, ...; a fill where it may be out of bounds."""
        exprs: list[Dim] = []
        outside = False
        for size in v.type.shape:  # type: ignore[attr-defined]
            n = self.size(size)
            same = [k for k, d in enumerate(dims) if d == size]
            smaller = [k for k, d in enumerate(dims) if self.size(d) <= n]
            choice = self.rng.random()
            if same and choice < 0.55:
                exprs.append(sym(f"d{self.rng.choice(same)}"))
            elif choice < 0.65 and n:
                exprs.append(self.rng.randrange(n))
            elif smaller and choice < 0.8:
                k = self.rng.choice(smaller)
                room = n - self.size(dims[k])
                exprs.append(sym(f"d{k}") + self.rng.randint(0, room) if self.rng.random() < 0.5 or isinstance(dims[k], int) is False
                             else dims[k] - 1 - sym(f"d{k}") + self.rng.randint(0, room))
            elif dims and choice < 0.9 and isinstance(size, int):
                k = self.rng.randrange(len(dims))
                divisor = max(1, -(-self.size(dims[k]) // n))
                wraps = self.rng.random() < 0.5 or not isinstance(dims[k], int)
                exprs.append(sym(f"d{k}") % n if wraps else sym(f"d{k}") // divisor)
            elif dims:
                k = self.rng.randrange(len(dims))
                exprs.append(sym(f"d{k}") + self.rng.randint(-2, 2))
                outside = True
            else:
                exprs.append(0)
        return tuple(exprs), (self.value_of(v.type.dtype) if outside else None)  # type: ignore[attr-defined]

    def value_of(self, dtype: Any) -> Any:
        number = self.rng.choice([0, 0, 1, -1, 2])
        return float(number) if dtype.kind == "float" else bool(number) if dtype.kind == "bool" else number

    # -- ops

    def dims(self) -> list[Dim]:
        while True:
            like = self.rng.choice(self.values).type.shape  # type: ignore[attr-defined]
            made: list[Dim] = [*like] if self.rng.random() < 0.7 else [self.rng.choice(SIZES) for _ in range(self.rng.randint(0, 3))]
            if self.rng.random() < 0.4:
                made.insert(self.rng.randint(0, len(made)), self.rng.choice(SIZES))
            self.rng.shuffle(made)
            if torch.Size([self.size(d) for d in made]).numel() <= MOST:
                return made

    def scalar(self, b: Builder, args: list[Value], bound: float, points: int) -> tuple[Value, float]:
        """A body value from the arguments, small enough that sums over `points` stay exact."""
        values = [(a, bound) for a in args] or [(b.constant(1.0, F32), 1.0)]
        for _ in range(self.rng.randint(0, 4)):
            (x, bx), (y, by) = self.rng.choice(values), self.rng.choice(values)
            if x.type != y.type:
                continue
            dtype = x.type.dtype  # type: ignore[attr-defined]
            kind = self.rng.choice(["add", "sub", "max", "min", "mul", "neg", "abs", "select", "index"])
            total = {"add": bx + by, "sub": bx + by, "mul": bx * by}.get(kind, max(bx, by))
            if total > 64:
                kind, total = "max", max(bx, by)
            if kind == "index":
                position = b.op("tensor.index", type=ScalarType(I64), dim=self.rng.randrange(self.rank)) if self.rank else b.constant(0, I64)
                even = b.arith("lt", b.arith("mod", position, 3), 1)
                made = b.arith("select", even, x, y)
            elif kind == "select":
                made = b.arith("select", b.arith(self.rng.choice(["lt", "le", "eq"]), x, y), x, y)
            elif kind in ("neg", "abs"):
                made = b.arith(kind, x)
            else:
                made = b.arith(kind, x, y)
            assert made.type.dtype == dtype  # type: ignore[attr-defined]
            values.append((made, total))
        return values[-1]

    def generic(self) -> None:
        dims = self.dims()
        reductions = self.rng.choice([0, 0, 0, 1, 1, 2]) if dims else 0
        reductions = min(reductions, len(dims))
        points = torch.Size([self.size(d) for d in dims[len(dims) - reductions:]]).numel()
        operands = [self.pick() for _ in range(self.rng.randint(1, 3))]
        operands = [v for v in operands if v.type.dtype == operands[0].type.dtype]  # type: ignore[attr-defined]
        reads = [self.reading(v, dims) for v in operands]
        bound = max([2.0, *(self.bound[v] for v in operands)])
        self.rank = len(dims)
        results = self.rng.choice([1, 1, 1, 2])
        kinds, bounds = [], []

        def body(b: Builder, *args: Value) -> list[Value]:
            out = []
            for _ in range(results):
                value, top = self.scalar(b, list(args), bound, points)
                kind = "none"
                if reductions:
                    sums = ["sum"] if top * points <= 1 << 20 else []
                    kind = self.rng.choice([*sums, *sums, "max", "min", "argmax", "argmin"])
                kinds.append(kind)
                bounds.append({"sum": top * points, "argmax": points, "argmin": points}.get(kind, top))
                out.append(value)
            return out
        block = Block([ScalarType(v.type.dtype) for v in operands])  # type: ignore[attr-defined]
        inner = Builder(block)
        out = body(inner, *block.args)
        inner.create("tensor.yield", out)
        shape = tuple(dims[:len(dims) - reductions])
        attrs: dict[str, Any] = {"dims": tuple(dims), "maps": tuple(m for m, _ in reads)}
        if reductions:
            attrs |= {"reductions": reductions, "combine": tuple(kinds)}
        if any(f is not None for _, f in reads):
            attrs["fills"] = tuple(f for _, f in reads)
        types = [TensorType(shape, I64 if k.startswith("arg") else v.type.dtype) for k, v in zip(kinds, out)]  # type: ignore[attr-defined]
        if reductions and points == 0:
            return
        made = self.b.create("tensor.generic", operands, attrs, types, [Region([block])])
        self.keep(made, bounds)

    def scan(self) -> None:
        v = self.pick()
        shape = v.type.shape  # type: ignore[attr-defined]
        if not shape or self.bound[v] * max(1, self.size(shape[-1])) > 1 << 20:
            return
        kind = self.rng.choice(["sum", "max", "min"])
        block = Block([ScalarType(v.type.dtype)])  # type: ignore[attr-defined]
        Builder(block).create("tensor.yield", [block.args[0]])
        attrs = {"dims": tuple(shape), "maps": (tuple(sym(f"d{k}") for k in range(len(shape))),), "kind": kind}
        made = self.b.create("tensor.scan", [v], attrs, [TensorType(shape, v.type.dtype)], [Region([block])])  # type: ignore[attr-defined]
        self.keep(made, [self.bound[v] * (self.size(shape[-1]) if kind == "sum" else 1)])

    def keep(self, op: Operation, bounds: list[float]) -> None:
        for r, top in zip(op.results, bounds):
            self.values.append(r)
            self.bound[r] = float(max(top, 1))


def random_tensor_module(seed: int, ops: int, *, dynamic: bool = False) -> tuple[Operation, list[Any]]:
    """A module of about `ops` structured ops, and its arguments (the sizes of `dynamic` ones among them)."""
    rng = Random(seed)
    symbols = {"s0": rng.choice([2, 3, 9, 17])} if dynamic else {}
    sizes: list[Dim] = [*SIZES, *([sym("s0")] * 8 if dynamic else [])]
    types = []
    for _ in range(rng.randint(1, 3)):
        shape = tuple(rng.choice(sizes) for _ in range(rng.randint(1, 3)))
        while torch.Size([int(evaluate(d, symbols)) for d in shape]).numel() > MOST:
            shape = shape[1:]
        types.append(TensorType(shape, rng.choice([F32, F32, I64])))
    module, top = make_module("tensor")
    attrs: dict[str, Any] = {"arg_attrs": tuple({"name": f"x{i}", "kind": rng.choice(["input", "input", "param"]), "position": i} for i in range(len(types)))}
    if symbols:
        attrs |= {"symbols": {"s0": (2, None)}, "symbol_args": ({"position": len(types), "expr": sym("s0")},)}
    func, body = make_func(top, "main", types, [f"x{i}" for i in range(len(types))], **attrs)
    maker = _Maker(rng, Builder.at_end(body), list(body.args), dict.fromkeys(body.args, 3.0), symbols)
    for _ in range(ops):
        getattr(maker, rng.choice(["generic"] * 8 + ["scan"]))()
    made = [v for v in maker.values if v not in body.args]
    results = [v for v in made if not v.uses][-4:] or [body.args[0]]
    if made and rng.random() < 0.4:
        results.append(rng.choice(made))
    results = list(dict.fromkeys(results))
    func.attributes["result_attrs"] = tuple({"kind": "tensor"} for _ in results)
    maker.b.create("return", results)
    g = torch.Generator().manual_seed(seed)
    inputs: list[Any] = [torch.randint(-3, 4, [int(evaluate(d, symbols)) for d in t.shape], generator=g).to(TORCH[t.dtype.name]) for t in types]
    return module, [*inputs, *symbols.values()]
