// RUN: aicc opt %s --passes "layout" --check-prefix LAYOUT
// RUN: aicc opt %s --passes "pack" --target avx2 --check-prefix PACK --remarks
// RUN: aicc opt %s --passes "pack" --target cuda --check-prefix GPU

// A 1x1 convolution with a parameter: output channels (d1) become the contiguous dimension, and the reader follows.
// LAYOUT-LABEL: func @conv
// LAYOUT: %m = tensor.generic({{.*}} : tensor<2x8x5x7xf32, strides=[280, 1, 56, 8]> {
// LAYOUT: %y = tensor.generic(%m) {{.*}} : tensor<2x8x5x7xf32, strides=[280, 1, 56, 8]> {
module { func @conv {arg_attrs = [{kind = "input"}, {kind = "param"}]} { ^(%x: tensor<2x3x5x7xf32>, %w: tensor<8x3xf32>):
  %m = tensor.generic(%x, %w) {dims = [2, 8, 5, 7, 3], reductions = 1, combine = ["sum"], maps = [[d0, d4, d2, d3], [d1, d4]]} : tensor<2x8x5x7xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %y = tensor.generic(%m) {dims = [2, 8, 5, 7], maps = [[d0, d1, d2, d3]]} : tensor<2x8x5x7xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  return(%y)
} }
// -----

// A parameter is packed in panels of three vectors of 8 (the tile that wastes least), ragged at 20 columns: zero past the last, in a generic of its own.
// PACK-LABEL: func @param
// PACK: %w_packed = tensor.generic(%w) {dims = [1, 32, 24], maps = {{\[}}[d1, d0*24 + d2]], fills = [0]} : tensor<1x32x24xf32>
// PACK: %m = tensor.generic(%x, %w_packed) {{.*}}maps = {{\[}}[d0, d2], [0, d2, d1]]{{.*}}_packed = true
// PACK: pack: done: right operand 640 packed in panels of 24, once
// GPU-LABEL: func @param
// GPU-NOT: packed
module { func @param {arg_attrs = [{kind = "input"}, {kind = "param"}]} { ^(%x: tensor<64x32xf32>, %w: tensor<32x20xf32>):
  %m = tensor.generic(%x, %w) {dims = [64, 20, 32], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<64x20xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  return(%m)
} }
// -----

// Declined: an activation on the right of a matmul with few rows is streamed as it is.
// PACK-LABEL: func @skinny
// PACK-NOT: _packed
// PACK: pack: declined: a contraction with 2 rows streams its right operand unpacked
module { func @skinny { ^(%x: tensor<2x32xf32>, %w: tensor<32x20xf32>):
  %m = tensor.generic(%x, %w) {dims = [2, 20, 32], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<2x20xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  return(%m)
} }
