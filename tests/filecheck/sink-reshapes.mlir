// RUN: aicc opt %s --passes "sink-reshapes"

// A matmul of [6, 5] by [5, 4] whose only reader sees it as [2, 3, 4] computes in that shape.
// CHECK-LABEL: func @linear
// CHECK: %m = tensor.generic(%x, %w) {{.*}}dims = [2, 3, 4, 5], maps = {{\[}}[d0*3 + d1, d3], [d3, d2]]
// CHECK: %y = tensor.generic(%m) {dims = [2, 3, 4], maps = {{\[}}[d0, d1, d2]]}
module { func @linear { ^(%x: tensor<6x5xf32>, %w: tensor<5x4xf32>):
  %m = tensor.generic(%x, %w) {dims = [6, 4, 5], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<6x4xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %y = tensor.generic(%m) {dims = [2, 3, 4], maps = [[d0*3 + d1, d2]]} : tensor<2x3x4xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  return(%y)
} }
// -----

// Declined: a transpose is no reshape, and two readers see two shapes.
// CHECK-LABEL: func @declined
// CHECK: %m = tensor.generic(%x) {dims = [6, 5]
// CHECK: %y = tensor.generic(%m) {dims = [2, 3], maps = {{\[}}[d0*3 + d1]]}
// CHECK: %z = tensor.generic(%m) {dims = [3, 2], maps = {{\[}}[d0*2 + d1]]}
// CHECK: %n = tensor.generic(%x) {dims = [6, 5]
// CHECK: %t = tensor.generic(%n) {dims = [3, 2], maps = {{\[}}[d0 + d1*3]]}
module { func @declined { ^(%x: tensor<6x5xf32>):
  %m = tensor.generic(%x) {dims = [6, 5], reductions = 1, combine = ["sum"], maps = [[d0, d1]]} : tensor<6xf32> { ^(%a: f32): tensor.yield(%a) }
  %y = tensor.generic(%m) {dims = [2, 3], maps = [[d0*3 + d1]]} : tensor<2x3xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  %z = tensor.generic(%m) {dims = [3, 2], maps = [[d0*2 + d1]]} : tensor<3x2xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  %n = tensor.generic(%x) {dims = [6, 5], reductions = 1, combine = ["max"], maps = [[d0, d1]]} : tensor<6xf32> { ^(%a: f32): tensor.yield(%a) }
  %t = tensor.generic(%n) {dims = [3, 2], maps = [[d0 + d1*3]]} : tensor<3x2xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  return(%y, %z, %t)
} }
