// RUN: aicc opt %s --passes "decompose,canonicalize,inline,dce,fuse,tile" --target avx2

// Rows that lie in one piece are sorted from where they are; what nobody asks for is not written.
// CHECK-LABEL: tile.kernel @sort {
// CHECK-NOT: tile.alloca
// CHECK: tile.sort(%in0, %out0, %out1, {{.*}}) {values = true, places = true}
// CHECK-LABEL: tile.kernel @sort_2
// CHECK: tile.sort(%in0, %out0, {{.*}}) {values = false, places = true, largest = false}

// Computed elements are written to memory of the program's own first.
// CHECK-LABEL: tile.kernel @sort_exp
// CHECK: %[[row:.*]] = tile.alloca() : buffer<100xf32>
// CHECK: arith.exp
// CHECK: tile.store(%[[row]]
// CHECK: tile.sort(%[[row]],
module { func @best { ^(%x: tensor<64x100xf32>):
  %v, %i = graph.sort(%x) {dim = 1, keep = 8} : tensor<64x8xf32>, tensor<64x8xi64>
  %a, %b = graph.sort(%x) {dim = 1, keep = 100, largest = false} : tensor<64x100xf32>, tensor<64x100xi64>
  %e = graph.exp(%x) : tensor<64x100xf32>
  %c, %d = graph.sort(%e) {dim = 1, keep = 100} : tensor<64x100xf32>, tensor<64x100xi64>
  return(%v, %i, %b, %c)
} }
