"""How fast PyTorch is on a CPU, on the shapes of `examples/throughput`.

    pip install torch
    python3 benches/peers/torch_cpu.py dense --elements 10000000
    python3 benches/peers/torch_cpu.py small --tensors 1000 --elements 64
    python3 benches/peers/torch_cpu.py sparse --rows 1000000 --dim 64 --batch 8192
    python3 benches/peers/torch_cpu.py bag --rows 1000000 --bags 8192 --per-bag 20
    python3 benches/peers/torch_cpu.py train
    python3 benches/peers/torch_cpu.py train --items 1000000

The cases and their options are those of `throughput`, and so are the keys of `--json`. The wheel of `torch` on PyPI
brings CUDA's libraries along, which take some gigabytes and are not used; PyTorch's own index has a smaller one.

Rounds alternate between the implementations of a case, and times are medians. Gradients of `dense` and `small` are made
beforehand. `Adamax compiled` needs a C++ compiler; without one it is left out, and stderr says why. Two programs share
no rounds: to compare with `throughput`, run both in turn, with the same number of threads, several times.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

SEED = 2015

# The first calls allocate the moments and compile.
WARM_UP = 5

# An update reads the parameter, the gradient and two moments, and writes all but the gradient.
BYTES_PER_UPDATE = 7 * 4

# The sizes of `examples/recommender`.
DIM = 32
HIDDEN = 32
HISTORY = 10
NEGATIVES = 4
INTERACTION_WEIGHT = 0.7
MEAN = 3.6
RATINGS = 214_634
TESTS = 24_048
CANDIDATES = 100
CHUNK = 16_384
# The item at place n is chosen in proportion to (n + 10) ** -ZIPF.
ZIPF = 0.9
# Steps of a contender in a round. The first is not counted: others have taken its weights out of the caches.
STEPS = 5


@dataclass
class Contender:
    """Something to time, and its times in ms by case. `run` returns the times of the cases that it has run."""

    name: str
    run: Callable[[], dict[str, list[float]]]
    times: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What is compared, and the keys that say its shape."""

    contenders: list[Contender]
    shape: dict[str, int | str]
    # Bytes that a step cannot avoid, where that is known.
    traffic: int | None = None


def milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def timed(case: str, call: Callable[[], object]) -> Callable[[], dict[str, list[float]]]:
    """A call as the only case of a contender."""
    return lambda: {case: [milliseconds(call)]}


# === One tensor, or many ===


def parameters(grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """A parameter for each gradient. Optimizers only read gradients, so several of them share these."""
    params = [torch.nn.Parameter(torch.rand_like(grad) - 0.5) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def compiled(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """The optimizer's step under `torch.compile`."""

    @torch.compile(dynamic=False)
    def step() -> None:
        optimizer.step()

    return step


def update_work(case: str, tensors: int, elements: int, with_compile: bool) -> Work:
    """Updates of `tensors` tensors of so many elements each."""
    grads = [torch.rand(elements) - 0.5 for _ in range(tensors)]
    steps: dict[str, Callable[[], object]] = {
        "Adamax foreach": torch.optim.Adamax(parameters(grads), foreach=True).step,
        "Adam fused": torch.optim.Adam(parameters(grads), fused=True).step,
        "AdamW fused": torch.optim.AdamW(parameters(grads), fused=True).step,
    }
    if with_compile:
        steps["Adamax compiled"] = compiled(torch.optim.Adamax(parameters(grads), foreach=True))
    return Work(
        contenders=[Contender(name, timed(case, step)) for name, step in steps.items()],
        shape={"tensors": tensors, "elements": tensors * elements, "dtype": "f32", "state": "F32"},
        traffic=BYTES_PER_UPDATE * tensors * elements,
    )


# === Rows of a table ===


def uniform_batches(rows: int, *shape: int) -> Iterator[torch.Tensor]:
    """Ids for the rounds, which do not repeat."""
    while True:
        yield torch.randint(rows, shape)


def table(module: torch.nn.Embedding | torch.nn.EmbeddingBag) -> torch.optim.Optimizer:
    """The optimizer of a table, whose moments are as large as it is."""
    return torch.optim.SparseAdam(module.parameters())


def sparse_work(args: argparse.Namespace) -> Work:
    """Lookups: a lookup, a step, and both with a linear layer and a backward pass between them."""
    embedding = torch.nn.Embedding(args.rows, args.dim, sparse=True)
    linear = torch.nn.Linear(args.dim, 1)
    of_table, of_linear = table(embedding), torch.optim.Adamax(linear.parameters(), foreach=True)
    batches = uniform_batches(args.rows, args.batch)

    def backward(ids: torch.Tensor) -> None:
        # The gradient must replace the last one: sparse gradients add up.
        of_table.zero_grad()
        of_linear.zero_grad()
        linear(embedding(ids)).square().mean().backward()

    def step() -> None:
        of_table.step()
        of_linear.step()

    def whole(ids: torch.Tensor) -> None:
        backward(ids)
        step()

    def run() -> dict[str, list[float]]:
        for_lookup, for_step, for_whole = next(batches), next(batches), next(batches)
        lookup = milliseconds(lambda: embedding(for_lookup))
        backward(for_step)
        return {"lookup": [lookup], "step": [milliseconds(step)], "whole": [milliseconds(lambda: whole(for_whole))]}

    shape = {"rows": args.rows, "dim": args.dim, "batch": args.batch}
    return Work([Contender("SparseAdam", run)], shape)


def bag_works(args: argparse.Namespace) -> list[Work]:
    """Rows that are pooled: the forward pass, and then, since it leaves writes under way, a whole training step."""
    bag = torch.nn.EmbeddingBag(args.rows, args.dim, mode=args.pooling, sparse=True)
    optimizer = table(bag)
    batches = uniform_batches(args.rows, args.bags, args.per_bag)

    def whole(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        bag(ids).square().mean().backward()
        optimizer.step()

    def on_next(case: str, call: Callable[[torch.Tensor], object]) -> Work:
        def run() -> dict[str, list[float]]:
            ids = next(batches)
            return {case: [milliseconds(lambda: call(ids))]}

        shape = {name: getattr(args, name) for name in ("rows", "dim", "bags", "per_bag", "pooling")}
        return Work([Contender("EmbeddingBag, SparseAdam", run)], shape)

    return [on_next("bag forward", bag), on_next("bag whole", whole)]


# === The recommender ===


class Recommender(torch.nn.Module):
    """The model of `examples/recommender`: embeddings of users and items, an MLP, and two heads."""

    def __init__(self, users: int, items: int, sparse: bool) -> None:
        super().__init__()
        self.users = torch.nn.Embedding(users, DIM, sparse=sparse)
        self.items = torch.nn.Embedding(items, DIM, sparse=sparse)
        self.history = torch.nn.EmbeddingBag(items, DIM, mode="mean", sparse=sparse)
        self.user_biases = torch.nn.Embedding(users, 2, sparse=sparse)
        self.item_biases = torch.nn.Embedding(items, 2, sparse=sparse)
        self.tables = torch.nn.ModuleList([self.users, self.items, self.history, self.user_biases, self.item_biases])
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(3 * DIM, HIDDEN),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, HIDDEN // 2),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN // 2, 2),
        )
        with torch.no_grad():
            for rows in (self.users, self.items, self.history):
                rows.weight.uniform_(-0.17, 0.17)
            for rows in (self.user_biases, self.item_biases):
                rows.weight.zero_()

    def forward(
        self, users: torch.Tensor, items: torch.Tensor, histories: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ratings and logits of pairs. `histories` are those of the first users; then they begin again."""
        pooled = self.history(histories).repeat(len(users) // len(histories), 1)
        p, q = self.users(users) + pooled, self.items(items)
        product = p * q
        heads = self.mlp(torch.cat([p, q, product], 1)) + self.user_biases(users) + self.item_biases(items)
        return heads[:, 0] + MEAN, heads[:, 1] + product.sum(1)


class Data:
    """Ratings with the shape of those that the example makes up."""

    def __init__(self, users: int, items: int) -> None:
        self.user_count, self.item_count = users, items
        weights = (torch.arange(items, dtype=torch.float64) + 10).pow(-ZIPF)
        self.cumulative, self.item_of_place = weights.cumsum(0), torch.randperm(items)
        self.users = torch.randint(users, (RATINGS,))
        self.items = self.draw(RATINGS)
        self.histories = self.draw(RATINGS, HISTORY)
        self.values = torch.randint(1, 6, (RATINGS,)).float()
        # Each user's candidates, whose history is pooled once for all of them; and single pairs.
        self.candidates = torch.randint(items, (users, CANDIDATES))

    def draw(self, *shape: int) -> torch.Tensor:
        """Items by popularity."""
        points = torch.rand(shape, dtype=torch.float64) * self.cumulative[-1]
        return self.item_of_place[torch.searchsorted(self.cumulative, points).clamp_(max=self.item_count - 1)]

    def batch(self, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pairs of these ratings, and as many with random items, `NEGATIVES` times."""
        negatives = torch.randint(self.item_count, (NEGATIVES * len(chosen),))
        users = self.users[chosen].repeat(1 + NEGATIVES)
        return users, torch.cat([self.items[chosen], negatives]), self.histories[chosen], self.values[chosen]

    def questions(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What an evaluation asks."""
        for begin in range(0, self.user_count, CHUNK // CANDIDATES):
            users = torch.arange(begin, min(begin + CHUNK // CANDIDATES, self.user_count))
            yield users.repeat(CANDIDATES), self.candidates[users].t().flatten(), self.histories[users % RATINGS]
        for begin in range(0, TESTS, CHUNK):
            tests = slice(begin, min(begin + CHUNK, TESTS))
            yield self.users[tests], self.items[tests], self.histories[tests]


class Training:
    """A model in training."""

    def __init__(self, data: Data, batch: int, sparse: bool) -> None:
        self.data = data
        self.model = Recommender(data.user_count, data.item_count, sparse)
        if sparse:
            of_tables = torch.optim.SparseAdam(self.model.tables.parameters(), lr=0.02)
            self.optimizers = [of_tables, torch.optim.Adamax(self.model.mlp.parameters(), lr=0.02, foreach=True)]
        else:
            self.optimizers = [torch.optim.Adamax(self.model.parameters(), lr=0.02, foreach=True)]
        self.batches = itertools.cycle(torch.randperm(RATINGS).split(batch)[: RATINGS // batch])

    def step(self) -> dict[str, float]:
        """One step. How long each part took, in ms."""
        begin = time.perf_counter()
        users, items, histories, values = self.data.batch(next(self.batches))
        batched = time.perf_counter()
        ratings, logits = self.model(users, items, histories)
        positives = len(values)
        mse = torch.nn.functional.mse_loss(ratings[:positives], values)
        interactions = torch.nn.functional.softplus(logits).sum() - logits[:positives].sum()
        loss = mse + INTERACTION_WEIGHT * interactions / positives
        mse.item()
        forwarded = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        differentiated = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.perf_counter()
        names = ("batch", "forward", "backward", "step", "whole")
        marks = (begin, batched, forwarded, differentiated, end)
        parts = [after - before for before, after in itertools.pairwise(marks)]
        return {name: 1e3 * part for name, part in zip(names, [*parts, end - begin], strict=True)}

    def evaluate(self) -> None:
        """Predicts what an evaluation of the example asks for."""
        with torch.no_grad():
            for question in self.data.questions():
                self.model(*question)[1].tolist()

    def run(self) -> dict[str, list[float]]:
        """The steps of a round, and an evaluation."""
        steps = [self.step() for _ in range(STEPS)][1:]
        times = {name: [step[name] for step in steps] for name in steps[0]}
        return times | {"evaluation": [milliseconds(self.evaluate)]}


def train_work(args: argparse.Namespace) -> Work:
    """The recommender's training step with dense gradients and with those of some rows."""
    data = Data(args.users, args.items)
    contenders = [Contender("tables SparseAdam, MLP Adamax", Training(data, args.batch, sparse=True).run)]
    if not args.no_dense:
        contenders.append(Contender("dense Adamax foreach", Training(data, args.batch, sparse=False).run))
    shape = {"users": args.users, "items": args.items, "dim": DIM, "batch": args.batch}
    return Work(contenders, shape | {"pairs": args.batch * (1 + NEGATIVES)})


# === All of them ===


def warm_up(contenders: list[Contender]) -> list[Contender]:
    """Runs each some times. Those that work; stderr says why the others do not."""
    working = []
    for contender in contenders:
        try:
            for _ in range(WARM_UP):
                contender.run()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            print(f"{contender.name} is left out: {type(error).__name__}: {reason}", file=sys.stderr)
        else:
            working.append(contender)
    return working


def measure(contenders: list[Contender], rounds: int) -> None:
    """Times each in turn."""
    for _ in range(rounds):
        for contender in contenders:
            for case, times in contender.run().items():
                contender.times.setdefault(case, []).extend(times)


def lines(work: Work, contenders: list[Contender], threads: int) -> list[dict]:
    """A line for each case of each contender, with the keys of `throughput`."""
    result = []
    for case in contenders[0].times if contenders else []:
        for contender in contenders:
            median = statistics.median(contender.times[case])
            line = {
                "case": case,
                "implementation": f"PyTorch {contender.name}",
                "device": f"CPU with {threads} threads",
                "median_ms": median,
            }
            if work.traffic is not None:
                line |= {"bytes": work.traffic, "gb_per_s": work.traffic / median / 1e6}
            pairs = {"pairs": work.shape["users"] * CANDIDATES + TESTS} if case == "evaluation" else {}
            result.append(line | work.shape | pairs | {"rounds": len(contender.times[case]), "threads": threads})
    return result


def count(text: str) -> int:
    """A positive number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def parse_args() -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=count, default=1, help="threads of an operation [default: 1]")
    common.add_argument("--rounds", type=count, help="how often each is timed [default: 30; small 200, train 10]")
    common.add_argument("--json", action="store_true", help="print one JSON object a line and nothing else")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = parser.add_subparsers(dest="case", required=True)

    def case(name: str, **sizes: int | None) -> argparse.ArgumentParser:
        added = cases.add_parser(name, parents=[common])
        for size, default in sizes.items():
            option = f"--{size.replace('_', '-')}"
            added.add_argument(option, type=count, default=default, required=default is None, help="[%(default)s]")
        return added

    for updates in (case("dense", elements=None), case("small", tensors=None, elements=None)):
        updates.add_argument("--no-compile", action="store_true", help="leave `Adamax compiled` out")
    case("sparse", rows=None, dim=64, batch=8192)
    bag = case("bag", rows=None, dim=64, bags=8192, per_bag=20)
    bag.add_argument("--pooling", choices=("mean", "sum"), default="mean")
    train = case("train", users=2000, items=1500, batch=512)
    train.add_argument("--no-dense", action="store_true", help="leave dense gradients out")
    args = parser.parse_args()
    if args.case == "train" and args.batch > RATINGS:
        parser.error(f"--batch: expected at most {RATINGS}, the ratings that there are, got {args.batch}")
    return args


def build(args: argparse.Namespace) -> list[Work]:
    """The work of the case that was asked for; what is in two of a list does not alternate."""
    match args.case:
        case "dense":
            return [update_work("dense", 1, args.elements, not args.no_compile)]
        case "small":
            return [update_work("small", args.tensors, args.elements, not args.no_compile)]
        case "sparse":
            return [sparse_work(args)]
        case "bag":
            return bag_works(args)
        case _:
            return [train_work(args)]


def main() -> int:
    """Times a case. Not 0 if an implementation does not work."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    works = build(args)
    rounds = args.rounds or {"small": 200, "train": 10}.get(args.case, 30)
    results, all_work = [], True
    for work in works:
        working = warm_up(work.contenders)
        measure(working, rounds)
        results += lines(work, working, args.threads)
        all_work &= len(working) == len(work.contenders)
    if args.json:
        print("\n".join(json.dumps(line) for line in results))
    else:
        shape = ", ".join(f"{key} {value}" for key, value in works[0].shape.items())
        print(f"torch {torch.__version__}, {args.case}: {shape}, CPU with {args.threads} threads\n")
        print(f"{'case':<12}  {'implementation':<38}  {'median ms':>10}  {'rounds':>6}")
        for line in results:
            print(f"{line['case']:<12}  {line['implementation']:<38}  {line['median_ms']:>10.3f}  {line['rounds']:>6}")
    return 0 if all_work else 1


if __name__ == "__main__":
    sys.exit(main())
