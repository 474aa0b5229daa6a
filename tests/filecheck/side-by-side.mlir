// RUN: aicc opt %s --passes "bufferize,side-by-side"

// Two towers of two launches each: the first two share a region, and so do the second two. The last launch needs both.
// CHECK-LABEL: func @main
// CHECK: host.launch(%x, %a) {kernel = @k, outputs = 1, beside = 1}
// CHECK-NEXT: host.launch(%x, %b) {kernel = @k, outputs = 1, beside = 1}
// CHECK: host.launch(%a, %c) {kernel = @k, outputs = 1, beside = 2}
// CHECK-NEXT: host.launch(%b, %d) {kernel = @k, outputs = 1, beside = 2}
// CHECK: host.launch(%c, %d, %e) {kernel = @two, outputs = 1}
module {level = "tile"} { tile.kernel @k {grid = [4], outputs = 1, bytes = 100000} { ^(%p: buffer<16xf32>, %q: buffer<16xf32>): tile.yield() }
tile.kernel @two {grid = [4], outputs = 1, bytes = 100000} { ^(%p: buffer<16xf32>, %q: buffer<16xf32>, %r: buffer<16xf32>): tile.yield() }
func @main { ^(%x: tensor<16xf32>):
  %a = tile.launch(%x) {kernel = @k} : tensor<16xf32>
  %c = tile.launch(%a) {kernel = @k} : tensor<16xf32>
  %b = tile.launch(%x) {kernel = @k} : tensor<16xf32>
  %d = tile.launch(%b) {kernel = @k} : tensor<16xf32>
  %e = tile.launch(%c, %d) {kernel = @two} : tensor<16xf32>
  return(%e)
} }
// -----

// Not worth a region: too short. Nor what is long: it is split by itself.
// CHECK-LABEL: func @main
// CHECK-NOT: beside
module {level = "tile"} { tile.kernel @short {grid = [4], outputs = 1, bytes = 1000} { ^(%p: buffer<16xf32>, %q: buffer<16xf32>): tile.yield() }
tile.kernel @long {grid = [400], outputs = 1, bytes = 10000000} { ^(%p: buffer<16xf32>, %q: buffer<16xf32>): tile.yield() }
func @main { ^(%x: tensor<16xf32>):
  %a = tile.launch(%x) {kernel = @short} : tensor<16xf32>
  %b = tile.launch(%x) {kernel = @short} : tensor<16xf32>
  %c = tile.launch(%x) {kernel = @long} : tensor<16xf32>
  %d = tile.launch(%x) {kernel = @long} : tensor<16xf32>
  return(%a, %b, %c, %d)
} }
// -----

// The short launches are not worth a group and stay where they are: a launch that reads what one of them makes does not move up past it.
// CHECK-LABEL: func @main
// CHECK: host.launch(%x, %p) {kernel = @short, outputs = 1}
// CHECK: host.launch(%x, %q) {kernel = @short, outputs = 1}
// CHECK: host.launch(%p, %u) {kernel = @k, outputs = 1, beside = 1}
// CHECK-NEXT: host.launch(%q, %v) {kernel = @k, outputs = 1, beside = 1}
module {level = "tile"} { tile.kernel @short {grid = [4], outputs = 1, bytes = 1000} { ^(%p: buffer<16xf32>, %q: buffer<16xf32>): tile.yield() }
tile.kernel @k {grid = [4], outputs = 1, bytes = 100000} { ^(%p: buffer<16xf32>, %q: buffer<16xf32>): tile.yield() }
func @main { ^(%x: tensor<16xf32>):
  %p = tile.launch(%x) {kernel = @short} : tensor<16xf32>
  %u = tile.launch(%p) {kernel = @k} : tensor<16xf32>
  %q = tile.launch(%x) {kernel = @short} : tensor<16xf32>
  %v = tile.launch(%q) {kernel = @k} : tensor<16xf32>
  return(%u, %v)
} }
