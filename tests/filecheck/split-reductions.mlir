// RUN: aicc opt %s --passes "split-reductions" --target cuda --remarks

// One tile of a product has 132 multiprocessors to itself: 16 parts of 256 steps, then their sum.
// CHECK-LABEL: func @matmul
// CHECK: %y = tensor.generic(%x, %w) {{.*}}dims = [16, 16, 64, 256], maps = {{\[}}[d1, d0*256 + d3], [d0*256 + d3, d2]]
// CHECK: %y_1 = tensor.generic(%y) {dims = [16, 64, 16], maps = {{\[}}[d2, d0, d1]], reductions = 1, combine = ["sum"]} : tensor<16x64xf32>
// CHECK: split-reductions: done: a reduction of 4096 elements in 16 parts
module { func @matmul { ^(%x: tensor<16x4096xf32>, %w: tensor<4096x64xf32>):
  %y = tensor.generic(%x, %w) {dims = [16, 64, 4096], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<16x64xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  return(%y)
} }
// -----

// Positions in the body are those of the whole: index 1 becomes d0 * chunk + rest.
// CHECK-LABEL: func @position
// CHECK: tensor.generic(%x) {{.*}}dims = [512, 16, 128]
// CHECK-DAG: tensor.index() {dim = 0}
// CHECK-DAG: tensor.index() {dim = 2}
module { func @position { ^(%x: tensor<65536x16xf32>):
  %y = tensor.generic(%x) {dims = [16, 65536], reductions = 1, combine = ["max"], maps = [[d1, d0]]} : tensor<16xf32> {
    ^(%a: f32): %i = tensor.index() {dim = 1} : i64 %f = arith.cast(%i) : f32 %p = arith.mul(%a, %f) : f32 tensor.yield(%p) }
  return(%y)
} }
// -----

// Left alone: a prime length, an argmax, and enough rows for every multiprocessor.
// CHECK-LABEL: func @alone
// CHECK: dims = [16, 65537]
// CHECK: dims = [16, 65536]
// CHECK: dims = [4096, 1024]
module { func @alone { ^(%x: tensor<65537x16xf32>, %z: tensor<65536x16xf32>, %w: tensor<4096x1024xf32>):
  %a = tensor.generic(%x) {dims = [16, 65537], reductions = 1, combine = ["sum"], maps = [[d1, d0]]} : tensor<16xf32> { ^(%a: f32): tensor.yield(%a) }
  %b = tensor.generic(%z) {dims = [16, 65536], reductions = 1, combine = ["argmax"], maps = [[d1, d0]]} : tensor<16xi64> { ^(%a: f32): tensor.yield(%a) }
  %c = tensor.generic(%w) {dims = [4096, 1024], reductions = 1, combine = ["sum"], maps = [[d0, d1]]} : tensor<4096xf32> { ^(%a: f32): tensor.yield(%a) }
  return(%a, %b, %c)
} }
