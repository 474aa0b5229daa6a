// RUN: aicc opt %s --passes "decompose,canonicalize,dce,fuse,tile" --target avx2

// One pass over the row: a list of eight of the best in the program's memory, into which a tile enters what beats its last.
// CHECK-LABEL: tile.kernel
// CHECK: %[[v:.*]] = tile.alloca() : buffer<8xf32>
// CHECK: %[[p:.*]] = tile.alloca() : buffer<8xi64>
// CHECK: tile.keep(%[[v]], %[[p]], {{.*}}) {offset = i0 + t1, mask = {{\[}}[i0 + t1, 100]]}
module { func @best { ^(%x: tensor<64x100xf32>):
  %v, %i = graph.topk(%x) {dim = 1, k = 8} : tensor<64x8xf32>, tensor<64x8xi64>
  return(%v, %i)
} }
