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

After training in mixed_float16 Keras wraps the optimizer in a LossScaleOptimizer. The one inside is exported, without
the loss scale, and imported into; the new file is then to be loaded under that policy, as the old one was.

With --legacy the model is one of Keras 2, which tf_keras reads, and the state is in the order of legacy optimizers: "0"
is the iteration, then come all m, then all v, as in optimizer.get_weights(). In Rust: load_keras_legacy and
save_keras_legacy, with the names in the order of model.trainable_variables. Optimizers of tf_keras.optimizers.legacy
are saved in .h5 files only; those of tf_keras.optimizers in .keras files, too:

    python keras3.py export model.h5 adamax.safetensors --config adamax.json --weights model.safetensors --legacy
    python keras3.py import adamax.safetensors model.h5 new.h5 --weights model.safetensors --legacy

In a program of your own, call export_state and import_state, or export_legacy and import_legacy for an optimizer of
tf_keras.
"""

import argparse
import json
import os
import sys
import warnings

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

PARTS = ("momentum", "norm", "average", "gradient_accumulator")


def put(path, write):
    """Lets write(beside) make a file beside `path`, which then takes its place and the mode of what was there.

    A new file has what the umask leaves of mode 666 (save_file of some versions gives 600), and links are followed.
    """
    target = os.path.realpath(path)
    beside = f"{target}.{os.getpid()}.part{os.path.splitext(target)[1]}"
    umask = os.umask(0o077)
    os.umask(umask)
    mode = os.stat(target).st_mode & 0o7777 if os.path.exists(target) else 0o666 & ~umask
    try:
        write(beside)
        os.chmod(beside, mode)
        os.replace(beside, target)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def renaming(names, path):
    """The name and the order of dimensions that a variable has in Rust."""
    renamed = names.get(path, path)
    name, axes = (renamed, None) if isinstance(renamed, str) else renamed
    return name, axes


def path_of(variable):
    """Its path in Keras 3; the same without tf_keras's ":0"."""
    return variable.path if hasattr(variable, "path") else variable.name.rsplit(":", 1)[0]


def check_names(names, variables):
    """Every entry is understood, and no two variables get one name."""
    taken = {}
    for variable in variables:
        path = path_of(variable)
        entry, rank = names.get(path, path), len(variable.shape)
        if not isinstance(entry, str):
            # Permutations of other things than numbers would be sorted, too.
            is_pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            axes = entry[1] if is_pair and isinstance(entry[1], list) else []
            if not is_pair or any(type(axis) is not int for axis in axes) or sorted(axes) != list(range(rank)):
                expected = f'a name, or ["name", axes] with the axes 0 to {rank - 1} in some order'
                raise SystemExit(f"--names, {path}: expected {expected}, got {json.dumps(entry)}")
        name = renaming(names, path)[0]
        if name in taken:
            raise SystemExit(f"--names: {taken[name]} and {path} are both called {name}")
        taken[name] = path


def turned(array, axes):
    # Not by ascontiguousarray, which makes a number a list of one.
    return np.array(array if axes is None else np.transpose(array, axes), order="C")


def turned_back(array, axes):
    return array if axes is None else np.transpose(array, np.argsort(axes))


def keys(optimizer, variables, names):
    """The optimizer's variables by their keys in the file, each with its order of dimensions."""
    check_names(names, variables)
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
    tensors = {key: turned(np.asarray(own.numpy()), axes) for key, (own, axes) in found.items()}
    put(path, lambda beside: save_file(tensors, beside))


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
    tensors = {str(i): turned(np.asarray(w), a) for i, (w, a) in enumerate(zip(weights, axes))}
    put(path, lambda beside: save_file(tensors, beside))


def import_legacy(path, axes):
    """What set_weights() takes, from `path`."""
    axes, tensors = [None, *axes, *axes], load_file(path)
    if set(tensors) != {str(i) for i in range(len(axes))}:
        raise SystemExit(f"expected the weights 0 to {len(axes) - 1}, got {sorted(tensors, key=int)}")
    return [turned_back(tensors[str(i)], a) for i, a in enumerate(axes)]


def legacy_weights(optimizer, variables):
    """The variables of an optimizer of tf_keras in the legacy order, which are made if there are none yet."""
    if hasattr(optimizer, "_create_all_weights"):
        optimizer._create_all_weights(variables)
        return optimizer.weights
    optimizer.build(variables)
    return [optimizer.iterations, *optimizer._m, *optimizer._u]


def export_weights(variables, path, names):
    tensors = {}
    for variable in variables:
        name, axes = renaming(names, path_of(variable))
        tensors[name] = turned(np.asarray(variable.numpy()), axes)
    put(path, lambda beside: save_file(tensors, beside))


def import_weights(variables, path, names):
    tensors = load_file(path)
    known = {renaming(names, path_of(variable))[0]: variable for variable in variables}
    if set(known) != set(tensors):
        raise SystemExit(f"missing or surplus weights: {sorted(set(known) ^ set(tensors))}")
    values = {name: turned_back(tensors[name], renaming(names, path_of(known[name]))[1]) for name in known}
    for name, variable in known.items():
        if values[name].shape != tuple(variable.shape):
            got = list(values[name].shape)
            raise SystemExit(f"{name}: expected {list(variable.shape)} as in the model, got {got} in {path}")
    for name, variable in known.items():
        variable.assign(values[name])


def load_keras(path):
    """A model of Keras 3 with its optimizer, and what Keras only warns of although state is lost."""
    import keras

    model, lost = load_heeding(keras.saving.load_model, path, "; is it a model of Keras 2, for --legacy?")
    # Models saved under this policy have had their optimizers wrapped, which the files do not say.
    mixed = [layer.dtype_policy for layer in model._flatten_layers() if layer.dtype_policy.name == "mixed_float16"]
    if lost and mixed and not hasattr(model.optimizer, "inner_optimizer"):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(mixed[0])
        model, lost = load_heeding(keras.saving.load_model, path)
        keras.config.set_dtype_policy(before)
    return keras, model, lost


def load_legacy(path):
    """The same of Keras 2."""
    try:
        import tf_keras
    except ImportError as error:
        raise SystemExit(f"--legacy needs tf_keras, which reads models of Keras 2: {error}")
    return tf_keras, *load_heeding(tf_keras.models.load_model, path)


def load_heeding(load, path, hint=""):
    """A loaded model, and the warnings that say that its optimizer's state was not."""
    if not os.path.exists(path):
        raise SystemExit(f"{path}: no such file")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = load(path)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{path}: {str(error).strip().splitlines()[0]}{hint}")
    messages = [str(warning.message).strip() for warning in caught]
    return model, [text for text in messages if "optimizer" in text and ("Skipping" in text or "loading" in text)]


def unwrapped(optimizer, variables, path):
    """The Adamax, inside of a LossScaleOptimizer if there is one."""
    if optimizer is None:
        raise SystemExit(f"{path}: a model without an optimizer; compile it before it is saved")
    inner = optimizer
    if hasattr(optimizer, "inner_optimizer"):
        if not getattr(optimizer, "built", True):
            optimizer.build(variables)
        inner = optimizer.inner_optimizer
    if type(inner).__name__ != "Adamax":
        raise SystemExit(f"{path}: expected an Adamax, got {type(inner).__name__}")
    return inner


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
        sub.add_argument("--legacy", action="store_true", help="a model of Keras 2 (tf_keras), in its order")
        if command == "export":
            sub.add_argument("--config", help="the JSON file for the settings")
    args = parser.parse_args()
    try:
        run(args)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise SystemExit(str(error))


def run(args):
    names = {}
    if args.names:
        with open(args.names, encoding="utf-8-sig") as file:
            names = json.load(file)
    if not isinstance(names, dict):
        raise SystemExit(f"{args.names}: expected an object of names")
    keras, model, lost = (load_legacy if args.legacy else load_keras)(args.model)
    variables, paths = model.trainable_variables, [path_of(variable) for variable in model.weights]
    unknown = sorted(set(names) - set(paths))
    if unknown:
        raise SystemExit(f"names of variables that are not in the model: {unknown}; it has {paths}")
    check_names(names, model.weights)
    axes = [renaming(names, path_of(variable))[1] for variable in variables]
    outer = model.optimizer
    optimizer = unwrapped(outer, variables, args.model)
    if args.command == "export":
        if lost:
            raise SystemExit(f"{args.model}: the optimizer's variables were not loaded: {lost[0]}")
        export(args, keras, model, outer, optimizer, names, axes)
        return
    if args.legacy:
        if ".optimizers.legacy." in type(optimizer).__module__ and not args.result.endswith((".h5", ".hdf5")):
            raise SystemExit(f"{args.result}: an optimizer of tf_keras.optimizers.legacy is saved in .h5 files only")
        own, values = legacy_weights(optimizer, variables), import_legacy(args.state, axes)
        wrong = [i for i, (o, value) in enumerate(zip(own, values)) if tuple(o.shape) != value.shape]
        if wrong or len(own) != len(values):
            raise SystemExit(f"other shapes than in the model: {wrong}, of {len(own)} there and {len(values)} here")
        for o, value in zip(own, values):
            o.assign(value)
    else:
        import_state(optimizer, variables, args.state, names)
    if args.weights:
        import_weights(model.weights, args.weights, names)
    model.save(args.result)


def export(args, keras, model, outer, optimizer, names, axes):
    variables = model.trainable_variables
    if int(optimizer.iterations) == 0:
        hint = " Optimizers of tf_keras.optimizers.legacy are saved in .h5 files only." if args.legacy else ""
        raise SystemExit(f"{args.model}: the optimizer has made no step, or its state is not in the file.{hint}")
    if outer is not optimizer:
        scale = getattr(outer, "dynamic_scale", None)
        scale = float(scale if scale is not None else outer.loss_scale)
        print(f"note: the loss scale, {scale}, is not carried; set it as init_scale of a GradScaler", file=sys.stderr)
    if args.legacy:
        weights = [np.asarray(own.numpy()) for own in legacy_weights(optimizer, variables)]
        export_legacy(weights, args.state, axes)
    else:
        export_state(optimizer, variables, args.state, names)
    if args.weights:
        export_weights(model.weights, args.weights, names)
    if args.config:
        with open(args.config, "w") as file:
            json.dump(keras.optimizers.serialize(optimizer), file, default=float)


if __name__ == "__main__":
    main()
