// RUN: aicc opt %s --passes "fold-constants,dce"
// RUN: aicc opt %s --passes "fold-constants{max-elements=8},dce" --check-prefix SMALL

// CHECK-LABEL: func @fold
// CHECK-DAG: %[[S:.*]] = graph.full() {value = 6.0} : tensor<16xf32>
// CHECK-DAG: %[[C:.*]] = graph.constant() {value = dense<i64, [4], [0, 1, 4, 9]>} : tensor<4xi64>
// CHECK-DAG: %[[B:.*]] = graph.full() {value = true} : tensor<2xi1>
// CHECK: return(%[[S]], %[[C]], %[[B]])
// SMALL-LABEL: func @fold
// SMALL: graph.mul({{.*}}) : tensor<16xf32>
module { func @fold { ^():
  %a = graph.full() {value = 2.0} : tensor<16xf32>
  %b = graph.full() {value = 3.0} : tensor<16xf32>
  %s = graph.mul(%a, %b) : tensor<16xf32>
  %i = graph.constant() {value = dense<i64, [4], [0, 1, 2, 3]>} : tensor<4xi64>
  %c = graph.mul(%i, %i) : tensor<4xi64>
  %n = graph.full() {value = 1.0} : tensor<2xf32>
  %lt = graph.eq(%n, %n) : tensor<2xi1>
  return(%s, %c, %lt)
} }
// -----

// Declined: an operand that is not constant, a size that is not known.
// CHECK-LABEL: func @declined
// CHECK: graph.add(%x, %{{.*}})
// CHECK: graph.neg(%{{.*}}) : tensor<s0xf32>
module { func @declined {symbols = {s0 = [2, none]}} { ^(%x: tensor<s0xf32>):
  %one = graph.full() {value = 1.0} : tensor<s0xf32>
  %y = graph.add(%x, %one) : tensor<s0xf32>
  %z = graph.neg(%one) : tensor<s0xf32>
  return(%y, %z)
} }
// -----

// -0.0 keeps its sign; NaN stays NaN.
// CHECK-LABEL: func @special
// CHECK-DAG: value = dense<f32, [2], [-0.0, -0.0]>
// CHECK-DAG: {{(0x|nan)}}
module { func @special { ^():
  %z = graph.full() {value = 0.0} : tensor<2xf32>
  %n = graph.neg(%z) : tensor<2xf32>
  %q = graph.div(%z, %z) : tensor<2xf32>
  return(%n, %q)
} }
