"""Max pooling in training keeps a byte per maximum, and its gradient is eager's."""

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.dynamo import aot_backend
from aicc.frontend import window_places  # noqa: F401  (registers the operators)
from torch._functorch.aot_autograd import make_boxed_func

WINDOWS = [(3, 2, 1, False), (2, 2, 0, False), (3, 3, 1, True), (3, 2, 0, True), (2, 1, 0, False), ((3, 2), (2, 2), (1, 0), False)]


def image(*shape, dtype=torch.float32):
    x = torch.randint(0, 4, shape).to(dtype)  # ties
    x[0, 0, :3] = float("-inf")
    return x


@pytest.mark.product
@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil"), WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_eagers(kernel, stride, padding, ceil, dtype, last):
    torch.manual_seed(0)
    x = image(2, 5, 9, 11, dtype=dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    pool = torch.nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    want = pool(x)
    seed = torch.randint(-3, 4, want.shape).to(dtype)  # sums are exact
    wanted, = torch.autograd.grad(want, x, seed)
    torch._dynamo.reset()
    got = torch.compile(pool, backend="aicc", options={"cache": False}, dynamic=False)(x)
    found, = torch.autograd.grad(got, x, seed)
    assert torch.equal(got, want) and torch.equal(found, wanted) and found.stride() == wanted.stride()


def test_three_dimensions():
    x = torch.randn(2, 3, 5, 6, 7, requires_grad=True)
    want = F.max_pool3d(x, 2)
    wanted, = torch.autograd.grad(want.sin().sum(), x)
    torch._dynamo.reset()
    got = torch.compile(lambda x: F.max_pool3d(x, 2).sin().sum(), backend="aicc", options={"cache": False}, dynamic=False)(x)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], wanted)


@pytest.mark.parametrize(("dilation", "kept"), [(1, torch.int8), (2, torch.int64)])
def test_a_byte_is_saved(dilation, kept):
    """Where each window around an element can be asked; dilated windows keep torch's positions."""
    saved = []

    def compiler(role):
        def keep(gm, _):
            if role == "forward":
                saved.extend(n.meta["val"].dtype for n in gm.graph.output_node().args[0])
            return make_boxed_func(gm.forward)
        return keep
    torch._dynamo.reset()
    x = torch.randn(2, 4, 12, 12, requires_grad=True)
    made = torch.compile(lambda x: F.max_pool2d(x, 3, 2, 1, dilation), backend=aot_backend(compiler), dynamic=False)
    made(x).sum().backward()  # the graphs run through ATen
    assert kept in saved and ({torch.int8, torch.int64} - {kept}).isdisjoint(saved)
    got, x.grad = x.grad, None
    F.max_pool2d(x, 3, 2, 1, dilation).sum().backward()
    assert torch.equal(got, x.grad)
