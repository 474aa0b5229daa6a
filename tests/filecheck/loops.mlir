// RUN: aicc opt %s --passes "simplify-loops,lift-sums,hoist-invariants,dce"

// Read and written backwards; what is the same in every slice is an invariant; the second stacked result is unread.
// CHECK-LABEL: func @walk
// CHECK: %once = tensor.generic(%w) {dims = [4], maps = {{\[}}[d0]]}
// CHECK: %{{.*}}, %y = loop(%c, %xs, %once) {body = @step, carried = 1, sliced = 1, reversed_operands = [0], reversed_results = [0]} : tensor<4xf32>, tensor<6x4xf32>
// CHECK-NEXT: return
module { func @walk { ^(%c: tensor<4xf32>, %xs: tensor<6x4xf32>, %w: tensor<4xf32>):
  %back = tensor.generic(%xs) {dims = [6, 4], maps = [[-d0 + 5, d1]]} : tensor<6x4xf32> { ^(%a: f32): tensor.yield(%a) }
  %once = tensor.generic(%w) {dims = [6, 4], maps = [[d1]]} : tensor<6x4xf32> { ^(%a: f32): tensor.yield(%a) }
  %end, %y, %z = loop(%c, %back, %once) {body = @step, carried = 1, sliced = 2} : tensor<4xf32>, tensor<6x4xf32>, tensor<6x4xf32>
  %turned = tensor.generic(%y) {dims = [6, 4], maps = [[-d0 + 5, d1]]} : tensor<6x4xf32> { ^(%a: f32): tensor.yield(%a) }
  return(%end, %turned)
}
func @step {private = true} { ^(%c: tensor<4xf32>, %x: tensor<4xf32>, %w: tensor<4xf32>):
  %n = tensor.generic(%c, %x, %w) {dims = [4], maps = [[d0], [d0], [d0]]} : tensor<4xf32> {
    ^(%a: f32, %b: f32, %d: f32): %p = arith.mul(%b, %d) : f32 %q = arith.add(%a, %p) : f32 tensor.yield(%q) }
  return(%n, %n, %x)
} }
// -----

// The gradient of a weight: one product of 6 * 3 rows behind the loop, which stacks the factor that only it had.
// CHECK-LABEL: func @gradient
// CHECK: %{{.*}}, %[[ROWS:.*]] = loop(%h, %xs, %packed) {body = @step, carried = 1, sliced = 1} : tensor<3x4xf32>, tensor<6x3x4xf32>
// CHECK: %[[SUM:.*]] = tensor.generic(%[[ROWS]], %xs) {{.*}}dims = [4, 4, 6, 3], maps = {{\[}}[d2, d3, d0], [d2, d3, d1]], reductions = 2
// CHECK: tensor.generic(%w, %[[SUM]])
// CHECK-LABEL: func @step
// CHECK-NOT: dims = [4, 4
module { func @gradient { ^(%h: tensor<3x4xf32>, %w: tensor<4x4xf32>, %xs: tensor<6x3x4xf32>, %m: tensor<4xf32>):
  %end, %sum = loop(%h, %w, %xs, %m) {body = @step, carried = 2, sliced = 1} : tensor<3x4xf32>, tensor<4x4xf32>
  return(%end, %sum)
}
func @step {private = true, arg_attrs = [{kind = "input"}, {kind = "input"}, {kind = "input"}, {kind = "param"}]} {
^(%h: tensor<3x4xf32>, %w: tensor<4x4xf32>, %x: tensor<3x4xf32>, %m: tensor<4xf32>):
  %packed = tensor.generic(%m) {dims = [4], maps = [[-d0 + 3]]} : tensor<4xf32> { ^(%a: f32): tensor.yield(%a) }
  %n = tensor.generic(%h, %packed) {dims = [3, 4], maps = [[d0, d1], [d1]]} : tensor<3x4xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %t = tensor.generic(%n, %x) {dims = [4, 4, 3], maps = [[d2, d0], [d2, d1]], reductions = 1, combine = ["sum"]} : tensor<4x4xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %s = tensor.generic(%w, %t) {dims = [4, 4], maps = [[d0, d1], [d0, d1]]} : tensor<4x4xf32> {
    ^(%a: f32, %b: f32): %p = arith.add(%a, %b) : f32 tensor.yield(%p) }
  return(%n, %s)
} }
// -----

// An accumulator that the step reads for something else too stays where it is.
// CHECK-LABEL: func @read
// CHECK: loop(%w, %xs) {body = @step, carried = 1, sliced = 1} : tensor<4x4xf32>
module { func @read { ^(%w: tensor<4x4xf32>, %xs: tensor<6x3x4xf32>):
  %sum, %y = loop(%w, %xs) {body = @step, carried = 1, sliced = 1} : tensor<4x4xf32>, tensor<6x4x4xf32>
  return(%sum, %y)
}
func @step {private = true} { ^(%w: tensor<4x4xf32>, %x: tensor<3x4xf32>):
  %t = tensor.generic(%x, %x) {dims = [4, 4, 3], maps = [[d2, d0], [d2, d1]], reductions = 1, combine = ["sum"]} : tensor<4x4xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  %s = tensor.generic(%w, %t) {dims = [4, 4], maps = [[d0, d1], [d0, d1]]} : tensor<4x4xf32> {
    ^(%a: f32, %b: f32): %p = arith.add(%a, %b) : f32 tensor.yield(%p) }
  return(%s, %s)
} }
