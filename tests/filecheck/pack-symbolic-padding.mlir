// RUN: aicc opt %s --passes "pack" --target avx2

// A padded left operand whose first position is symbolic and negative, 1 - s1: the padded copy starts there.
// CHECK-LABEL: func @window
// CHECK: %x_padded = tensor.generic(%x) {dims = [s0 + s1 - 1, 32], maps = {{\[}}[d0 - s1 + 1, d1]], fills = [0.0]}
// CHECK: tensor.generic(%x_padded, {{.*}}maps = {{\[}}[d0 - d2 + s1 - 1, d3]
module { func @window {arg_attrs = [{kind = "input"}, {kind = "param"}], symbols = {s0 = [2, none], s1 = [2, none]}} { ^(%x: tensor<s0x32xf32>, %w: tensor<s1x32x64xf32>):
  %m = tensor.generic(%x, %w) {dims = [s0, 64, s1, 32], reductions = 2, combine = ["sum"], maps = [[d0 - d2, d3], [d2, d3, d1]], fills = [0.0, none]} : tensor<s0x64xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  return(%m)
} }
