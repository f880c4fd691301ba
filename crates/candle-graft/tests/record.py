"""Records what PyTorch computes, for `torch.rs`: `python record.py torch.safetensors`.

Each case has its arguments, the gradient of the result, the result, and the gradients of the arguments that have one,
all in f32, under names such as `rope/0`, `rope/weights`, `rope/y` and `rope/grad0`. The metadata have the versions.
"""

import json
import sys

import numpy
import safetensors.numpy
import torch
from torch.nn import functional as F

torch.manual_seed(16)
tensors = {}


def case(name, function, *args, constants=()):
    args = [torch.randn(arg) if isinstance(arg, (list, tuple)) else arg for arg in args]
    tracked = [
        arg.clone().requires_grad_(arg.is_floating_point() and i not in constants) for i, arg in enumerate(args)
    ]
    y = function(*tracked)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    tensors[f"{name}/y"] = y.detach()
    tensors[f"{name}/weights"] = weights
    for i, (arg, with_grad) in enumerate(zip(args, tracked)):
        tensors[f"{name}/{i}"] = arg
        if with_grad.grad is not None:
            tensors[f"{name}/grad{i}"] = with_grad.grad


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rope(x, cos, sin):
    """The form of Llama, for x of (b, h, t, d), and cos and sin of (t, d / 2) or (b, t, d / 2)."""
    cos, sin = (torch.cat((cs, cs), dim=-1) for cs in (cos, sin))
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return x * cos + rotate_half(x) * sin


def rope_i(x, cos, sin):
    """Pairs of neighbours as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def softcapped(q, k, v, scale, cap):
    """The attention of Gemma 2: causal, with capped scores."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * scale / cap)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
    return F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v


def angles(*shape):
    angle = torch.randn(*shape)
    return angle.cos(), angle.sin()


wide = torch.linspace(-9, 9, 401)
case("layer_norm", lambda x, w, b: F.layer_norm(x, [33], w, b, 1e-5), [4, 6, 33], [33], [33])
case("layer_norm_no_bias", lambda x, w: F.layer_norm(x, [48], w, None, 1e-5), [12, 48], [48])
case("rms_norm", lambda x, w: F.rms_norm(x, [40], w, 1e-6), [3, 5, 40], [40])
case("softmax", lambda x: F.softmax(x, -1), [5, 7, 19])
case("softmax_dim1", lambda x: F.softmax(x, 1), [5, 7, 19])
case("log_softmax", lambda x: F.log_softmax(x, -1), [9, 50])
case("gelu", F.gelu, wide)
case("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), wide)
case("silu", F.silu, wide)
case("sigmoid", torch.sigmoid, wide)
case("linear", F.linear, [2, 7, 24], [17, 24], [17])
case("linear_no_bias", F.linear, [9, 24], [17, 24])
case("rope", rope, [2, 3, 5, 16], *angles(5, 8))
case("rope_batched", rope, [2, 3, 5, 16], *angles(2, 5, 8))
case("rope_i", rope_i, [2, 3, 5, 16], *angles(5, 8))
case("rope_thd", lambda x, c, s: rope(x.transpose(1, 2), c, s).transpose(1, 2), [2, 5, 3, 16], *angles(5, 8))
case("cross_entropy", F.cross_entropy, [13, 50], torch.randint(50, [13]))
case(
    "attention_gqa_causal",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
    *([2, 4, 7, 8], [2, 2, 7, 8], [2, 2, 7, 8]),
)
case("attention_softcap", lambda q, k, v: softcapped(q, k, v, 0.7, 2.0), [2, 4, 5, 8], [2, 2, 9, 8], [2, 2, 9, 8])
case(
    "attention_mask",
    lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3),
    *([2, 3, 5, 8], [2, 3, 6, 8], [2, 3, 6, 8], [2, 1, 5, 6]),
)

metadata = {"torch": torch.__version__, "numpy": numpy.__version__, "safetensors": safetensors.__version__}
print(json.dumps(metadata))
arrays = {name: tensor.contiguous().numpy() for name, tensor in sorted(tensors.items())}
safetensors.numpy.save_file(arrays, sys.argv[1], metadata)
