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

which puts them into a copy of a checkpoint of the same model and the same parameter groups.

Which parameter has which number in a checkpoint is known from "param_names", if the optimizer was made from
model.named_parameters(). Otherwise it is taken to be the order of the model's tensors, which is that of
model.parameters(); tensors that are no parameters, such as the running means of BatchNorm, are named by --buffers.
In a program of your own, call export_state and import_state with the optimizer and model.named_parameters().
"""

import argparse
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TENSORS = ("exp_avg", "exp_inf", "step")
SETTINGS = {"lr", "betas", "eps", "weight_decay", "maximize", "foreach", "capturable", "differentiable", "initial_lr"}
# What PyTorch's load_state_dict would take over from here, although the file says nothing of it.
OWN = ("foreach", "capturable", "differentiable", "initial_lr", "param_names")


def named(state_dict, parameters):
    """The parameters' names by their numbers in an optimizer's state_dict."""
    groups = state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    else:
        names = [name for name, _ in parameters]
    if len(names) != len(numbers):
        raise SystemExit(f"{len(numbers)} parameters in the optimizer, {len(names)} names: {names}")
    unknown = set(names) - {name for name, _ in parameters}
    if len(set(names)) != len(names) or unknown:
        raise SystemExit(f"names that are there twice, or not in the model: {sorted(unknown) or names}")
    return dict(zip(numbers, names))


def export_state(state_dict, parameters, path):
    """Writes an optimizer's state_dict() to `path`; `parameters` are pairs of names and tensors."""
    parameters = list(parameters)
    names, tensors, groups = named(state_dict, parameters), {}, []
    shapes = dict(parameters)
    for number, name in names.items():
        # A parameter that has had no gradient yet has no state, which is the same as zeros.
        zeros = torch.zeros_like(shapes[name])
        state = state_dict["state"].get(number, {"exp_avg": zeros, "exp_inf": zeros, "step": torch.tensor(0.0)})
        if set(state) != set(TENSORS):
            raise SystemExit(f"{name}: expected the state of Adamax, got {sorted(state)}")
        if state["exp_avg"].shape != shapes[name].shape:
            raise SystemExit(f"{name}: expected state of shape {shapes[name].shape}, got {state['exp_avg'].shape}")
        for key in TENSORS:
            tensors[f"{name}.{key}"] = torch.as_tensor(state[key]).detach().cpu().clone().contiguous()
    for group in state_dict["param_groups"]:
        surplus = set(group) - SETTINGS - {"params", "param_names"}
        if surplus:
            raise SystemExit(f"settings that Adamax does not have: {sorted(surplus)}")
        settings = {key: group[key] for key in SETTINGS & set(group)}
        settings.update({key: float(settings[key]) for key in ("lr", "eps", "weight_decay")})
        settings["betas"] = [float(beta) for beta in settings["betas"]]
        groups.append({**settings, "params": [names[number] for number in group["params"]]})
    save_file(tensors, path, metadata={"param_groups": json.dumps(groups)})


def import_state(path, state_dict, parameters):
    """The state in `path` as a state_dict for the optimizer that `state_dict` is of, whose groups decide the order."""
    names = named(state_dict, list(parameters))
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        theirs = json.loads(file.metadata()["param_groups"])
    group_of = {name: group for group in theirs for name in group["params"]}
    expected = {f"{name}.{key}" for name in names.values() for key in TENSORS}
    if expected != set(tensors) or set(group_of) != set(names.values()):
        raise SystemExit(f"missing or surplus: {sorted(expected ^ set(tensors) | set(names.values()) ^ set(group_of))}")
    groups = []
    for group in state_dict["param_groups"]:
        settings = [{k: v for k, v in group_of[names[n]].items() if k != "params"} for n in group["params"]]
        if any(other != settings[0] for other in settings):
            raise SystemExit(f"one group here, with different settings there: {[names[n] for n in group['params']]}")
        own = {key: group[key] for key in OWN if key in group}
        groups.append({**group, **(settings[0] if settings else {}), **own, "params": group["params"]})
        groups[-1]["betas"] = tuple(groups[-1]["betas"])
    state = {n: {key: tensors[f"{name}.{key}"] for key in TENSORS} for n, name in names.items()}
    return {"state": state, "param_groups": groups}


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
        sub.add_argument("--buffers", nargs="*", default=[], help="names of the model's tensors that are no parameters")
    args = parser.parse_args()
    checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    model, state_dict = checkpoint[args.model_key], checkpoint[args.optimizer_key]
    parameters = [(name, tensor) for name, tensor in model.items() if name not in args.buffers]
    if args.command == "export":
        export_state(state_dict, parameters, args.state)
        if args.weights:
            save_file({name: tensor.contiguous().clone() for name, tensor in model.items()}, args.weights)
        return
    checkpoint[args.optimizer_key] = import_state(args.state, state_dict, parameters)
    if args.weights:
        weights = load_file(args.weights)
        missing = {name for name, _ in parameters} - set(weights)
        if missing or set(weights) - set(model):
            raise SystemExit(f"missing or surplus weights: {sorted(missing | (set(weights) - set(model)))}")
        checkpoint[args.model_key] = {**model, **weights}
    torch.save(checkpoint, args.result)


if __name__ == "__main__":
    main()
