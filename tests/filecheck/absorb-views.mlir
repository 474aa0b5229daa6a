// RUN: aicc opt %s --passes "absorb-views" --remarks

// A slice, a transpose and a reshape vanish into the reader's map.
// CHECK-LABEL: func @chain
// CHECK-NEXT: ^(
// CHECK-NEXT: %y = tensor.generic(%x) {dims = [8, 2], maps = {{\[}}[d1 + 1, d0]]} : tensor<8x2xf32> {
// CHECK: absorb-views: done: 3 views absorbed
module { func @chain { ^(%x: tensor<4x8xf32>):
  %s = tensor.generic(%x) {dims = [2, 8], maps = [[d0 + 1, d1]]} : tensor<2x8xf32> { ^(%a: f32): tensor.yield(%a) }
  %t = tensor.generic(%s) {dims = [8, 2], maps = [[d1, d0]]} : tensor<8x2xf32> { ^(%a: f32): tensor.yield(%a) }
  %r = tensor.generic(%t) {dims = [16], maps = [[d0 // 2, d0 % 2]]} : tensor<16xf32> { ^(%a: f32): tensor.yield(%a) }
  %y = tensor.generic(%r) {dims = [8, 2], maps = [[d0*2 + d1]]} : tensor<8x2xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  return(%y)
} }
// -----

// Padding moves into the reader, with its fill.
// CHECK-LABEL: func @padding
// CHECK-NEXT: ^(
// CHECK-NEXT: %y = tensor.generic(%x) {dims = [6], maps = {{\[}}[d0 - 1]], fills = [0.0]} : tensor<6xf32> {
// CHECK-NEXT: ^(
// CHECK-NEXT: arith.exp
module { func @padding { ^(%x: tensor<4xf32>):
  %p = tensor.generic(%x) {dims = [6], maps = [[d0 - 1]], fills = [0.0]} : tensor<6xf32> { ^(%a: f32): tensor.yield(%a) }
  %y = tensor.generic(%p) {dims = [6], maps = [[d0]]} : tensor<6xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  return(%y)
} }
// -----

// Declined: padding of a reshape (out of bounds here is not out of bounds there). A view that is returned stays.
// CHECK-LABEL: func @declined
// CHECK-NEXT: ^(
// CHECK-NEXT: %r = tensor.generic(%x) {dims = [8]
// CHECK: %y = tensor.generic(%r) {dims = [10], maps = {{\[}}[d0 - 1]], fills = [0.0]}
// CHECK: return(%y)
// CHECK: absorb-views: declined: a padded read of a view keeps the view
module { func @declined { ^(%x: tensor<2x4xf32>):
  %r = tensor.generic(%x) {dims = [8], maps = [[d0 // 4, d0 % 4]]} : tensor<8xf32> { ^(%a: f32): tensor.yield(%a) }
  %y = tensor.generic(%r) {dims = [10], maps = [[d0 - 1]], fills = [0.0]} : tensor<10xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  return(%y)
} }
