"""How fast PyTorch's optimizers are on a GPU, on the shapes of `examples/throughput`.

    python3 benches/peers/torch_gpu.py
    python3 benches/peers/torch_gpu.py --cases bert --dtype bf16
    python3 benches/peers/torch_gpu.py --cases sparse --rows 10M --dim 64
    python3 benches/peers/torch_gpu.py --device cpu --quick

The last one needs no GPU: it shows that the script runs, and its times mean nothing.

Gradients are made beforehand and never change; there is no autograd in what is timed, but for `whole`. A GPU may be
shared, and its clocks change with its temperature: rounds alternate between the implementations of a case, and times
are medians. A copy of a buffer that no cache holds takes its turn in every round. It says what the memory can do in
that minute, and it evicts from the caches what the round before has left there.

A time in ms is what the GPU's own events say, from before the first kernel of a step to after its last. Where the host
is slower than the GPU, the GPU's waiting is in it. The host's time is how long a call takes to return, the GPU being
idle at first; an implementation that asks the GPU for a result, as SparseAdam does, has that wait in its host time.
"""

import argparse
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

SEED = 2015

# An update reads the parameter, the gradient and two moments, and writes all but the gradient.
ARRAYS_PER_UPDATE = 7

# The first call allocates the moments and compiles. Some more let caching allocators and clocks settle.
WARM_UP = 10

# The driver queues about a thousand launches and then blocks the caller. So many calls in a row stay below that, even
# those of `Adamax foreach`, which launches up to about a hundred kernels a step.
CALLS_PER_BURST = 4

# So many batches of gradients do not fit into a cache together.
SPARSE_BATCHES = 16

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CASES = ["dense", "bert", "small", "sparse"]
COPY = "copy"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Bert:
    """The sizes of a BERT encoder, and how many tensors they make."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int
    tensors: int

    def shapes(self) -> list[Shape]:
        """The shapes of the embeddings and of the layers. The pooler, two more tensors, is left out."""
        norm: list[Shape] = [(self.hidden,), (self.hidden,)]
        embeddings: list[Shape] = [(rows, self.hidden) for rows in (self.vocabulary, self.positions, 2)]
        attention = 4 * linear(self.hidden, self.hidden)  # query, key, value, output
        feed_forward = linear(self.hidden, self.intermediate) + linear(self.intermediate, self.hidden)
        shapes = embeddings + norm + self.layers * (attention + norm + feed_forward + norm)
        assert len(shapes) == self.tensors, f"expected {self.tensors} tensors, got {len(shapes)}"
        return shapes


def linear(inputs: int, outputs: int) -> list[Shape]:
    """The shapes of a weight and a bias."""
    return [(outputs, inputs), (outputs,)]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are, and how often each implementation runs."""

    elements: int
    bert: Bert
    small_tensors: int
    small_elements: int
    rows: int
    dim: int
    batch: int
    copy_bytes: int
    rounds: int
    host_calls: int


FULL = Sizes(
    elements=256_000_000,
    bert=Bert(layers=12, hidden=768, intermediate=3072, vocabulary=30_522, positions=512, tensors=197),
    small_tensors=1000,
    small_elements=64,
    rows=1_000_000,
    dim=64,
    batch=65_536,
    copy_bytes=1 << 30,
    rounds=50,
    host_calls=200,
)
QUICK = Sizes(
    elements=10_000,
    bert=Bert(layers=2, hidden=16, intermediate=64, vocabulary=100, positions=32, tensors=37),
    small_tensors=20,
    small_elements=64,
    rows=1000,
    dim=8,
    batch=256,
    copy_bytes=1 << 20,
    rounds=5,
    host_calls=8,
)


@dataclass(frozen=True)
class Contender:
    """Something to time: a step, and the bytes that it cannot avoid, where that is known."""

    name: str
    step: Callable[[], object]
    traffic: int | None


@dataclass(frozen=True)
class Case:
    """What is compared in one table, and what a reader of the table should know."""

    title: str
    contenders: list[Contender]
    notes: list[str]


@dataclass(frozen=True)
class Result:
    """The times of one contender."""

    contender: Contender
    median_ms: float
    host_us: float

    @property
    def gb_per_s(self) -> float | None:
        """The bytes that cannot be avoided, in terms of the time."""
        traffic = self.contender.traffic
        return None if traffic is None else traffic / self.median_ms / 1e6


def random_tensor(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers between -1 and 1: a GPU's clocks depend on the bits that change, and zeros would flatter."""
    return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1)


def parameters(grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """A parameter for each gradient. Optimizers only read gradients, so that several of them can share these."""
    params = [torch.nn.Parameter(random_tensor(tuple(grad.shape), grad.dtype, grad.device)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def compiled(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """The optimizer's step under `torch.compile`.

    Code of an earlier case is thrown away. It would count towards the limit of recompilations, beyond which the step
    silently is not a compiled one.
    """
    torch.compiler.reset()

    @torch.compile(dynamic=False)
    def step() -> None:
        optimizer.step()

    return step


def update_contenders(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, with_compile: bool
) -> list[Contender]:
    """The optimizers with parameters of these shapes."""
    grads = [random_tensor(shape, dtype, device) for shape in shapes]
    traffic = ARRAYS_PER_UPDATE * sum(grad.nbytes for grad in grads)
    adamax = torch.optim.Adamax(parameters(grads), foreach=True)
    contenders = [Contender("Adamax foreach", adamax.step, traffic)]
    if with_compile:
        step = compiled(torch.optim.Adamax(parameters(grads), foreach=True))
        contenders.append(Contender("Adamax compiled", step, traffic))
    adamw = torch.optim.AdamW(parameters(grads), fused=True)
    return [*contenders, Contender("AdamW fused", adamw.step, traffic)]


def update_case(name: str, shapes: Sequence[Shape], args: argparse.Namespace, device: torch.device) -> Case:
    """A case of dense gradients."""
    total = sum(torch.Size(shape).numel() for shape in shapes)
    dtype = DTYPES[args.dtype]
    notes = [f"{ARRAYS_PER_UPDATE * dtype.itemsize} bytes an element."]
    if dtype != torch.float32:
        with_f32_moments = 3 * dtype.itemsize + 4 * 4
        notes.append(f"PyTorch's moments are {args.dtype} too; with those of f32 it would be {with_f32_moments} bytes.")
    return Case(
        title=f"{name}: {len(shapes):,} tensors, {total:,} elements of {args.dtype} in all",
        contenders=update_contenders(shapes, dtype, device, not args.no_compile),
        notes=notes,
    )


def zipf_batches(sizes: Sizes, exponent: float) -> list[torch.Tensor]:
    """Batches of ids: the row of rank k is drawn in proportion to 1 / k**exponent, and ranks are dealt to random rows.

    They are drawn on the host, so that they are the same for every device.
    """
    ranks = torch.arange(1, sizes.rows + 1, dtype=torch.float64)
    cumulative = ranks.pow(-exponent).cumsum(0)
    row_of_rank = torch.randperm(sizes.rows)

    def draw() -> torch.Tensor:
        points = torch.rand(sizes.batch, dtype=torch.float64) * cumulative[-1]
        return row_of_rank[torch.searchsorted(cumulative, points).clamp_(max=sizes.rows - 1)]

    return [draw() for _ in range(SPARSE_BATCHES)]


class Table:
    """An embedding table with sparse gradients, and its optimizer."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.embedding = torch.nn.Embedding(sizes.rows, sizes.dim, sparse=True, device=device)
        self.optimizer = torch.optim.SparseAdam(self.embedding.parameters())

    def backward(self, ids: torch.Tensor) -> None:
        """Makes the gradient of a mean of squares. It must replace the last one: sparse gradients add up."""
        self.optimizer.zero_grad(set_to_none=True)
        self.embedding(ids).square().mean().backward()

    def gradient(self, ids: torch.Tensor) -> torch.Tensor:
        """The gradient, a row for each id: the optimizer has to add up the rows of equal ids."""
        self.backward(ids)
        grad = self.embedding.weight.grad
        assert grad is not None
        return grad

    def whole(self, batches: Iterator[torch.Tensor]) -> None:
        """A training step on the next batch."""
        self.backward(next(batches))
        self.optimizer.step()

    def step(self, grads: Iterator[torch.Tensor]) -> None:
        """The optimizer's part of it."""
        self.embedding.weight.grad = next(grads)
        self.optimizer.step()


def sparse_case(sizes: Sizes, exponent: float, device: torch.device) -> Case:
    """Lookups in an embedding table. Every call takes the next batch, so that caches hold popular rows at most."""
    on_host = zipf_batches(sizes, exponent)
    touched = round(statistics.mean(ids.unique().numel() for ids in on_host))
    batches = [ids.to(device) for ids in on_host]
    whole, step = Table(sizes, device), Table(sizes, device)
    next_batch = itertools.cycle(batches)
    next_grad = itertools.cycle([step.gradient(ids) for ids in batches])
    # As other updates do, but for the gradient, which has a row for each id.
    traffic = 4 * sizes.dim * ((ARRAYS_PER_UPDATE - 1) * touched + sizes.batch)
    return Case(
        title=f"sparse: a table of {sizes.rows:,} x {sizes.dim} f32, {sizes.batch:,} ids, Zipf with {exponent:g}",
        contenders=[
            Contender("SparseAdam whole", lambda: whole.whole(next_batch), None),
            Contender("SparseAdam step", lambda: step.step(next_grad), traffic),
        ],
        notes=[
            f"step: {touched:,} distinct rows, 24 bytes a number, and 4 for each number of the gradient of every id.",
            "whole: lookup, a mean of squares, backward, step. What it cannot avoid depends on what is fused.",
        ],
    )


def build_case(name: str, sizes: Sizes, args: argparse.Namespace, device: torch.device) -> Case:
    """The case of this name."""
    match name:
        case "dense":
            return update_case(name, [(sizes.elements,)], args, device)
        case "bert":
            return update_case(name, sizes.bert.shapes(), args, device)
        case "small":
            return update_case(name, sizes.small_tensors * [(sizes.small_elements,)], args, device)
        case _:
            return sparse_case(sizes, args.zipf, device)


def copy_contender(size: int, device: torch.device) -> Contender:
    """A copy within the device's memory, which reads and writes every byte once."""
    source = random_tensor((size // 4,), torch.float32, device)
    target = torch.empty_like(source)
    return Contender(COPY, lambda: target.copy_(source), 2 * source.nbytes)


def synchronize(device: torch.device) -> None:
    """Waits for the device. A CPU is done when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """How long the device takes for one step."""
    if device.type == "cpu":
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_microseconds(step: Callable[[], object], calls: int, device: torch.device) -> float:
    """How long a call takes to return, on average over some calls."""
    bursts = -(-calls // CALLS_PER_BURST)
    elapsed = 0.0
    for _ in range(bursts):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(CALLS_PER_BURST):
            step()
        elapsed += time.perf_counter() - begin
    synchronize(device)
    return elapsed * 1e6 / (bursts * CALLS_PER_BURST)


def warm_up(contenders: list[Contender], device: torch.device) -> tuple[list[Contender], list[str]]:
    """Runs each some times. Which of them work, and what the others say.

    `torch.compile` needs a compiler and Triton, and not every machine has them: the others are timed all the same.
    """
    working, failures = [], []
    for contender in contenders:
        try:
            for _ in range(WARM_UP):
                contender.step()
            synchronize(device)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            failures.append(f"{contender.name} is left out: {type(error).__name__}: {reason}")
        else:
            working.append(contender)
    return working, failures


def measure(contenders: list[Contender], sizes: Sizes, device: torch.device) -> list[Result]:
    """Times one step of each in turn, round by round, and then their calls."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(sizes.rounds):
        for contender, of_contender in zip(contenders, times, strict=True):
            of_contender.append(milliseconds(contender.step, device))
    return [
        Result(contender, statistics.median(of_contender), host_microseconds(contender.step, sizes.host_calls, device))
        for contender, of_contender in zip(contenders, times, strict=True)
    ]


def print_table(results: list[Result]) -> None:
    """Prints a line for each result, beside the speed of the copy."""
    copy_speed = next(result.gb_per_s for result in results if result.contender.name == COPY)
    columns = ["median ms", "bytes per step", "GB/s", "of copy", "host us"]
    print(f"{'implementation':<18}" + "".join(f"{column:>16}" for column in columns))
    for result in results:
        speed = result.gb_per_s
        cells = [
            f"{result.median_ms:.4f}",
            "-" if result.contender.traffic is None else f"{result.contender.traffic}",
            "-" if speed is None else f"{speed:.1f}",
            "-" if speed is None or copy_speed is None else f"{speed / copy_speed:.1%}",
            f"{result.host_us:.1f}",
        ]
        print(f"{result.contender.name:<18}" + "".join(f"{cell:>16}" for cell in cells))


def run_case(case: Case, copy: Contender, sizes: Sizes, device: torch.device) -> bool:
    """Times a case and prints its table. Whether all of its implementations work."""
    contenders, failures = warm_up([*case.contenders, copy], device)
    print(f"\n{case.title}; {sizes.rounds} rounds\n")
    print_table(measure(contenders, sizes, device))
    print("\n" + "\n".join(case.notes + failures), flush=True)
    return not failures


def print_head(device: torch.device) -> None:
    """Prints what the figures hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    print(f"device: {name}")
    print(f"torch:  {torch.__version__}")
    print(f"CUDA:   {torch.version.cuda}")


def count(text: str) -> int:
    """A positive number, written as 256000000, 256_000_000 or 256M."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9}
    unit = units.get(text[-1:].upper())
    value = int(text) if unit is None else int(text[:-1]) * unit
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def device_of(text: str) -> torch.device:
    """A device that can be timed: of a GPU other than CUDA's there are no events here."""
    if text.partition(":")[0] not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {text}")
    return torch.device(text)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Times PyTorch's optimizers beside a copy within the GPU's memory, in one run."
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="what to time [default: all]")
    parser.add_argument("--device", type=device_of, default="cuda", help="cuda, cuda:1, cpu [default: cuda]")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="f32",
        help="the type of parameters and gradients; `sparse` is always of f32 [default: f32]",
    )
    parser.add_argument("--elements", type=count, help="how many elements `dense` has [default: 256M]")
    parser.add_argument("--rows", type=count, help="how many rows the table of `sparse` has [default: 1M]")
    parser.add_argument("--dim", type=count, help="how many numbers a row of it has [default: 64]")
    parser.add_argument("--batch", type=count, help="how many ids are looked up in it [default: 65,536]")
    parser.add_argument(
        "--zipf", type=float, default=1.0, help="the exponent of the ids' distribution; 0 makes it uniform [default: 1]"
    )
    parser.add_argument("--rounds", type=count, help="how often each implementation is timed [default: 50]")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave `Adamax compiled` out, which can take minutes to compile"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds, to see that everything runs")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: PyTorch finds no GPU here")
    return args


def chosen_sizes(args: argparse.Namespace) -> Sizes:
    """The sizes that were asked for."""
    asked = {name: getattr(args, name) for name in ("elements", "rows", "dim", "batch", "rounds")}
    return replace(QUICK if args.quick else FULL, **{name: value for name, value in asked.items() if value is not None})


def main() -> int:
    """Runs the cases. Not 0 if an implementation does not work."""
    args = parse_args()
    sizes, device = chosen_sizes(args), args.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(SEED)
    print_head(device)
    copy = copy_contender(sizes.copy_bytes, device)
    # No name holds a case while the next one is built: its memory is free by then.
    all_work = [run_case(build_case(name, sizes, args, device), copy, sizes, device) for name in args.cases]
    return 0 if all(all_work) else 1


if __name__ == "__main__":
    sys.exit(main())
