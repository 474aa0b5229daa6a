// RUN: aicc opt %s --passes "decompose,unpad-concatenations" --target cuda

// Equal parts are read periodically, with no padding.
// CHECK-LABEL: func @equal
// CHECK: tensor.generic(%a, %b) {dims = [3, 10], maps = {{\[}}[d0, (d1 % 5)], [d0, (d1 % 5)]]}
module {level = "graph"} { func @equal { ^(%a: tensor<3x5xf32>, %b: tensor<3x5xf32>):
  %y = graph.cat(%a, %b) {dim = 1} : tensor<3x10xf32>
  return(%y)
} }
// -----

// Left alone: parts of different sizes, and more of them than it pays to read.
// CHECK-LABEL: func @unequal
// CHECK: tensor.generic(%a, %b) {{.*}}maps = {{\[}}[d0, d1], [d0, d1 - 5]], fills
module {level = "graph"} { func @unequal { ^(%a: tensor<3x5xf32>, %b: tensor<3x6xf32>):
  %y = graph.cat(%a, %b) {dim = 1} : tensor<3x11xf32>
  return(%y)
} }
// -----

// CHECK-LABEL: func @many
// CHECK: fills
module {level = "graph"} { func @many { ^(%a: tensor<2xf32>, %b: tensor<2xf32>, %c: tensor<2xf32>, %d: tensor<2xf32>, %e: tensor<2xf32>):
  %y = graph.cat(%a, %b, %c, %d, %e) {dim = 0} : tensor<10xf32>
  return(%y)
} }
