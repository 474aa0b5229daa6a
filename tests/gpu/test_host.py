"""Addresses in GPU programs."""

from aicc.backends.triton.host import build_program
from aicc.ir.parser import parse_module

TEXT = """
module {level = "host"} {
  func @main {arg_attrs = [{kind = "output", name = "y"}]} {
    ^(%y: buffer<64xf32>):
      %mask = host.view(%y) {offset = 16} : buffer<8xi1>
      %bits = host.constant() {value = dense<i1, [8], [true, false, true, false, true, false, true, false]>} : buffer<8xi1>
      host.copy(%bits, %mask)
      return()
  }
}
"""


def test_a_view_is_offset_by_elements_of_its_source() -> None:
    program = build_program(parse_module(TEXT))
    step, = next(iter(program.functions.values()))
    places = [p for p in vars(step).values() if type(p).__name__ == "Place"] + list(getattr(step, "buffers", ()))
    assert 16 * 4 in [p.offset for p in places]
