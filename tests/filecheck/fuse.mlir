// RUN: aicc opt %s --passes "fuse" --remarks
// RUN: aicc opt %s --passes "fuse{max-members=1}" --check-prefix ALONE --remarks

// Softmax: two reductions and the division share one row: one kernel.
// CHECK-LABEL: func @softmax
// CHECK-COUNT-1: tensor.fused
// CHECK-NOT: tensor.fused
// CHECK: fuse: done: 3 structured ops in 1 kernels
// ALONE: fuse: done: 3 structured ops in 3 kernels
module { func @softmax { ^(%x: tensor<64x128xf32>):
  %m = tensor.generic(%x) {dims = [64, 128], reductions = 1, combine = ["max"], maps = [[d0, d1]]} : tensor<64xf32> { ^(%a: f32): tensor.yield(%a) }
  %s = tensor.generic(%x, %m) {dims = [64, 128], reductions = 1, combine = ["sum"], maps = [[d0, d1], [d0]]} : tensor<64xf32> {
    ^(%a: f32, %b: f32): %d = arith.sub(%a, %b) : f32 %e = arith.exp(%d) : f32 tensor.yield(%e) }
  %y = tensor.generic(%x, %m, %s) {dims = [64, 128], maps = [[d0, d1], [d0], [d0]]} : tensor<64x128xf32> {
    ^(%a: f32, %b: f32, %c: f32): %d = arith.sub(%a, %b) : f32 %e = arith.exp(%d) : f32 %f = arith.div(%e, %c) : f32 tensor.yield(%f) }
  return(%y)
} }
// -----

// Declined: a row sum and a column sum of one tensor have no common frame with the transposed reader of both.
// CHECK-LABEL: func @rows_and_columns
// CHECK: tensor.fused
// CHECK: tensor.fused
module { func @rows_and_columns { ^(%x: tensor<64x64xf32>):
  %r = tensor.generic(%x) {dims = [64, 64], reductions = 1, combine = ["sum"], maps = [[d0, d1]]} : tensor<64xf32> { ^(%a: f32): tensor.yield(%a) }
  %c = tensor.generic(%x, %r) {dims = [64, 64], reductions = 1, combine = ["sum"], maps = [[d1, d0], [d1]]} : tensor<64xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  return(%c)
} }
// -----

// A contraction takes its elementwise reader as an epilogue, but no reduction.
// CHECK-LABEL: func @epilogue
// CHECK: tensor.fused({{.*}}) {kernel = "matmul_max"}
// CHECK: tensor.fused({{.*}}) {kernel = "sum"}
module { func @epilogue { ^(%x: tensor<64x32xf32>, %w: tensor<32x48xf32>):
  %m = tensor.generic(%x, %w) {dims = [64, 48, 32], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<64x48xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %y = tensor.generic(%m) {dims = [64, 48], maps = [[d0, d1]]} : tensor<64x48xf32> {
    ^(%a: f32): %z = arith.constant() {value = 0.0} : f32 %e = arith.max(%a, %z) : f32 tensor.yield(%e) }
  %s = tensor.generic(%y) {dims = [64, 48], reductions = 1, combine = ["sum"], maps = [[d0, d1]]} : tensor<64xf32> { ^(%a: f32): tensor.yield(%a) }
  return(%s)
} }
// -----

// Declined: the reader needs row 0 of %u at every row, so %u is not made at the frame point at which it is read.
// CHECK-LABEL: func @first_row
// CHECK: tensor.fused({{.*}}) {kernel = "exp_cos"}
// CHECK: tensor.fused({{.*}}) {kernel = "add"}
module { func @first_row { ^(%x: tensor<64x48xf32>):
  %u = tensor.generic(%x) {dims = [64, 48], maps = [[d0, d1]]} : tensor<64x48xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  %v = tensor.generic(%x) {dims = [64, 48], maps = [[d0, d1]]} : tensor<64x48xf32> { ^(%a: f32): %e = arith.cos(%a) : f32 tensor.yield(%e) }
  %r = tensor.generic(%v, %u) {dims = [64, 48], maps = [[d0, d1], [0, d1]]} : tensor<64x48xf32> {
    ^(%a: f32, %b: f32): %s = arith.add(%a, %b) : f32 tensor.yield(%s) }
  return(%u, %v, %r)
} }
