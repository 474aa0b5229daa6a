// RUN: aicc opt %s --passes "decompose,cse,dce"

// Softmax is two reductions and a pointwise op; nothing is named softmax any more.
// CHECK-LABEL: func @softmax
// CHECK: combine = ["max"]
// CHECK: combine = ["sum"]
// CHECK: arith.div
// CHECK-NOT: graph.
module { func @softmax { ^(%x: tensor<4x8xf32>):
  %y = graph.softmax(%x) {dim = 1} : tensor<4x8xf32>
  return(%y)
} }
// -----

// A matmul is a sum of products; bf16 accumulates in f32 and rounds once.
// CHECK-LABEL: func @matmul
// CHECK: %[[ACC:.*]] = tensor.generic(%x, %w) {dims = [4, 3, 8], {{.*}}reductions = 1, combine = ["sum"]{{.*}}} : tensor<4x3xf32> {
// CHECK: arith.mul({{.*}}) : f32
// CHECK: %y = tensor.generic(%[[ACC]]) {{.*}} : tensor<4x3xbf16>
module { func @matmul { ^(%x: tensor<4x8xbf16>, %w: tensor<8x3xbf16>):
  %y = graph.matmul(%x, %w) : tensor<4x3xbf16>
  return(%y)
} }
// -----

// Views are generics that yield what they read.
// CHECK-LABEL: func @views
// CHECK: {dims = [8, 4], maps = {{\[}}[d1, d0]]} : tensor<8x4xf32>
// CHECK: {dims = [4, 2, 4], maps = {{\[}}[d0, d1*4 + d2]]} : tensor<4x2x4xf32>
// CHECK: {dims = [6, 8], maps = {{\[}}[d0 - 1, d1]], fills = [0.0]} : tensor<6x8xf32>
module { func @views { ^(%x: tensor<4x8xf32>):
  %p = graph.permute(%x) {perm = [1, 0]} : tensor<8x4xf32>
  %r = graph.reshape(%x) : tensor<4x2x4xf32>
  %q = graph.pad(%x) {low = [1, 0], high = [1, 0], value = 0.0} : tensor<6x8xf32>
  return(%p, %r, %q)
} }
