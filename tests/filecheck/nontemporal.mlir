// RUN: aicc opt %s --passes "fuse,tile,schedule,bufferize,plan-memory,nontemporal" --target avx2 --remarks

// The caches of this target hold 4 MiB: a sum that moves 12 MiB is written past them, one of 12 KiB is not.
// CHECK-LABEL: func @large
// CHECK: host.launch({{.*}}) {kernel = @add{{[^ ,]*}}, outputs = 1, nontemporal = [2]}
module { func @large { ^(%x: tensor<1048576xf32>, %y: tensor<1048576xf32>):
  %z = tensor.generic(%x, %y) {dims = [1048576], maps = [[d0], [d0]]} : tensor<1048576xf32> {
    ^(%a: f32, %b: f32): %s = arith.add(%a, %b) : f32 tensor.yield(%s) }
  return(%z)
} }
// -----
// CHECK-LABEL: func @small
// CHECK: host.launch({{.*}}) {kernel = @add{{[^ ,]*}}, outputs = 1}
// CHECK: nontemporal: done: 0 launches
module { func @small { ^(%x: tensor<1024xf32>, %y: tensor<1024xf32>):
  %z = tensor.generic(%x, %y) {dims = [1024], maps = [[d0], [d0]]} : tensor<1024xf32> {
    ^(%a: f32, %b: f32): %s = arith.add(%a, %b) : f32 tensor.yield(%s) }
  return(%z)
} }
// -----

// A size known only at run time: the launch decides by the bytes that it moves.
// CHECK-LABEL: func @symbolic
// CHECK: host.launch({{.*}}) {kernel = @add{{[^ ,]*}}, outputs = 1, nontemporal = [2], excess = s0*12 - 4194304}
module { func @symbolic {symbols = {s0 = [2, none]}} { ^(%x: tensor<s0xf32>, %y: tensor<s0xf32>):
  %z = tensor.generic(%x, %y) {dims = [s0], maps = [[d0], [d0]]} : tensor<s0xf32> {
    ^(%a: f32, %b: f32): %s = arith.add(%a, %b) : f32 tensor.yield(%s) }
  return(%z)
} }
// -----

// What the next op reads while it is in the caches stays there, although it has to leave room: 6 MiB are touched, less than twice the caches.
// CHECK-LABEL: func @chain
// CHECK: host.launch({{.*}}) {kernel = @exp, outputs = 1}
// CHECK: nontemporal: done: 0 launches
module { func @chain { ^(%x: tensor<400x1024xf32>):
  %y = tensor.generic(%x) {dims = [400, 1024], maps = [[d0, d1]]} : tensor<400x1024xf32> {
    ^(%a: f32): %e = arith.exp(%a) : f32 tensor.yield(%e) }
  %z = tensor.extern(%y) {target = "aten.cumsum", args = []} : tensor<400x1024xf32>
  return(%z)
} }
