// RUN: aicc opt %s --passes "stream" --target cuda --remarks

// Softmax between two products: one kernel, whose row values do not leave it.
// CHECK-LABEL: func @attention
// CHECK: %o = tensor.fused(%q, %k, %v) {kernel = "stream", why = "streams 1 + 1 contractions around [max, sum] in the space 2x64x48"}
// CHECK-NOT: tensor.fused
// CHECK: return(%o)
module { func @attention { ^(%q: tensor<2x64x24xf32>, %k: tensor<2x48x24xf32>, %v: tensor<2x48x24xf32>):
  %s = tensor.generic(%q, %k) {dims = [2, 64, 48, 24], reductions = 1, combine = ["sum"], maps = [[d0, d1, d3], [d0, d2, d3]]} : tensor<2x64x48xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %m = tensor.generic(%s) {dims = [2, 64, 48], reductions = 1, combine = ["max"], maps = [[d0, d1, d2]]} : tensor<2x64xf32> { ^(%a: f32): tensor.yield(%a) }
  %e = tensor.generic(%s, %m) {dims = [2, 64, 48], maps = [[d0, d1, d2], [d0, d1]]} : tensor<2x64x48xf32> {
    ^(%a: f32, %b: f32): %d = arith.sub(%a, %b) : f32 %x = arith.exp(%d) : f32 tensor.yield(%x) }
  %l = tensor.generic(%e) {dims = [2, 64, 48], reductions = 1, combine = ["sum"], maps = [[d0, d1, d2]]} : tensor<2x64xf32> { ^(%a: f32): tensor.yield(%a) }
  %p = tensor.generic(%e, %l) {dims = [2, 64, 48], maps = [[d0, d1, d2], [d0, d1]]} : tensor<2x64x48xf32> {
    ^(%a: f32, %b: f32): %d = arith.div(%a, %b) : f32 tensor.yield(%d) }
  %o = tensor.generic(%p, %v) {dims = [2, 64, 24, 48], reductions = 1, combine = ["sum"], maps = [[d0, d1, d3], [d0, d3, d2]]} : tensor<2x64x24xf32> {
    ^(%a: f32, %b: f32): %x = arith.mul(%a, %b) : f32 tensor.yield(%x) }
  return(%o)
} }
// -----

// Declined: the probabilities are returned.
// CHECK-LABEL: func @probabilities
// CHECK-NOT: tensor.fused
// CHECK: stream: declined: no streaming: a value of the middle space is needed in memory all the same
module { func @probabilities { ^(%q: tensor<64x24xf32>, %k: tensor<48x24xf32>, %v: tensor<48x24xf32>):
  %s = tensor.generic(%q, %k) {dims = [64, 48, 24], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d1, d2]]} : tensor<64x48xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %e = tensor.generic(%s) {dims = [64, 48], maps = [[d0, d1]]} : tensor<64x48xf32> { ^(%a: f32): %x = arith.exp(%a) : f32 tensor.yield(%x) }
  %o = tensor.generic(%e, %v) {dims = [64, 24, 48], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<64x24xf32> {
    ^(%a: f32, %b: f32): %x = arith.mul(%a, %b) : f32 tensor.yield(%x) }
  return(%o, %e)
} }
// -----

// Declined: exp(x + m) is no multiple of a power of m that could be made good later.
// CHECK-LABEL: func @not_rescalable
// CHECK-NOT: tensor.fused
// CHECK: stream: declined: no streaming: a reduction depends on an earlier one in a way that cannot be rescaled
module { func @not_rescalable { ^(%q: tensor<64x24xf32>, %k: tensor<48x24xf32>, %v: tensor<48x24xf32>):
  %s = tensor.generic(%q, %k) {dims = [64, 48, 24], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d1, d2]]} : tensor<64x48xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %m = tensor.generic(%s) {dims = [64, 48], reductions = 1, combine = ["max"], maps = [[d0, d1]]} : tensor<64xf32> { ^(%a: f32): tensor.yield(%a) }
  %e = tensor.generic(%s, %m) {dims = [64, 48], maps = [[d0, d1], [d0]]} : tensor<64x48xf32> {
    ^(%a: f32, %b: f32): %n = arith.neg(%b) : f32 %d = arith.sub(%a, %n) : f32 %x = arith.exp(%d) : f32 tensor.yield(%x) }
  %o = tensor.generic(%e, %v) {dims = [64, 24, 48], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<64x24xf32> {
    ^(%a: f32, %b: f32): %x = arith.mul(%a, %b) : f32 tensor.yield(%x) }
  return(%o)
} }
// -----

// Declined: the row value %m is read at rows and at columns, columns first.
// CHECK-LABEL: func @two_positions
// CHECK-NOT: tensor.fused
// CHECK: stream: declined: no streaming: one value is read at two positions
module { func @two_positions { ^(%q: tensor<64x24xf32>, %k: tensor<64x24xf32>, %v: tensor<64x24xf32>):
  %s = tensor.generic(%q, %k) {dims = [64, 64, 24], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d1, d2]]} : tensor<64x64xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %m = tensor.generic(%s) {dims = [64, 64], reductions = 1, combine = ["max"], maps = [[d0, d1]]} : tensor<64xf32> { ^(%a: f32): tensor.yield(%a) }
  %e = tensor.generic(%s, %m, %m) {dims = [64, 64], maps = [[d0, d1], [d1], [d0]]} : tensor<64x64xf32> {
    ^(%a: f32, %b: f32, %c: f32): %d = arith.mul(%a, %b) : f32 %x = arith.mul(%d, %c) : f32 tensor.yield(%x) }
  %o = tensor.generic(%e, %v) {dims = [64, 24, 64], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<64x24xf32> {
    ^(%a: f32, %b: f32): %x = arith.mul(%a, %b) : f32 tensor.yield(%x) }
  return(%o)
} }
