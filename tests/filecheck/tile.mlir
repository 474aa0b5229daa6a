// RUN: aicc opt %s --passes "fuse,tile,dce" --target avx2
// RUN: aicc opt %s --passes "fuse,tile,dce" --target cuda --check-prefix GPU

// Pointwise over a symbolic size: a masked loop over chunks, in place if the caller likes.
// CHECK-LABEL: tile.kernel @exp
// CHECK-SAME: grid = [((s0 + 4095) // 4096)]
// CHECK-SAME: inplace = {{\[}}[0, 1]]
// CHECK: tile.for
// CHECK: %[[V:.*]] = tile.load({{.*}}shape = [1, 32], mask = {{\[}}[i1 + t1, min(i0*4096 + 4096, s0)]]
// CHECK: %[[E:.*]] = arith.exp(%[[V]]) : tile<1x32xf32>
// CHECK: tile.store({{.*}}, %[[E]]
// CHECK: %y = tile.launch(%x) {kernel = @exp} : tensor<s0xf32>
// GPU-LABEL: tile.kernel @exp
// GPU-SAME: grid = [((s0 + 1023) // 1024)]
// GPU-NOT: tile.for
module { func @pointwise {symbols = {s0 = [2, none]}} { ^(%x: tensor<s0xf32>):
  %y = tensor.generic(%x) {dims = [s0], maps = [[d0]]} : tensor<s0xf32> { ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  return(%y)
} }
// -----

// A row sum: one program per row, vectors along it, then one reduction across the vector. Equal kernels are shared.
// CHECK-LABEL: tile.kernel @sum
// CHECK-SAME: grid = [16]
// CHECK: tile.for
// CHECK: arith.add
// CHECK: tile.reduce({{.*}}) {axis = 1, kind = "sum"} : tile<1x1xf32>
// CHECK-NOT: tile.kernel
// CHECK: %y = tile.launch(%x) {kernel = @sum}
// CHECK: %z = tile.launch(%y0) {kernel = @sum}
module { func @rows { ^(%x: tensor<16x256xf32>, %y0: tensor<16x256xf32>):
  %y = tensor.generic(%x) {dims = [16, 256], reductions = 1, combine = ["sum"], maps = [[d0, d1]]} : tensor<16xf32> { ^(%a: f32): tensor.yield(%a) }
  %z = tensor.generic(%y0) {dims = [16, 256], reductions = 1, combine = ["sum"], maps = [[d0, d1]]} : tensor<16xf32> { ^(%a: f32): tensor.yield(%a) }
  return(%y, %z)
} }
// -----

// A matmul: rank-1 updates of a 6x16 register tile on the CPU, 64x32 blocks by tile.dot on the GPU.
// CHECK-LABEL: tile.kernel @matmul
// CHECK: tile.dot({{.*}}) : tile<6x16xf32>
// GPU-LABEL: tile.kernel @matmul
// GPU: tile.dot({{.*}}) : tile<64x32xf32>
module { func @matmul { ^(%x: tensor<60x32xf32>, %w: tensor<32x32xf32>):
  %m = tensor.generic(%x, %w) {dims = [60, 32, 32], reductions = 1, combine = ["sum"], maps = [[d0, d2], [d2, d1]]} : tensor<60x32xf32> {
    ^(%a: f32, %b: f32): %p = arith.mul(%a, %b) : f32 tensor.yield(%p) }
  return(%m)
} }
// -----

// A concatenation's parts are read padded, so none of them may share the result's memory.
// CHECK-LABEL: tile.kernel @lt
// CHECK-NOT: inplace
// CHECK: tile.launch
module { func @cat { ^(%x: tensor<3x4xf32>, %z: tensor<2x4xf32>):
  %y = tensor.generic(%x, %z) {dims = [5, 4], maps = [[d0, d1], [d0 - 3, d1]], fills = [0.0, 0.0]} : tensor<5x4xf32> {
    ^(%a: f32, %b: f32): %i = tensor.index() {dim = 0} : i64 %c = arith.constant() {value = 3} : i64 %l = arith.lt(%i, %c) : i1
      %s = arith.select(%l, %a, %b) : f32 tensor.yield(%s) }
  return(%y)
} }
