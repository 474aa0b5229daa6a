"""Size expressions of torch as expressions of aicc: equal at every value of the symbols."""

import pytest
import sympy
import torch
from aicc.frontend.errors import Unsupported
from aicc.frontend.symbols import SymbolTable, to_dim
from aicc.ir.expr import evaluate
from torch.utils._sympy.functions import (
    CeilToInt,
    CleanDiv,
    FloorDiv,
    FloorToInt,
    Identity,
    IntTrueDiv,
    Max,
    Min,
    Mod,
    ModularIndexing,
    PowByNatural,
    PythonMod,
    ToFloat,
    TruncToInt,
)

a, b = (sympy.Symbol(n, integer=True, positive=True) for n in ("s0", "s1"))

EXPRESSIONS = {
    "polynomial": 3 * a * b - 2 * a + 7, "square": a**2 + 1, "power": PowByNatural(a, sympy.Integer(3)),
    "floor division": FloorDiv(a + 1, 2), "by a symbol": FloorDiv(a * b + 3, b), "nested": FloorDiv(FloorDiv(a, 2), 3),
    "clean": CleanDiv(a * 4, 2), "mod": Mod(a + 5, 3), "python mod": PythonMod(a - 20, 7),
    "modular indexing": ModularIndexing(a, 2, 3), "max": Max(a, b + 2), "min": Min(2 * a, 9), "identity": Identity(a) + 1,
    "ceil": CeilToInt(IntTrueDiv(a, sympy.Integer(8))), "floor": FloorToInt(IntTrueDiv(a, b)),
    "half": TruncToInt(ToFloat(a) * sympy.Float(0.5)), "scaled": FloorToInt(ToFloat(a) * sympy.Float(1.75)),
    "double": TruncToInt(sympy.Float(2.0) * ToFloat(a)), "sympy floor": sympy.floor(a / 2),
    "sympy ceiling": sympy.ceiling(a / 3),
    "negative divisor": FloorDiv(a, -2), "truncated negative": TruncToInt(IntTrueDiv(5 - a, sympy.Integer(2))),
}


@pytest.mark.parametrize("expr", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_same_value(expr):
    converted = to_dim(expr)
    for x in (1, 2, 3, 7, 16, 33):
        for y in (1, 2, 5):
            expected = int(expr.subs({a: x, b: y}).expand(identity=True))
            assert evaluate(converted, {"s0": x, "s1": y}) == expected, (converted, x, y)


@pytest.mark.parametrize(("expr", "message"), [
    (TruncToInt(ToFloat(a) * sympy.Float(0.1)), "0.1"), (sympy.sqrt(a), "power"), (sympy.sin(a), "sin"),
    (a / 3, "not an integer"), (sympy.Symbol("zf3", integer=False), "zf3"),
])
def test_refused(expr, message):
    with pytest.raises(Unsupported, match=message):
        to_dim(expr)


def test_ranges_simplify():
    sizes = []

    def keep(gm, _):
        sizes.extend(s for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor)
                     for s in n.meta["val"].shape)
        return gm

    x = torch.randn(6, 3)
    torch._dynamo.mark_dynamic(x, 0, min=4, max=10)
    torch.compile(lambda x: x * 2, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=keep))(x)
    table = SymbolTable()
    name = str(table.dim(sizes[0]))
    assert table.ranges() == {name: (4, 10)}
    assert table.dim(5) == 5
    assert table.nonnegative(table.dim(sizes[0]) - 4) and not table.nonnegative(table.dim(sizes[0]) - 5)
