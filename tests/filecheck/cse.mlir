// RUN: aicc opt %s --passes "cse"

// CHECK-LABEL: func @twins
// CHECK-NEXT: ^(
// CHECK-NEXT: %a = graph.add(%x, %y)
// CHECK-NEXT: %c = graph.sub(%x, %y)
// CHECK-NEXT: %d = graph.sub(%y, %x)
// CHECK-NEXT: return(%a, %a, %c, %d)
module { func @twins { ^(%x: tensor<4xf32>, %y: tensor<4xf32>):
  %a = graph.add(%x, %y) : tensor<4xf32>
  %b = graph.add(%y, %x) : tensor<4xf32>
  %c = graph.sub(%x, %y) : tensor<4xf32>
  %d = graph.sub(%y, %x) : tensor<4xf32>
  return(%a, %b, %c, %d)
} }
// -----

// 0.0 and -0.0, 1 and 1.0 and true are different constants; NaN equals NaN.
// CHECK-LABEL: func @constants
// CHECK-COUNT-4: graph.full
// CHECK-NOT: graph.full
// CHECK: return(%a, %b, %c, %d, %d)
module { func @constants { ^():
  %a = graph.full() {value = 0.0} : tensor<4xf32>
  %b = graph.full() {value = -0.0} : tensor<4xf32>
  %c = graph.full() {value = 1.0} : tensor<4xf32>
  %d = graph.full() {value = nan} : tensor<4xf32>
  %e = graph.full() {value = nan} : tensor<4xf32>
  return(%a, %b, %c, %d, %e)
} }
// -----

// Bodies are compared: the second is the first up to names, the third is not.
// CHECK-LABEL: func @bodies
// CHECK: %a = tensor.generic
// CHECK: arith.exp
// CHECK: %c = tensor.generic
// CHECK: arith.neg
// CHECK-NOT: tensor.generic
// CHECK: return(%a, %a, %c)
module { func @bodies { ^(%x: tensor<4xf32>):
  %a = tensor.generic(%x) {dims = [4], maps = [[d0]]} : tensor<4xf32> { ^(%p: f32): %q = arith.exp(%p) : f32 tensor.yield(%q) }
  %b = tensor.generic(%x) {dims = [4], maps = [[d0]]} : tensor<4xf32> { ^(%u: f32): %v = arith.exp(%u) : f32 tensor.yield(%v) }
  %c = tensor.generic(%x) {dims = [4], maps = [[d0]]} : tensor<4xf32> { ^(%u: f32): %v = arith.neg(%u) : f32 tensor.yield(%v) }
  return(%a, %b, %c)
} }
// -----

// Loads may see different memory: never merged. The arithmetic on them is.
// CHECK-LABEL: tile.kernel @k
// CHECK: %[[A:.*]] = tile.load
// CHECK: tile.store
// CHECK: %[[B:.*]] = tile.load
// CHECK: arith.add(%[[A]], %[[B]])
// CHECK-NOT: arith.add
module { tile.kernel @k {grid = [1], outputs = 1} { ^(%x: buffer<4xf32>, %y: buffer<4xf32>):
  %a = tile.load(%x) {offset = t0, shape = [4]} : tile<4xf32>
  tile.store(%y, %a) {offset = t0}
  %b = tile.load(%x) {offset = t0, shape = [4]} : tile<4xf32>
  %s = arith.add(%a, %b) : tile<4xf32>
  %t = arith.add(%b, %a) : tile<4xf32>
  %u = arith.mul(%s, %t) : tile<4xf32>
  tile.store(%y, %u) {offset = t0}
  tile.yield()
} }
