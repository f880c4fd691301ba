"""Fine-tunes a BERT encoder with PyTorch's Adamax, on batches that a program in Rust can make again.

    python3 benches/peers/minilm.py                          the losses of a small encoder with made-up weights
    python3 benches/peers/minilm.py --model DIR              of a model as Hugging Face has it
    python3 benches/peers/minilm.py --model DIR --time       seconds of a forward and a backward pass

`--out FILE` writes the losses as JSON. The program `minilm` of `examples/transformers` does the same with candle, and
compares its losses with such a file. Needs torch, transformers and safetensors.

A linear classifier stands on the mean of the tokens of a text. There is no dropout. Tokens, lengths and made-up weights
come from a linear congruential generator of 64 bits, which is as short in any language.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertModel

CLASSES = 4
SMALL = dict(
    vocab_size=1200,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
    layer_norm_eps=1e-12,
)


class Numbers:
    """A linear congruential generator (Knuth's MMIX)."""

    def __init__(self, seed: int):
        self.state = seed

    def next(self) -> int:
        """31 bits."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return self.state >> 33

    def uniform(self, count: int, bound: float) -> torch.Tensor:
        """Numbers between -bound and bound."""
        numbers = torch.tensor([self.next() for _ in range(count)], dtype=torch.float64)
        return ((numbers / 2**30 - 1.0) * bound).float()


def seed_of(name: str) -> int:
    seed = 0
    for byte in name.encode():
        seed = (seed * 31 + byte) % 2**64
    return seed


def batch(step: int, texts: int, tokens: int, vocabulary: int):
    """Ids, mask and classes. A token in three is one of the fifty of its text's class."""
    numbers = Numbers(step)
    ids, mask = torch.zeros(texts, tokens, dtype=torch.long), torch.zeros(texts, tokens)
    classes = torch.arange(texts) % CLASSES
    for text in range(texts):
        length = tokens // 2 + numbers.next() % (tokens - tokens // 2 + 1)
        for token in range(length):
            is_of_class, number = numbers.next() % 3 == 0, numbers.next()
            first, count = (200 + 50 * int(classes[text]), 50) if is_of_class else (400, vocabulary - 400)
            ids[text, token] = first + number % count
        mask[text, :length] = 1.0
    return ids, mask, classes


def load(folder: Path | None) -> BertModel:
    if folder:
        config = BertConfig.from_pretrained(folder)
    else:
        config = BertConfig(**SMALL)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config._attn_implementation = "eager"
    if folder:
        return BertModel.from_pretrained(folder, config=config, add_pooling_layer=False, dtype=torch.float32)
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            made_up = Numbers(seed_of(name)).uniform(weight.numel(), 0.08).reshape(weight.shape)
            weight.copy_(made_up + 1.0 if name.endswith("LayerNorm.weight") else made_up)
    return model


def head(hidden: int) -> torch.nn.Linear:
    linear = torch.nn.Linear(hidden, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(Numbers(1).uniform(CLASSES * hidden, 0.05).reshape(CLASSES, hidden))
        linear.bias.zero_()
    return linear


def loss_of(model, classifier, ids, mask, classes):
    x = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1)
    mean = (x * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.cross_entropy(classifier(mean), classes)


def losses(model, classifier, lr: float, steps: int, texts: int, tokens: int) -> list[float]:
    optimizer = torch.optim.Adamax([*model.parameters(), *classifier.parameters()], lr=lr)
    result = []
    for step in range(steps):
        loss = loss_of(model, classifier, *batch(step, texts, tokens, model.config.vocab_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


def seconds(model, classifier, rounds: int, texts: int, tokens: int) -> dict[str, float]:
    forward, backward = [], []
    inputs = batch(0, texts, tokens, model.config.vocab_size)
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        loss = loss_of(model, classifier, *inputs)
        middle = time.perf_counter()
        model.zero_grad(set_to_none=True)
        loss.backward()
        end = time.perf_counter()
        forward.append(middle - begin)
        backward.append(end - middle)
    return {"forward": statistics.median(forward[1:]), "backward": statistics.median(backward[1:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with config.json and model.safetensors")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, help="the learning rate: 3e-3, or 5e-5 with --model")
    parser.add_argument("--texts", type=int, help="texts in a batch: 8, or 32 with --time")
    parser.add_argument("--tokens", type=int, help="the longest text: 32, or 48 with --time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where to write the losses")
    parser.add_argument("--time", action="store_true", help="time passes, as many rounds as --steps says")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts, tokens = args.texts or (32 if args.time else 8), args.tokens or (48 if args.time else 32)
    model = load(args.model).train()
    classifier = head(model.config.hidden_size)
    if args.time:
        times = seconds(model, classifier, args.steps, texts, tokens)
        print(f"forward {times['forward']:.4f} s, backward {times['backward']:.4f} s")
        return
    lr = args.lr or (5e-5 if args.model else 3e-3)
    result = losses(model, classifier, lr, args.steps, texts, tokens)
    for step, loss in enumerate(result):
        if step % 10 == 0 or step == len(result) - 1:
            print(f"step {step:3} loss {loss:.6f}")
    if args.out:
        record = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lr": lr,
            "texts": texts,
            "tokens": tokens,
            "losses": [float(f"{loss:.7g}") for loss in result],
        }
        args.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
