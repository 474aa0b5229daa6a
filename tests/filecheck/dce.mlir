// RUN: aicc opt %s --passes "dce" --remarks

// CHECK-LABEL: func @chain
// CHECK-NEXT: ^(
// CHECK-NEXT: return(%x)
// CHECK: dce: done: 2 ops erased
module { func @chain { ^(%x: tensor<4xf32>):
  %a = graph.exp(%x) : tensor<4xf32>
  %b = graph.neg(%a) : tensor<4xf32>
  return(%x)
} }
// -----

// Writes stay; so do loads that report bad indices, and loops around them. Other loads and loops go.
// CHECK-LABEL: tile.kernel @effects
// CHECK-NEXT: ^(
// CHECK-NEXT: tile.load(%x) {{.*}}check = true
// CHECK-NEXT: tile.for
// CHECK-NEXT: ^(
// CHECK-NEXT: tile.load{{.*}}check = true
// CHECK-NEXT: tile.yield()
// CHECK-NEXT: }
// CHECK-NEXT: %[[C:.*]] = arith.constant
// CHECK-NEXT: tile.store(%y, %[[C]])
// CHECK-NEXT: tile.yield()
module { tile.kernel @effects {grid = [1], outputs = 1} { ^(%x: buffer<4xf32>, %y: buffer<4xf32>):
  %a = tile.load(%x) {offset = 0, shape = []} : f32
  %b = tile.load(%x) {offset = 0, shape = [], check = true} : f32
  tile.for() {lower = 0, upper = 4} { ^(%i: index):
    %c = tile.load(%x, %i) {offset = i0, shape = [], check = true} : f32
    tile.yield()
  }
  %init = arith.constant() {value = 0.0} : f32
  %r = tile.for(%init) {lower = 0, upper = 4} : f32 { ^(%i: index, %acc: f32):
    %d = tile.load(%x, %i) {offset = i0, shape = []} : f32
    %s = arith.add(%acc, %d) : f32
    tile.yield(%s)
  }
  %one = arith.constant() {value = 1.0} : f32
  tile.store(%y, %one) {offset = 0}
  tile.yield()
} }
// -----

// Random externs draw numbers: never dropped. Others are.
// CHECK-LABEL: func @externs
// CHECK: aten.rand
// CHECK-NOT: aten.svd
// CHECK: return
module { func @externs { ^(%x: tensor<4xf32>):
  %r = graph.extern() {target = "aten.rand", args = [], random = true} : tensor<4xf32>
  %s = graph.extern(%x) {target = "aten.svd", args = []} : tensor<4xf32>
  return(%x)
} }
