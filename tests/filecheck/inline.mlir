// RUN: aicc opt %s --passes "inline"

// One reader that visits each element once: merged, through its map.
// CHECK-LABEL: func @single
// CHECK-NEXT: ^(
// CHECK-NEXT: %y = tensor.generic(%x) {dims = [8, 4], maps = {{\[}}[d1, d0]]} : tensor<8x4xf32> {
// CHECK: arith.exp
// CHECK: arith.neg
module { func @single { ^(%x: tensor<4x8xf32>):
  %a = tensor.generic(%x) {dims = [4, 8], maps = [[d0, d1]]} : tensor<4x8xf32> { ^(%p: f32): %q = arith.exp(%p) : f32 tensor.yield(%q) }
  %y = tensor.generic(%a) {dims = [8, 4], maps = [[d1, d0]]} : tensor<8x4xf32> { ^(%p: f32): %q = arith.neg(%p) : f32 tensor.yield(%q) }
  return(%y)
} }
// -----

// Declined: an expensive producer with two readers, and one whose reader repeats it; a padded read.
// CHECK-LABEL: func @declined
// CHECK: %a = tensor.generic(%x)
// CHECK: arith.exp
// CHECK: %u = tensor.generic(%a)
// CHECK: %v = tensor.generic(%a)
// CHECK: %b = tensor.generic(%w)
// CHECK: arith.sin
// CHECK: %r = tensor.generic(%b) {dims = [4, 8], maps = {{\[}}[d1]]}
// CHECK: %c = tensor.generic(%w)
// CHECK: arith.abs
// CHECK: %s = tensor.generic(%c) {dims = [10], maps = {{\[}}[d0 - 1]], fills = [0.0]}
module { func @declined { ^(%x: tensor<4x8xf32>, %w: tensor<8xf32>):
  %a = tensor.generic(%x) {dims = [4, 8], maps = [[d0, d1]]} : tensor<4x8xf32> { ^(%p: f32): %q = arith.exp(%p) : f32 tensor.yield(%q) }
  %u = tensor.generic(%a) {dims = [4, 8], maps = [[d0, d1]]} : tensor<4x8xf32> { ^(%p: f32): %q = arith.neg(%p) : f32 tensor.yield(%q) }
  %v = tensor.generic(%a) {dims = [4, 8], maps = [[d0, d1]]} : tensor<4x8xf32> { ^(%p: f32): %q = arith.abs(%p) : f32 tensor.yield(%q) }
  %b = tensor.generic(%w) {dims = [8], maps = [[d0]]} : tensor<8xf32> { ^(%p: f32): %q = arith.sin(%p) : f32 tensor.yield(%q) }
  %r = tensor.generic(%b) {dims = [4, 8], maps = [[d1]]} : tensor<4x8xf32> { ^(%p: f32): %q = arith.neg(%p) : f32 tensor.yield(%q) }
  %c = tensor.generic(%w) {dims = [8], maps = [[d0]]} : tensor<8xf32> { ^(%p: f32): %q = arith.abs(%p) : f32 tensor.yield(%q) }
  %s = tensor.generic(%c) {dims = [10], maps = [[d0 - 1]], fills = [0.0]} : tensor<10xf32> { ^(%p: f32): %q = arith.neg(%p) : f32 tensor.yield(%q) }
  return(%u, %v, %r, %s)
} }
// -----

// Positions become index arithmetic: the producer asks for d1, which the reader calls 7 - d0.
// CHECK-LABEL: func @positions
// CHECK-NEXT: ^(
// CHECK-NEXT: %y = tensor.generic(%x) {dims = [8, 4], maps = {{\[}}[d1, -d0 + 7]]} : tensor<8x4xi64> {
// CHECK: tensor.index() {dim = 0}
// CHECK: arith.add
module { func @positions { ^(%x: tensor<4x8xi64>):
  %a = tensor.generic(%x) {dims = [4, 8], maps = [[d0, d1]]} : tensor<4x8xi64> {
    ^(%p: i64): %i = tensor.index() {dim = 1} : i64 %q = arith.add(%p, %i) : i64 tensor.yield(%q) }
  %y = tensor.generic(%a) {dims = [8, 4], maps = [[d1, 7 - d0]]} : tensor<8x4xi64> { ^(%p: i64): %q = arith.neg(%p) : i64 tensor.yield(%q) }
  return(%y)
} }
