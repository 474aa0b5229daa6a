// RUN: aicc opt %s --passes "turn-streams,dce" --remarks

// The weights are summed along their rows: the scores are made transposed, so that rows are the second's own.
// CHECK-LABEL: func @by_columns
// CHECK: tensor.generic(%q, %k) {{.*}}dims = [1024, 2048, 24]
// CHECK: tensor.generic({{.*}}dims = [1024, 2048]
// CHECK: tensor.generic({{.*}}dims = [1024, 24, 2048]
// CHECK: return
// CHECK: turn-streams: done: 2 ops of streams turned
module { func @by_columns { ^(%q: tensor<2048x24xf32>, %k: tensor<1024x24xf32>, %g: tensor<2048x24xf32>):
  %s = tensor.generic(%q, %k) {dims = [2048, 1024, 24], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d1, d2]]} : tensor<2048x1024xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %e = tensor.generic(%s) {dims = [2048, 1024], maps = [[d0, d1]]} : tensor<2048x1024xf32> { ^(%a: f32): %x = arith.exp(%a) : f32 tensor.yield(%x) }
  %o = tensor.generic(%e, %g) {dims = [1024, 24, 2048], reductions = 1, combine = ["sum"], maps = [[d2, d0], [d2, d1]]} : tensor<1024x24xf32> {
    ^(%a: f32, %b: f32): %x = arith.mul(%a, %b) : f32 tensor.yield(%x) }
  return(%o)
} }
// -----

// The other way round: nothing to do.
// CHECK-LABEL: func @by_rows
// CHECK: tensor.generic(%q, %k) {{.*}}dims = [2048, 1024, 24]
// CHECK: turn-streams: done: 0 ops of streams turned
module { func @by_rows { ^(%q: tensor<2048x24xf32>, %k: tensor<1024x24xf32>, %v: tensor<1024x24xf32>):
  %s = tensor.generic(%q, %k) {dims = [2048, 1024, 24], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d1, d2]]} : tensor<2048x1024xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %e = tensor.generic(%s) {dims = [2048, 1024], maps = [[d0, d1]]} : tensor<2048x1024xf32> { ^(%a: f32): %x = arith.exp(%a) : f32 tensor.yield(%x) }
  %o = tensor.generic(%e, %v) {dims = [2048, 24, 1024], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<2048x24xf32> {
    ^(%a: f32, %b: f32): %x = arith.mul(%a, %b) : f32 tensor.yield(%x) }
  return(%o)
} }
// -----

// Too small to become a stream: products of their own keep the order that others read.
// CHECK-LABEL: func @small
// CHECK: tensor.generic(%q, %k) {{.*}}dims = [64, 48, 24]
// CHECK: turn-streams: done: 0 ops of streams turned
module { func @small { ^(%q: tensor<64x24xf32>, %k: tensor<48x24xf32>, %g: tensor<64x24xf32>):
  %s = tensor.generic(%q, %k) {dims = [64, 48, 24], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d1, d2]]} : tensor<64x48xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %e = tensor.generic(%s) {dims = [64, 48], maps = [[d0, d1]]} : tensor<64x48xf32> { ^(%a: f32): %x = arith.exp(%a) : f32 tensor.yield(%x) }
  %o = tensor.generic(%e, %g) {dims = [48, 24, 64], reductions = 1, combine = ["sum"], maps = [[d2, d0], [d2, d1]]} : tensor<48x24xf32> {
    ^(%a: f32, %b: f32): %x = arith.mul(%a, %b) : f32 tensor.yield(%x) }
  return(%o)
} }
