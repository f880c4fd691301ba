#!/usr/bin/env python3
"""Records runs that move between frameworks, and goes on with runs that the crate has moved back.

    v2/bin/python exchange.py record            # exchange/torch_*: in the environment of torch
    v1/bin/python exchange.py record            # exchange/keras_*: in that of keras and tf_keras
    cargo test --release --test exchange        # reads them, and leaves files in target/tmp/exchange
    v2/bin/python exchange.py check target/tmp/exchange
    v1/bin/python exchange.py check target/tmp/exchange

A case is a small MLP, y = tanh(x W1 + b1) W2 + b2, trained with the mean of the squared errors on all of its data:

| file | |
|---|---|
| exchange/CASE.safetensors | the optimizer's state after 50 calls, as the scripts in examples/exchange write it |
| exchange/CASE.json | the optimizer's configuration (Keras) |
| exchange/CASE_run.safetensors | x, y, init.NAME, at_50.NAME, and after.NAME [50, ..]: the weights after calls 51 to 100 |

`check` takes what the crate's tests have left: CASE.50, its own run from the beginning, and CASE.100, a run that the
crate took over after 50 calls, both as state and weights. It goes on with them for 50 calls and compares every one with
a run in the framework that was never interrupted.
"""

import argparse
import importlib.util
import json
import os
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "exchange"
EXAMPLES = HERE.parent.parent / "examples" / "exchange"
INPUTS, HIDDEN, OUTPUTS, ROWS = 6, 8, 3, 32
# No variable may differ by more from a run that was never interrupted.
TOLERANCE = 1e-6


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data(seed):
    """x, y, and the first weights, as [inputs, outputs]."""
    rng = np.random.default_rng(seed)
    f32 = lambda array: np.asarray(array, np.float32)
    x = f32(rng.normal(size=(ROWS, INPUTS)))
    y = f32(np.sin(x @ rng.normal(size=(INPUTS, OUTPUTS))))
    weights = [rng.normal(size=(INPUTS, HIDDEN)) / 2, np.zeros(HIDDEN), rng.normal(size=(HIDDEN, OUTPUTS)) / 2, np.zeros(OUTPUTS)]
    return x, y, [f32(array) for array in weights]


# --- PyTorch ----------------------------------------------------------------

TORCH_NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


class TorchRun:
    """A run of PyTorch; the last bias has no gradient in the first `frozen` calls."""

    def __init__(self, case):
        import torch

        torch.set_num_threads(1)
        seed, self.groups, self.frozen = TORCH[case]
        self.torch, self.call = torch, 0
        x, y, weights = data(seed)
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        layer = lambda i, o: torch.nn.Linear(i, o)
        self.model = torch.nn.Sequential()
        self.model.add_module("fc1", layer(INPUTS, HIDDEN))
        self.model.add_module("act", torch.nn.Tanh())
        self.model.add_module("fc2", layer(HIDDEN, OUTPUTS))
        self.set(dict(zip(TORCH_NAMES, [array.T for array in weights])))
        named = dict(self.model.named_parameters())
        groups = [{"params": [(n, named[n]) for n in names], **settings} for names, settings in self.groups]
        self.optimizer = torch.optim.Adamax(groups)

    def set(self, weights):
        with self.torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.torch.from_numpy(np.ascontiguousarray(weights[name])))

    def get(self):
        return {name: p.detach().numpy().copy() for name, p in self.model.named_parameters()}

    def step(self):
        self.optimizer.zero_grad()
        self.torch.nn.functional.mse_loss(self.model(self.x), self.y).backward()
        if self.call < self.frozen:
            self.model.fc2.bias.grad = None
        self.optimizer.step()
        self.call += 1

    def export(self, path):
        script("pytorch").export_state(self.optimizer.state_dict(), self.model.named_parameters(), path)

    def take(self, path, weights, call):
        self.optimizer.load_state_dict(
            script("pytorch").import_state(path, self.optimizer.state_dict(), self.model.named_parameters())
        )
        self.set(weights)
        self.call = call


TORCH = {
    "torch_mlp": (
        1,
        [
            (["fc1.weight", "fc2.weight"], {"lr": 0.02, "weight_decay": 0.01}),
            (["fc1.bias", "fc2.bias"], {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6}),
        ],
        7,
    ),
    "torch_plain": (2, [(list(TORCH_NAMES), {"lr": 0.01})], 0),
}

# --- Keras 3 ----------------------------------------------------------------


def keras_cases():
    import keras

    schedules = keras.optimizers.schedules
    return {
        "keras_mlp": (3, {"learning_rate": 0.02, "weight_decay": 0.01, "global_clipnorm": 0.5}),
        "keras_extras": (
            4,
            {
                "learning_rate": schedules.ExponentialDecay(0.03, 40, 0.5),
                "use_ema": True,
                "ema_momentum": 0.9,
                "ema_overwrite_frequency": 7,
                "gradient_accumulation_steps": 3,
            },
        ),
    }


# Of the first case only: as a candle_nn::Linear has them.
KERAS_NAMES = {
    "mlp/fc1/kernel": ["fc1.weight", [1, 0]],
    "mlp/fc1/bias": "fc1.bias",
    "mlp/fc2/kernel": ["fc2.weight", [1, 0]],
    "mlp/fc2/bias": "fc2.bias",
}


class KerasRun:
    def __init__(self, case):
        import keras
        import tensorflow as tf

        self.tf, self.keras, self.script = tf, keras, script("keras3")
        seed, settings = keras_cases()[case]
        self.names = KERAS_NAMES if case == "keras_mlp" else {}
        x, y, weights = data(seed)
        self.x, self.y = tf.constant(x), tf.constant(y)
        layers = [keras.layers.Dense(HIDDEN, "tanh", name="fc1"), keras.layers.Dense(OUTPUTS, name="fc2")]
        self.model = keras.Sequential([keras.Input((INPUTS,)), *layers], name="mlp")
        for variable, value in zip(self.model.trainable_variables, weights):
            variable.assign(value)
        self.optimizer = keras.optimizers.Adamax(**settings)
        self.optimizer.build(self.model.trainable_variables)

    def set(self, weights):
        for variable in self.model.trainable_variables:
            name, axes = self.script.renaming(self.names, variable.path)
            variable.assign(self.script.turned_back(weights[name], axes))

    def get(self):
        weights = {}
        for variable in self.model.trainable_variables:
            name, axes = self.script.renaming(self.names, variable.path)
            weights[name] = self.script.turned(variable.numpy(), axes)
        return weights

    def step(self):
        with self.tf.GradientTape() as tape:
            loss = self.tf.reduce_mean(self.tf.square(self.model(self.x) - self.y))
        self.optimizer.apply(tape.gradient(loss, self.model.trainable_variables), self.model.trainable_variables)

    def export(self, path):
        self.script.export_state(self.optimizer, self.model.trainable_variables, path, self.names)
        path.with_suffix(".json").write_text(json.dumps(self.keras.optimizers.serialize(self.optimizer)) + "\n")

    def take(self, path, weights, call):
        # The settings, too, where the crate wrote them.
        config = path.with_suffix(".json")
        if config.exists():
            self.optimizer = self.keras.optimizers.deserialize(json.loads(config.read_text()))
        self.script.import_state(self.optimizer, self.model.trainable_variables, path, self.names)
        self.set(weights)


class LegacyRun:
    def __init__(self, case):
        import tensorflow as tf
        import tf_keras

        self.tf, self.tf_keras, self.script = tf, tf_keras, script("keras3")
        x, y, weights = data(5)
        self.x, self.y = tf.constant(x), tf.constant(y)
        names = ("fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias")
        self.variables = {name: tf.Variable(value) for name, value in zip(names, weights)}
        self.optimizer = tf_keras.optimizers.legacy.Adamax(0.03, decay=0.01)

    def set(self, weights):
        for name, variable in self.variables.items():
            variable.assign(weights[name])

    def get(self):
        return {name: variable.numpy() for name, variable in self.variables.items()}

    def step(self):
        v = list(self.variables.values())
        with self.tf.GradientTape() as tape:
            hidden = self.tf.tanh(self.x @ v[0] + v[1])
            loss = self.tf.reduce_mean(self.tf.square(hidden @ v[2] + v[3] - self.y))
        self.optimizer.apply_gradients(zip(tape.gradient(loss, v), v))

    def export(self, path):
        self.script.export_legacy(self.optimizer.get_weights(), path, [None] * 4)
        config = {"class_name": "Adamax", "config": self.optimizer.get_config()}
        to_float = lambda value: float(value) if isinstance(value, np.floating) else value
        config["config"] = {key: to_float(value) for key, value in config["config"].items()}
        path.with_suffix(".json").write_text(json.dumps(config) + "\n")

    def take(self, path, weights, call):
        self.step()  # so that the optimizer has weights
        self.optimizer.set_weights(self.script.import_legacy(path, [None] * 4))
        self.set(weights)


# --- both -------------------------------------------------------------------


def runs():
    """The cases of this environment."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if importlib.util.find_spec("torch"):
        return {case: TorchRun for case in TORCH}
    return {"keras_mlp": KerasRun, "keras_extras": KerasRun, "keras_legacy": LegacyRun}


def record(case, make):
    run = make(case)
    tensors = {"x": run.x.numpy(), "y": run.y.numpy()}
    tensors.update({f"init.{name}": value for name, value in run.get().items()})
    for _ in range(50):
        run.step()
    run.export(OUT / f"{case}.safetensors")
    tensors.update({f"at_50.{name}": value for name, value in run.get().items()})
    after = []
    for _ in range(50):
        run.step()
        after.append(run.get())
    tensors.update({f"after.{name}": np.stack([weights[name] for weights in after]) for name in after[0]})
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, OUT / f"{case}_run.safetensors")
    print(f"{case}: recorded")


def check(case, make, folder):
    """The largest difference from a run that was never interrupted."""
    unbroken, weights = make(case), [None]
    for _ in range(150):
        unbroken.step()
        weights.append(unbroken.get())
    worst = 0.0
    for call in (50, 100):
        run = make(case)
        run.take(folder / f"{case}.{call}.safetensors", load_file(folder / f"{case}.{call}.weights.safetensors"), call)
        largest = 0.0
        for k in range(call + 1, call + 51):
            run.step()
            ours = run.get()
            largest = max(largest, *(float(np.abs(ours[n] - weights[k][n]).max()) for n in ours))
        what = "the crate's own run" if call == 50 else "taken over at 50 and brought back"
        moved = max(float(np.abs(weights[call + 50][n] - weights[call][n]).max()) for n in weights[call])
        print(f"{case}: {what}, calls {call + 1} to {call + 50}: {largest:.2e} (weights moved by up to {moved:.2e})")
        worst = max(worst, largest)
    return worst


def check_schedules(folder):
    """Keras reads the schedules that the crate wrote, and has the same rates up to its rounding to f32."""
    import keras

    for case in json.loads((folder / "keras_schedules.json").read_text()):
        schedule = keras.optimizers.deserialize(case["optimizer"])._learning_rate
        rates = np.array([float(schedule(step)) for step in range(len(case["rates"]))])
        difference = float(np.abs(rates - case["rates"]).max())
        print(f"{type(schedule).__name__}: rates differ by up to {difference:.2e} of {rates.max():.2g}")
        if not difference <= 1e-6 * rates.max():
            raise SystemExit("other rates than in the crate")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record")
    commands.add_parser("check").add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    if args.command == "record":
        for case, make in runs().items():
            record(case, make)
        return
    worst = max(check(case, make, args.folder) for case, make in runs().items())
    if importlib.util.find_spec("keras"):
        check_schedules(args.folder)
    if not worst <= TOLERANCE:
        raise SystemExit(f"{worst:.2e} is more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
