"""Activations and their derivatives in kernels, by the names of `moe.activations`."""

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):
    if NAME == "relu":
        return tl.maximum(x, 0.0)
    elif NAME == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive
    elif NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(NAME == "gelu_new")
        return 0.5 * x * (1.0 + _tanh_of_gelu(x))


@triton.jit
def derivative(x, NAME: tl.constexpr):
    """The derivative of `activate` at x; zero where a ReLU's input is not positive, as in torch."""
    if NAME == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "relu2":
        return 2.0 * tl.maximum(x, 0.0)
    elif NAME == "silu":
        share = tl.sigmoid(x)
        return share * (1.0 + x * (1.0 - share))
    elif NAME == "gelu":
        # The normal distribution's cumulative share, and x times its density.
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(NAME == "gelu_new")
        tanh = _tanh_of_gelu(x)
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope


@triton.jit
def _tanh_of_gelu(x):
    return 2.0 * tl.sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x)) - 1.0


@triton.jit
def softplus(x):
    """log(1 + exp(x)); exact too where exp(x) is lost beside 1."""
    power = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + power
    log = tl.where(one_more == 1.0, power, tl.log(one_more) * (power / tl.maximum(one_more - 1.0, 1e-30)))
    return tl.where(x > 20.0, x, log)
