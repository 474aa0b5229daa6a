// RUN: aicc opt %s --passes "canonicalize,dce"
// RUN: aicc opt %s --passes "canonicalize{relax-casts=false},dce" --check-prefix STRICT

// Identities that hold bit for bit go; x + 0.0 and x * 0 stay.
// CHECK-LABEL: func @identities
// CHECK-NEXT: ^(%x: tensor<4xf32>, %i: tensor<4xi64>):
// CHECK-NEXT: %[[Z:.*]] = graph.full() {value = 0.0} : tensor<4xf32>
// CHECK-NEXT: %d = graph.add(%x, %[[Z]]) : tensor<4xf32>
// CHECK-NEXT: %e = graph.mul(%x, %[[Z]]) : tensor<4xf32>
// CHECK-NEXT: return(%x, %x, %x, %d, %e, %i, %x)
module { func @identities { ^(%x: tensor<4xf32>, %i: tensor<4xi64>):
  %one = graph.full() {value = 1.0} : tensor<4xf32>
  %nz = graph.full() {value = -0.0} : tensor<4xf32>
  %z = graph.full() {value = 0.0} : tensor<4xf32>
  %iz = graph.full() {value = 0} : tensor<4xi64>
  %a = graph.mul(%one, %x) : tensor<4xf32>
  %b = graph.add(%x, %nz) : tensor<4xf32>
  %c = graph.sub(%x, %z) : tensor<4xf32>
  %d = graph.add(%x, %z) : tensor<4xf32>
  %e = graph.mul(%x, %z) : tensor<4xf32>
  %f = graph.add(%iz, %i) : tensor<4xi64>
  %g1 = graph.neg(%x) : tensor<4xf32>
  %g = graph.neg(%g1) : tensor<4xf32>
  return(%a, %b, %c, %d, %e, %f, %g)
} }
// -----

// A broadcasting one does not vanish: the result has another shape.
// CHECK-LABEL: func @broadcast
// CHECK: %y = graph.mul(%x, %one) : tensor<3x4xf32>
module { func @broadcast { ^(%x: tensor<4xf32>):
  %one = graph.full() {value = 1.0} : tensor<3x4xf32>
  %y = graph.mul(%x, %one) : tensor<3x4xf32>
  return(%y)
} }
// -----

// Views of views, and views that move nothing.
// CHECK-LABEL: func @views
// CHECK-NEXT: ^(
// CHECK-NEXT: %b = graph.reshape(%x) : tensor<12xf32>
// CHECK-NEXT: return(%b, %x, %x)
module { func @views { ^(%x: tensor<3x4xf32>):
  %a = graph.reshape(%x) : tensor<2x6xf32>
  %b = graph.reshape(%a) : tensor<12xf32>
  %p = graph.permute(%x) {perm = [1, 0]} : tensor<4x3xf32>
  %q = graph.permute(%p) {perm = [1, 0]} : tensor<3x4xf32>
  %s = graph.slice(%x) {starts = [0, 0], steps = [1, 1]} : tensor<3x4xf32>
  return(%b, %q, %s)
} }
// -----

// bf16 -> f32 -> bf16 is exact both ways; f32 -> bf16 -> f32 rounds, and goes only where that is allowed (inside a body).
// CHECK-LABEL: func @casts
// CHECK: %n = graph.cast(%x) : tensor<4xbf16>
// CHECK-NEXT: %w = graph.cast(%n) : tensor<4xf32>
// CHECK-NEXT: %y = tensor.generic(%x)
// CHECK-NEXT: ^(%[[A:.*]]: f32):
// CHECK-NEXT: tensor.yield(%[[A]])
// CHECK: return(%w, %h, %y)
// STRICT-LABEL: func @casts
// STRICT: %[[N:.*]] = arith.cast(%{{.*}}) : bf16
// STRICT-NEXT: %[[W:.*]] = arith.cast(%[[N]]) : f32
// STRICT-NEXT: tensor.yield(%[[W]])
module { func @casts { ^(%x: tensor<4xf32>, %h: tensor<4xbf16>):
  %n = graph.cast(%x) : tensor<4xbf16>
  %w = graph.cast(%n) : tensor<4xf32>
  %hw = graph.cast(%h) : tensor<4xf32>
  %hh = graph.cast(%hw) : tensor<4xbf16>
  %y = tensor.generic(%x) {dims = [4], maps = [[3 - d0]]} : tensor<4xf32> {
    ^(%a: f32):
      %an = arith.cast(%a) : bf16
      %aw = arith.cast(%an) : f32
      tensor.yield(%aw)
  }
  return(%w, %hh, %y)
} }
// -----

// Equal reads are merged, unused operands and dead body ops dropped.
// CHECK-LABEL: func @generic
// CHECK: %y = tensor.generic(%x) {dims = [4], maps = {{\[}}[d0]]} : tensor<4xf32> {
// CHECK-NEXT: ^(%[[A:.*]]: f32):
// CHECK-NEXT: %[[S:.*]] = arith.add(%[[A]], %[[A]]) : f32
// CHECK-NEXT: tensor.yield(%[[S]])
module { func @generic { ^(%x: tensor<4xf32>, %z: tensor<4xf32>):
  %y = tensor.generic(%x, %x, %z) {dims = [4], maps = [[d0], [d0], [d0]]} : tensor<4xf32> {
    ^(%a: f32, %b: f32, %c: f32):
      %dead = arith.exp(%c) : f32
      %s = arith.add(%a, %b) : f32
      tensor.yield(%s)
  }
  return(%y)
} }
// -----

// A reduction over size 1 is pointwise; its argmax is position 0.
// CHECK-LABEL: func @unit
// CHECK: %s, %i = tensor.generic(%x) {dims = [4], maps = {{\[}}[d0, 0]]} : tensor<4xf32>, tensor<4xi64> {
// CHECK-NEXT: ^(%[[A:.*]]: f32):
// CHECK-NEXT: %[[C:.*]] = arith.constant() {value = 0} : i64
// CHECK-NEXT: tensor.yield(%[[A]], %[[C]])
module { func @unit { ^(%x: tensor<4x1xf32>):
  %s, %i = tensor.generic(%x) {dims = [4, 1], reductions = 1, combine = ["sum", "argmax"], maps = [[d0, d1]]} : tensor<4xf32>, tensor<4xi64> {
    ^(%a: f32): tensor.yield(%a, %a)
  }
  return(%s, %i)
} }
// -----

// No elements: nothing to compute. A sum over nothing is zero, a maximum the smallest number.
// CHECK-LABEL: func @empty
// CHECK: %[[F:.*]] = graph.full() {value = 0.0} : tensor<0x4xf32>
// CHECK: %s, %m = tensor.generic {dims = [4], maps = []} : tensor<4xf32>, tensor<4xf32> {
// CHECK: value = 0.0
// CHECK: value = -inf
// CHECK: return(%[[F]], %s, %m)
module { func @empty { ^(%x: tensor<0x4xf32>):
  %e = graph.exp(%x) : tensor<0x4xf32>
  %s, %m = tensor.generic(%x) {dims = [4, 0], reductions = 1, combine = ["sum", "max"], maps = [[d1, d0]]} : tensor<4xf32>, tensor<4xf32> {
    ^(%a: f32): tensor.yield(%a, %a)
  }
  return(%e, %s, %m)
} }
// -----

// One number per row into a tensor of one number is a comparison of positions, which are checked; other scatters stay.
// CHECK-LABEL: func @numbers
// CHECK-NEXT: ^(
// CHECK-NOT: graph.scatter
// CHECK: %[[P:.*]] = graph.reshape(%{{.*}}) : tensor<1x8xi64>
// CHECK: %[[I:.*]] = graph.require(%{{.*}}, %i) {message = "scatter: an index is out of range"} : tensor<4x1xi64>
// CHECK: %[[E:.*]] = graph.eq(%[[P]], %[[I]]) : tensor<4x8xi1>
// CHECK: graph.select(%[[E]], %{{.*}}, %{{.*}}) : tensor<4x8xf32>
// CHECK: return
module { func @numbers { ^(%i: tensor<4x1xi64>):
  %z = graph.full() {value = 0.0} : tensor<4x8xf32>
  %m = graph.full() {value = -1.0} : tensor<4x1xf32>
  %s = graph.scatter(%z, %i, %m) {dim = 1} : tensor<4x8xf32>
  return(%s)
} }
// -----

// CHECK-LABEL: func @not_numbers
// CHECK: graph.scatter(%x, %i, %m)
// CHECK: graph.scatter(%z, %j, %n)
module { func @not_numbers { ^(%x: tensor<4x8xf32>, %i: tensor<4x1xi64>, %j: tensor<4x2xi64>):
  %z = graph.full() {value = 0.0} : tensor<4x8xf32>
  %m = graph.full() {value = -1.0} : tensor<4x1xf32>
  %n = graph.full() {value = -1.0} : tensor<4x2xf32>
  %s = graph.scatter(%x, %i, %m) {dim = 1} : tensor<4x8xf32>
  %t = graph.scatter(%z, %j, %n) {dim = 1} : tensor<4x8xf32>
  return(%s, %t)
} }
// -----

// What is added up in zeros and then added to something is added up there; not if the sums are wanted by others, or written instead of added.
// CHECK-LABEL: func @sum_with_scattered
// CHECK: graph.index_put(%x, %v, %i) {dims = [0], accumulate = true}
// CHECK-NEXT: return
// CHECK-LABEL: func @sums_kept
// CHECK: graph.add
// CHECK: graph.add
module { func @sum_with_scattered { ^(%x: tensor<9x8xf32>, %v: tensor<4x8xf32>, %i: tensor<4xi64>):
  %z = graph.full() {value = 0.0} : tensor<9x8xf32>
  %s = graph.index_put(%z, %v, %i) {dims = [0], accumulate = true} : tensor<9x8xf32>
  %y = graph.add(%s, %x) : tensor<9x8xf32>
  return(%y)
}
func @sums_kept { ^(%x: tensor<9x8xf32>, %v: tensor<4x8xf32>, %i: tensor<4xi64>):
  %z = graph.full() {value = 0.0} : tensor<9x8xf32>
  %s = graph.index_put(%z, %v, %i) {dims = [0], accumulate = true} : tensor<9x8xf32>
  %w = graph.index_put(%z, %v, %i) {dims = [0]} : tensor<9x8xf32>
  %y = graph.add(%s, %x) : tensor<9x8xf32>
  %u = graph.add(%w, %x) : tensor<9x8xf32>
  return(%s, %y, %u)
} }
