"""The lines of `speed.rs`, computed by PyTorch on one thread: `python speed.py`, or `python speed.py linear`."""

import sys
import time

import torch
from torch.nn import functional as F

torch.set_num_threads(1)


def medians(run):
    times, begin = [], time.perf_counter()
    while len(times) < 9 or time.perf_counter() - begin < 2.0:
        times.append(run())
    return sorted(times)[len(times) // 2] * 1e3


def line(name, shapes, function, constants=0):
    if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
        return
    args = [torch.randn(shape) for shape in shapes]

    def forward():
        with torch.no_grad():
            begin = time.perf_counter()
            y = function(*args)
            return time.perf_counter() - begin

    def backward():
        tracked = [arg.clone().requires_grad_(i < len(args) - constants) for i, arg in enumerate(args)]
        loss = function(*tracked).sum()
        begin = time.perf_counter()
        loss.backward()
        return time.perf_counter() - begin

    print(f"{name:<34} {medians(forward):>9.3f} {medians(backward):>9.3f}", flush=True)


print(f"PyTorch {torch.__version__}")
print(f"{'':<34} {'forward':>9} {'backward':>9}")
for model, rows, n in [("MiniLM", [32, 48], 384), ("Llama", [1, 256], 2048)]:
    x = rows + [n]
    line(f"layer_norm {model} {x}", [x, [n], [n]], lambda x, w, b: F.layer_norm(x, [x.shape[-1]], w, b, 1e-12))
    line(f"rms_norm {model} {x}", [x, [n]], lambda x, w: F.rms_norm(x, [x.shape[-1]], w, 1e-12))
for x in ([32, 12, 48, 48], [1, 32, 256, 256]):
    line(f"softmax {x}", [x], lambda x: F.softmax(x, -1))
for x in ([32, 48, 1536], [1, 256, 5632]):
    line(f"gelu {x}", [x], F.gelu)
    line(f"gelu_tanh {x}", [x], lambda x: F.gelu(x, approximate="tanh"))
    line(f"silu {x}", [x], F.silu)
for x, out in (([32, 48, 384], 384), ([32, 48, 384], 1536), ([32, 48, 1536], 384), ([1, 256, 2048], 2048)):
    line(f"linear {x} to {out}", [x, [out, x[2]], [out]], F.linear)
targets = torch.randint(8192, [256])
line("cross_entropy [256, 8192]", [[256, 8192]], lambda x: F.cross_entropy(x, targets))
for x in ([32, 12, 48, 32], [1, 32, 256, 64]):
    scale = x[3] ** -0.5
    line(f"attention {x}", [x, x, x], lambda q, k, v: F.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v)
