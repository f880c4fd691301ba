#!/usr/bin/env python3
"""Moves the state of torch.optim.Adamax to candle-adamax and back. Needs torch and safetensors.

From PyTorch, where checkpoint.pt is torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}):

    python pytorch.py export checkpoint.pt adamax.safetensors --weights model.safetensors

and in Rust, with the same names in the VarMap (those of named_parameters()):

    varmap.load("model.safetensors")?;
    let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::pytorch())?;
    optimizer.load_torch("adamax.safetensors")?;

Back: optimizer.save_torch("adamax.safetensors")?; varmap.save("model.safetensors")?; and

    python pytorch.py import adamax.safetensors checkpoint.pt new.pt --weights model.safetensors

which puts them into a copy of a checkpoint of the same model and the same parameter groups. Names, shapes and dtypes
have to agree with that checkpoint; otherwise there is an error and no file.

Which parameter has which number in a checkpoint is known from "param_names", if the optimizer was made from
model.named_parameters(). Otherwise:

- With one group it is taken to be the order of the model's tensors, which is that of model.parameters(). Tensors that
  the optimizer does not have, such as the running means of BatchNorm or frozen parameters, are named by --buffers.
- With several groups the numbers run through one group after the other, which the model says nothing of. --order is a
  file of the parameters' names in the optimizer's order, one a line. The program that makes the optimizer can write it:

      open("order.txt", "w").write("\n".join(pytorch.order_of(optimizer, model.named_parameters())))

  It names just the parameters that the optimizer has, so that it does for one group, too, in place of --buffers.

Names begin with "module." or "_orig_mod." where the model was wrapped by DistributedDataParallel or torch.compile;
--strip-prefix module. _orig_mod. leaves that out on the way there and puts it back on the way back.

What a scheduler leaves in the groups ("initial_lr", "swa_lr", "max_momentum", ..) is left out: it has state of its own.
On the way back, the checkpoint's own stays. Other keys that Adamax does not have, such as the "lr_scale" of layer-wise
learning rates, are an error on the way there, unless --ignore-unknown is given; they stay, too.

In a program of your own, call export_state and import_state with the optimizer's state_dict() and
model.named_parameters().
"""

import argparse
import json
import os
import pickle
import sys
from collections import Counter

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

TENSORS = ("exp_avg", "exp_inf", "step")
SETTINGS = {"lr", "betas", "eps", "weight_decay", "maximize", "foreach", "capturable", "differentiable"}
# What PyTorch's schedulers keep in the groups.
SCHEDULERS = {"initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
# What PyTorch's load_state_dict would take over from here, although the file says nothing of it.
OWN = {"foreach", "capturable", "differentiable", "param_names"} | SCHEDULERS


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


def order_of(optimizer, parameters):
    """The parameters' names in the order in which an optimizer numbers them."""
    names = {id(parameter): name for name, parameter in parameters}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def named(state_dict, parameters, order=None):
    """The parameters' names by their numbers in an optimizer's state_dict."""
    groups = state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
        if order is not None and order != names:
            raise SystemExit(f"the order is {order}, but the optimizer's own param_names are {names}")
    elif order is not None:
        names = order
    elif len(groups) > 1:
        raise SystemExit(
            f"{len(groups)} parameter groups without param_names: which parameter has which number is not known. "
            "Make the optimizer from named parameters, or give the names in the optimizer's order with --order"
        )
    else:
        names = [name for name, _ in parameters]
    if len(names) != len(numbers):
        raise SystemExit(
            f"{len(numbers)} parameters in the optimizer, {len(names)} names: {names}. Name what the optimizer does "
            "not have (buffers of BatchNorm, frozen parameters) with --buffers, or what it has, in order, with --order"
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise SystemExit(f"names that are there twice: {twice}")
    known = [name for name, _ in parameters]
    if set(names) - set(known):
        raise SystemExit(f"names that are not in the model: {sorted(set(names) - set(known))}; it has {known}")
    return dict(zip(numbers, names))


def check_tensor(name, tensor, shape, dtypes, where):
    """`tensor` has to have this shape and one of these dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise SystemExit(f"{name}: expected a tensor, got {type(tensor).__name__} in {where}")
    if tuple(tensor.shape) != tuple(shape):
        raise SystemExit(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)} in {where}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(sorted({str(dtype) for dtype in dtypes}))
        raise SystemExit(f"{name}: expected {expected}, got {tensor.dtype} in {where}")


def check_state(name, state, parameter, where):
    """The moments are as their parameter is, or f32, and the step is a number."""
    for key in ("exp_avg", "exp_inf"):
        check_tensor(f"{name}.{key}", state[key], parameter.shape, {parameter.dtype, torch.float32}, where)
    check_tensor(f"{name}.step", state["step"], (), {torch.float32, torch.float64, torch.int64}, where)


def check_names(what, expected, got, hint=""):
    """Both are sets of names."""
    missing, surplus = sorted(expected - got), sorted(got - expected)
    if missing or surplus:
        raise SystemExit(f"{what}: missing {missing}, surplus {surplus}{hint}")


def note_cycled(group, names):
    """Says so where a scheduler has moved beta1, which none does here."""
    beta1, base = float(group["betas"][0]), group.get("base_momentum")
    if base is not None and (beta1 != float(base) or beta1 != 0.9):
        print(
            f"note: a scheduler of PyTorch cycles the beta1 of {names}: it is taken as it is now, {beta1}, and stays. "
            "This crate's OneCycle leaves beta1 alone; set another one after loading",
            file=sys.stderr,
        )


def export_state(state_dict, parameters, path, order=None, ignore_unknown=False):
    """Writes an optimizer's state_dict() to `path`; `parameters` are pairs of names and tensors."""
    parameters = list(parameters)
    names, tensors, groups = named(state_dict, parameters, order), {}, []
    shapes = dict(parameters)
    for number, name in names.items():
        # A parameter that has had no gradient yet has no state, which is the same as zeros.
        zeros = torch.zeros_like(shapes[name])
        state = state_dict["state"].get(number, {"exp_avg": zeros, "exp_inf": zeros, "step": torch.tensor(0.0)})
        if set(state) != set(TENSORS):
            raise SystemExit(f"{name}: expected the state of Adamax, {sorted(TENSORS)}, got {sorted(state)}")
        # Old versions of PyTorch count in an int.
        state = {**state, "step": torch.as_tensor(state["step"])}
        check_state(name, state, shapes[name], "the optimizer")
        for key in TENSORS:
            tensors[f"{name}.{key}"] = state[key].detach().cpu().clone().contiguous()
    for group in state_dict["param_groups"]:
        surplus = set(group) - SETTINGS - SCHEDULERS - {"params", "param_names"}
        if surplus and not ignore_unknown:
            raise SystemExit(
                f"settings that Adamax does not have: {sorted(surplus)}; --ignore-unknown leaves them out, if PyTorch's "
                "optimizer does not read them"
            )
        settings = {key: group[key] for key in sorted(SETTINGS & set(group))}
        settings.update({key: float(settings[key]) for key in ("lr", "eps", "weight_decay")})
        settings["betas"] = [float(beta) for beta in settings["betas"]]
        groups.append({**settings, "params": [names[number] for number in group["params"]]})
        note_cycled(group, groups[-1]["params"])
    put(path, lambda beside: save_file(tensors, beside, metadata={"param_groups": json.dumps(groups)}))


def import_state(path, state_dict, parameters, order=None):
    """The state in `path` as a state_dict for the optimizer that `state_dict` is of, whose groups decide the order."""
    parameters = list(parameters)
    names, shapes = named(state_dict, parameters, order), dict(parameters)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata() or {}
    if "param_groups" not in metadata:
        raise SystemExit(f"{path}: no param_groups in the metadata; expected a file of save_torch")
    theirs = json.loads(metadata["param_groups"])
    group_of = {name: group for group in theirs for name in group["params"]}
    check_names(f"tensors in {path}", {f"{name}.{key}" for name in names.values() for key in TENSORS}, set(tensors))
    check_names(f"param_groups in {path}", set(names.values()), set(group_of))
    state = {n: {key: tensors[f"{name}.{key}"] for key in TENSORS} for n, name in names.items()}
    for number, name in names.items():
        check_state(name, state[number], shapes[name], path)
    groups = []
    for group in state_dict["param_groups"]:
        settings = [{k: v for k, v in group_of[names[n]].items() if k in SETTINGS} for n in group["params"]]
        if any(other != settings[0] for other in settings):
            raise SystemExit(f"one group here, with different settings there: {[names[n] for n in group['params']]}")
        own = {key: group[key] for key in OWN & set(group)}
        groups.append({**group, **(settings[0] if settings else {}), **own, "params": group["params"]})
        groups[-1]["betas"] = tuple(groups[-1]["betas"])
    return {"state": state, "param_groups": groups}


def import_weights(path, model, parameters):
    """The model's tensors with those in `path`; tensors that share their memory in the model still do."""
    weights, needed = load_file(path), {name for name, _ in parameters}
    # The others may be there or not.
    got = set(weights) - (set(model) - needed)
    check_names(f"weights in {path}", needed, got, "; --buffers names what may be missing")
    for name, tensor in weights.items():
        check_tensor(name, tensor, model[name].shape, {model[name].dtype}, path)
    merged, by_memory = {**model, **weights}, {memory(model[name]): weights[name] for name in weights}
    for name in set(model) - set(weights):
        merged[name] = by_memory.get(memory(model[name]), model[name])
    return merged


def memory(tensor):
    """What two tensors have in common only if they are tied; nothing for those without elements."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)


def untied(model, buffers):
    """The model's parameters, each once, as model.named_parameters() has them."""
    seen = {}
    for name, tensor in model.items():
        if name not in buffers:
            seen.setdefault(memory(tensor), (name, tensor))
    return list(seen.values())


def stripped(names, prefixes):
    """The names without these beginnings, however many of them follow each other."""
    result = []
    for name in names:
        while found := [prefix for prefix in prefixes if prefix and name.startswith(prefix)]:
            name = name[len(found[0]) :]
        result.append(name)
    return result


def part(checkpoint, key, option, path):
    """What the checkpoint has under a key."""
    if not isinstance(checkpoint, dict):
        got = type(checkpoint).__name__
        raise SystemExit(f"{path}: expected a dict with the state_dicts of model and optimizer, got {got}")
    if key not in checkpoint:
        raise SystemExit(f"{path}: no {key!r}; name it with {option}. There are: {[str(key) for key in checkpoint]}")
    if not isinstance(checkpoint[key], dict):
        raise SystemExit(f"{path}: expected a state_dict in {key!r}, got {type(checkpoint[key]).__name__}")
    return checkpoint[key]


def read_checkpoint(args):
    """The checkpoint, its model and its optimizer's state_dict."""
    try:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        expected = "only tensors, numbers and names, as in the state_dict() of model and optimizer"
        raise SystemExit(f"{args.checkpoint}: not to be read with weights_only; expected {expected}")
    except (EOFError, RuntimeError) as error:
        raise SystemExit(f"{args.checkpoint}: {str(error).splitlines()[0]}")
    model = part(checkpoint, args.model_key, "--model-key", args.checkpoint)
    state_dict = part(checkpoint, args.optimizer_key, "--optimizer-key", args.checkpoint)
    if not {"state", "param_groups"} <= set(state_dict):
        raise SystemExit(
            f"{args.checkpoint}: {args.optimizer_key!r} is no optimizer's state_dict, which has 'state' and "
            f"'param_groups'; it has {[str(key) for key in state_dict][:20]}"
        )
    others = [name for name, tensor in model.items() if not isinstance(tensor, torch.Tensor)]
    if others:
        raise SystemExit(f"{args.checkpoint}: {args.model_key!r} is no model's state_dict; no tensors: {others[:20]}")
    return checkpoint, model, state_dict


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("export", "import"):
        sub = commands.add_parser(command)
        files = ("checkpoint", "state") if command == "export" else ("state", "checkpoint", "result")
        for file in files:
            sub.add_argument(file)
        sub.add_argument("--weights", help="a safetensors file of the weights, to write or to read")
        sub.add_argument("--model-key", default="model", help="where the model is in the checkpoint (%(default)s)")
        sub.add_argument("--optimizer-key", default="optimizer", help="where the optimizer is (%(default)s)")
        sub.add_argument("--buffers", nargs="*", default=[], help="tensors that the optimizer does not have")
        sub.add_argument("--order", help="a file of the parameters' names in the optimizer's order, one a line")
        sub.add_argument("--strip-prefix", nargs="+", default=[], help="beginnings of names to leave out, as module.")
        if command == "export":
            help = "leave out what others keep in param_groups and Adamax does not read, as lr_scale"
            sub.add_argument("--ignore-unknown", action="store_true", help=help)
    args = parser.parse_args()
    try:
        run(args)
    except (OSError, SafetensorError) as error:
        raise SystemExit(str(error))


def run(args):
    checkpoint, model, state_dict = read_checkpoint(args)
    strip = lambda names: stripped(names, args.strip_prefix)
    full_names = dict(zip(strip(model), model))
    if len(full_names) != len(model):
        same = sorted(set(model) - set(full_names.values()))
        raise SystemExit(f"names that others have, too, without {args.strip_prefix}: {same}")
    short_model = {name: model[full] for name, full in full_names.items()}
    short_groups = [
        {**group, "param_names": strip(group["param_names"])} if "param_names" in group else group
        for group in state_dict["param_groups"]
    ]
    buffers, order = set(strip(args.buffers)), None
    unknown = sorted(buffers - set(short_model))
    if unknown:
        raise SystemExit(f"--buffers that are not in the model: {unknown}; it has {list(short_model)}")
    if args.order:
        with open(args.order, encoding="utf-8-sig") as file:
            order = strip([line.strip() for line in file if line.strip()])
    parameters, short_state = untied(short_model, buffers), {**state_dict, "param_groups": short_groups}
    if args.command == "export":
        export_state(short_state, parameters, args.state, order, args.ignore_unknown)
        if args.weights:
            weights = {name: tensor.contiguous().clone() for name, tensor in short_model.items()}
            put(args.weights, lambda beside: save_file(weights, beside))
        return
    taken = import_state(args.state, short_state, parameters, order)
    for group, own in zip(taken["param_groups"], state_dict["param_groups"]):
        group.update({key: own[key] for key in {"param_names"} & set(own)})
    checkpoint[args.optimizer_key] = taken
    if args.weights:
        weights = import_weights(args.weights, short_model, parameters)
        checkpoint[args.model_key] = {full: weights[name] for name, full in full_names.items()}
    # The result may be the checkpoint itself.
    put(args.result, lambda beside: torch.save(checkpoint, beside))


if __name__ == "__main__":
    main()
