"""Where the syntax of expressions meets comments (`//`) and element types (`i1`)."""

from aicc.ir import sym
from aicc.ir.parser import parse_expr, parse_module


def test_floor_division_is_not_a_comment():
    assert parse_expr("(d0 + 63) // 64") == (sym("d0") + 63) // 64


def test_comments_stay_comments():
    module = parse_module('''// first
        module { // after a brace
          func @f {
            ^(%x: tensor<(s0 // 2)xf32>): // after the arguments
              %y = graph.reshape(%x) : tensor<(s0 // 2)x1xf32> // after an op
              // before the return
              return(%y)
          }
        }''')
    func = module.body.first
    assert func is not None and [op.name for op in func.body] == ["graph.reshape", "return"]
    assert func.body.args[0].type.shape == (sym("s0") // 2,)


def test_index_operands_are_not_types():
    assert parse_expr("i0*8 + i1 + i8") == sym("i0") * 8 + sym("i1") + sym("i8")
    op = parse_module('%v = tile.index() {expr = i1, shape = []} : i1')
    assert op["expr"] == sym("i1") and str(op.result.type) == "i1"
