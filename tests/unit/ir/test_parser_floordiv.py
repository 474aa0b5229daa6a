"""`//` is the floor division inside an expression and a comment everywhere else."""

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
