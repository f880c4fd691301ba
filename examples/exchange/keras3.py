#!/usr/bin/env python3
"""Moves the state of Keras's Adamax to candle-adamax and back. Needs keras 3, one of its backends, and safetensors.

From a compiled model that was saved with model.save("model.keras"):

    python keras3.py export model.keras adamax.safetensors --config adamax.json --weights model.safetensors

and in Rust, with a VarMap that has the same names and shapes:

    varmap.load("model.safetensors")?;
    let params = ParamsAdamax::from_keras_json(&std::fs::read_to_string("adamax.json")?)?;
    let mut optimizer = Adamax::from_varmap(&varmap, params)?;
    optimizer.load_keras("adamax.safetensors")?;

Back: optimizer.save_keras("adamax.safetensors")?; varmap.save("model.safetensors")?; and

    python keras3.py import adamax.safetensors model.keras new.keras --weights model.safetensors

which puts them into a copy of the model.

Variables are called by their paths in the Keras model as it is loaded from the file, such as "dense/kernel". Where they
have other names in Rust, or lie there in another order of dimensions, --names says so: a JSON file such as

    {"dense/kernel": ["fc1.weight", [1, 0]], "dense/bias": "fc1.bias"}

for a candle_nn::Linear, whose weight is the transpose of a kernel of Keras. The moments are turned as the weights are.

With --legacy the state is in the order of Keras 2 and of tf_keras.optimizers.legacy: "0" is the iteration, then come all
m, then all v, as in optimizer.get_weights(). In Rust: load_keras_legacy and save_keras_legacy, with the names in the
order of model.trainable_variables. In a program of your own, call export_state and import_state, or export_legacy and
import_legacy for an optimizer of tf_keras.
"""

import argparse
import json

import numpy as np
from safetensors.numpy import load_file, save_file

PARTS = ("momentum", "norm", "average", "gradient_accumulator")


def renaming(names, path):
    """The name and the order of dimensions that a variable has in Rust."""
    renamed = names.get(path, path)
    name, axes = (renamed, None) if isinstance(renamed, str) else renamed
    return name, axes


def turned(array, axes):
    # Not by ascontiguousarray, which makes a number a list of one.
    return np.array(array if axes is None else np.transpose(array, axes), order="C")


def turned_back(array, axes):
    return array if axes is None else np.transpose(array, np.argsort(axes))


def keys(optimizer, variables, names):
    """The optimizer's variables by their keys in the file, each with its order of dimensions."""
    own = {variable.path.split("/", 1)[1]: variable for variable in optimizer.variables}
    found = {}
    for key in ("iteration", "learning_rate"):
        if key in own:
            found[key] = own.pop(key), None
    for variable in variables:
        name, axes = renaming(names, variable.path)
        for part in PARTS:
            spelled = f"{variable.path.replace('/', '_')}_{part}"
            if spelled in own:
                found[f"{name}_{part}"] = own.pop(spelled), axes
    if own:
        raise SystemExit(f"variables of the optimizer that are not understood: {sorted(own)}")
    return found


def export_state(optimizer, variables, path, names={}):
    """Writes the variables of a built Keras optimizer for the trainable `variables` to `path`."""
    found = keys(optimizer, variables, names)
    save_file({key: turned(np.asarray(own.numpy()), axes) for key, (own, axes) in found.items()}, path)


def import_state(optimizer, variables, path, names={}):
    """Assigns what is in `path` to the variables of a Keras optimizer, which is built if it is not yet."""
    optimizer.build(variables)
    found, tensors = keys(optimizer, variables, names), load_file(path)
    if set(found) != set(tensors):
        raise SystemExit(f"missing or surplus: {sorted(set(found) ^ set(tensors))}")
    values = {key: turned_back(tensors[key], axes) for key, (_, axes) in found.items()}
    wrong = [key for key, (own, _) in found.items() if tuple(own.shape) != values[key].shape]
    if wrong:
        raise SystemExit(f"other shapes than in the model: {wrong}")
    for key, (own, _) in found.items():
        own.assign(values[key])


def export_legacy(weights, path, axes):
    """Writes get_weights(), [iteration, m.., v..], to `path`; `axes` has each variable's order of dimensions."""
    axes = [None, *axes, *axes]
    if len(weights) != len(axes):
        raise SystemExit(f"expected {len(axes)} weights, got {len(weights)}")
    save_file({str(i): turned(np.asarray(w), a) for i, (w, a) in enumerate(zip(weights, axes))}, path)


def import_legacy(path, axes):
    """What set_weights() takes, from `path`."""
    axes, tensors = [None, *axes, *axes], load_file(path)
    if set(tensors) != {str(i) for i in range(len(axes))}:
        raise SystemExit(f"expected the weights 0 to {len(axes) - 1}, got {sorted(tensors, key=int)}")
    return [turned_back(tensors[str(i)], a) for i, a in enumerate(axes)]


def legacy_weights(optimizer, variables):
    """The moments of a Keras 3 optimizer in the legacy order."""
    own = {variable.path.split("/", 1)[1]: variable for variable in optimizer.variables}
    spelled = [variable.path.replace("/", "_") for variable in variables]
    return [own["iteration"], *(own[f"{name}_{part}"] for part in ("momentum", "norm") for name in spelled)]


def export_weights(variables, path, names):
    tensors = {}
    for variable in variables:
        name, axes = renaming(names, variable.path)
        tensors[name] = turned(np.asarray(variable.numpy()), axes)
    save_file(tensors, path)


def import_weights(variables, path, names):
    tensors = load_file(path)
    known = {renaming(names, variable.path)[0]: variable for variable in variables}
    if set(known) != set(tensors):
        raise SystemExit(f"missing or surplus weights: {sorted(set(known) ^ set(tensors))}")
    for name, variable in known.items():
        variable.assign(turned_back(tensors[name], renaming(names, variable.path)[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("export", "import"):
        sub = commands.add_parser(command)
        files = ("model", "state") if command == "export" else ("state", "model", "result")
        for file in files:
            sub.add_argument(file)
        sub.add_argument("--weights", help="a safetensors file of the weights, to write or to read")
        sub.add_argument("--names", help="a JSON file with the variables' names in Rust")
        sub.add_argument("--legacy", action="store_true", help="the order of Keras 2, without names")
        if command == "export":
            sub.add_argument("--config", help="the JSON file for the settings")
    args = parser.parse_args()
    import keras

    model = keras.saving.load_model(args.model)
    optimizer, variables = model.optimizer, model.trainable_variables
    names = json.load(open(args.names)) if args.names else {}
    unknown = set(names) - {variable.path for variable in model.weights}
    if unknown:
        paths = [variable.path for variable in model.weights]
        raise SystemExit(f"names of variables that are not in the model: {sorted(unknown)}; it has {paths}")
    axes = [renaming(names, variable.path)[1] for variable in variables]
    if args.command == "export":
        if args.legacy:
            weights = [np.asarray(own.numpy()) for own in legacy_weights(optimizer, variables)]
            export_legacy(weights, args.state, axes)
        else:
            export_state(optimizer, variables, args.state, names)
        if args.weights:
            export_weights(model.weights, args.weights, names)
        if args.config:
            with open(args.config, "w") as file:
                json.dump(keras.optimizers.serialize(optimizer), file)
        return
    if args.legacy:
        for own, value in zip(legacy_weights(optimizer, variables), import_legacy(args.state, axes)):
            own.assign(value)
    else:
        import_state(optimizer, variables, args.state, names)
    if args.weights:
        import_weights(model.weights, args.weights, names)
    model.save(args.result)


if __name__ == "__main__":
    main()
