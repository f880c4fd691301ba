"""Records what PyTorch's tools for trainers do, as JSON files in `pytorch/`.

    v2/bin/python make_trainers.py --out pytorch

`grad_scaler.json`: torch.amp.GradScaler with torch.optim.Adamax; `one_cycle.json`:
torch.optim.lr_scheduler.OneCycleLR; `plateau.json`: torch.optim.lr_scheduler.ReduceLROnPlateau.
Every number is PyTorch's own.  The README beside this file describes the fields.
"""
import argparse
import json
import math
import os
import random
import warnings

import torch

NONFINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def plain(x):
    """A number as JSON can hold it."""
    if isinstance(x, float) and not math.isfinite(x):
        return "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"
    return x


# --------------------------------------------------------------------------
# GradScaler
# --------------------------------------------------------------------------
def scaler_case(name, description, settings, gradients, dtype=torch.float32):
    """`gradients`: the gradient of the unscaled loss for the two weights, call by call."""
    w = torch.nn.Parameter(torch.tensor([0.75, -0.5], dtype=dtype))
    optimizer = torch.optim.Adamax([w], lr=0.01, foreach=False)
    scaler = torch.amp.GradScaler(device="cpu", **settings)
    columns = {"scale": [], "skipped": [], "scale_after": [], "growth_tracker_after": []}
    for pair in gradients:
        optimizer.zero_grad()
        c = torch.tensor([NONFINITE.get(x, x) for x in pair], dtype=dtype)
        columns["scale"].append(scaler.get_scale())
        scaler.scale((w * c).sum()).backward()
        steps_before = optimizer.state[w]["step"].item() if w in optimizer.state else 0.0
        scaler.step(optimizer)
        steps_after = optimizer.state[w]["step"].item() if w in optimizer.state else 0.0
        scaler.update()
        columns["skipped"].append(steps_after == steps_before)
        columns["scale_after"].append(scaler.get_scale())
        columns["growth_tracker_after"].append(scaler._get_growth_tracker())
    full = {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, **settings}
    return {"name": name, "description": description, "dtype": str(dtype).removeprefix("torch."), "settings": full,
            "lr": 0.01, "init": [0.75, -0.5], "gradients": gradients, **columns,
            "weights_final": [float(x) for x in w.detach()]}


def scaler_cases():
    rng = random.Random(61)

    def noise(n):
        # Few digits, so that the file is short and every dtype holds nearly the same.
        return [[round(rng.uniform(-1, 1), 3), round(rng.uniform(-1, 1), 3)] for _ in range(n)]

    def with_bad(gradients, bad):
        for k, what in bad.items():
            gradients[k] = [gradients[k][0], what]
        return gradients

    kinds = ["inf", "-inf", "nan"]

    def sometimes(n, share):
        return {k: rng.choice(kinds) for k in range(n) if rng.random() < share}

    yield scaler_case("default", "PyTorch's defaults; grows after 2,000 good steps in a row and not before", {},
                      with_bad(noise(4300), {2: "inf", 3: "nan", 2002: "inf", 4100: "-inf"}))
    yield scaler_case("small_interval", "grows after three good steps", {"init_scale": 4.0, "growth_interval": 3},
                      with_bad(noise(200), sometimes(200, 0.2)))
    yield scaler_case("every_step", "grows at each good step", {"init_scale": 1.0, "growth_interval": 1},
                      with_bad(noise(60), sometimes(60, 0.4)))
    yield scaler_case("odd_factors", "factors that are no powers of two: the scale is rounded to f32 each time",
                      {"init_scale": 1000.1, "growth_factor": 1.3, "backoff_factor": 0.7, "growth_interval": 2},
                      with_bad(noise(200), sometimes(200, 0.25)))
    yield scaler_case("ceiling", "does not grow into infinity", {"init_scale": 2.0**120, "growth_interval": 1},
                      [[a * 2.0**-24, b * 2.0**-24] for a, b in noise(20)])
    yield scaler_case("ceiling_odd", "the growth that would be infinite is left out, a smaller one is not",
                      {"init_scale": 1e38, "growth_factor": 1.5, "growth_interval": 2},
                      with_bad([[a * 2.0**-24, b * 2.0**-24] for a, b in noise(24)], {9: "inf", 10: "inf"}))
    yield scaler_case("bad_start", "thirty bad steps in a row", {"growth_interval": 5},
                      with_bad(noise(60), {k: kinds[k % 3] for k in range(30)}))
    # Whether a gradient overflows depends on the scale: nothing here is infinite before it is scaled.
    yield scaler_case("overflow", "gradients that overflow f32 once they are scaled", {"growth_interval": 4},
                      [[a * 10.0 ** (33 + 2 * math.sin(k / 9)), b * 1e33] for k, (a, b) in enumerate(noise(200))])
    yield scaler_case("overflow_bf16", "the same with bf16 weights and gradients", {"growth_interval": 4},
                      [[a * 10.0 ** (33 + 2 * math.sin(k / 9)), b * 1e33] for k, (a, b) in enumerate(noise(120))],
                      dtype=torch.bfloat16)


# --------------------------------------------------------------------------
# OneCycleLR
# --------------------------------------------------------------------------
def one_cycle_cases():
    w = torch.nn.Parameter(torch.zeros(1))
    for name, settings in [
        ("default", {"max_lr": 0.1, "total_steps": 100}),
        ("linear", {"max_lr": 0.1, "total_steps": 97, "anneal_strategy": "linear"}),
        ("three_phase", {"max_lr": 0.02, "total_steps": 100, "three_phase": True}),
        ("three_phase_linear", {"max_lr": 0.02, "total_steps": 83, "three_phase": True, "anneal_strategy": "linear",
                                "pct_start": 0.21}),
        ("three_phase_half", {"max_lr": 0.02, "total_steps": 50, "three_phase": True, "pct_start": 0.5}),
        ("factors", {"max_lr": 3.0, "total_steps": 61, "pct_start": 0.45, "div_factor": 10.0, "final_div_factor": 7.0}),
        ("no_rise", {"max_lr": 0.1, "total_steps": 40, "pct_start": 0.0}),
        ("only_rise", {"max_lr": 0.1, "total_steps": 40, "pct_start": 1.0}),
        ("short_rise", {"max_lr": 0.1, "total_steps": 40, "pct_start": 0.01}),
        ("two_steps", {"max_lr": 0.1, "total_steps": 2, "pct_start": 0.9}),
        ("large", {"max_lr": 1e-3, "total_steps": 1000, "pct_start": 0.3, "anneal_strategy": "cos"}),
    ]:
        optimizer = torch.optim.SGD([w], lr=1.0)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, cycle_momentum=False, **settings)
        lr = []
        for step in range(settings["total_steps"]):
            lr.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            if step + 1 < settings["total_steps"]:
                scheduler.step()
        yield {"name": name, "settings": settings, "lr": lr}


# --------------------------------------------------------------------------
# ReduceLROnPlateau
# --------------------------------------------------------------------------
def plateau_cases():
    rng = random.Random(62)
    falling = [round(2.0 * 0.93**k + 0.5 + rng.uniform(-0.02, 0.02), 4) for k in range(120)]
    rising = [round(1.0 - 0.9**k + rng.uniform(-0.01, 0.01), 4) for k in range(120)]
    steps = [1.0, 1.0, 0.99995, 0.99985, 0.9998, 0.9, 0.9, 0.8999, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4] * 4
    odd = [1.0, math.nan, math.inf, 0.5, math.nan, math.nan, math.nan, 0.4, math.inf, math.inf, 0.3, 0.3, 0.3, 0.3]
    w = torch.nn.Parameter(torch.zeros(1))
    for name, metrics, settings in [
        ("default", falling, {}),
        ("patience", falling, {"patience": 3}),
        ("max", rising, {"mode": "max", "patience": 2, "factor": 0.5}),
        ("abs", steps, {"threshold_mode": "abs", "patience": 1, "threshold": 1e-3, "factor": 0.3}),
        ("max_abs", rising, {"mode": "max", "threshold_mode": "abs", "threshold": 0.01, "patience": 4, "factor": 0.7}),
        ("max_negative", [-x for x in falling], {"mode": "max", "patience": 2, "factor": 0.5}),
        ("threshold", steps, {"patience": 1, "factor": 0.5}),
        ("no_threshold", steps, {"patience": 0, "threshold": 0.0, "factor": 0.9}),
        ("cooldown", steps, {"patience": 1, "cooldown": 3, "factor": 0.5}),
        ("cooldown_no_patience", steps, {"patience": 0, "cooldown": 2, "factor": 0.5}),
        ("min_lr", steps, {"patience": 0, "min_lr": 1e-3, "factor": 0.25}),
        ("eps", steps, {"patience": 0, "eps": 2e-3, "factor": 0.5}),
        ("not_finite", odd, {"patience": 1, "factor": 0.5}),
    ]:
        optimizer = torch.optim.SGD([w], lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **settings)
        columns = {"lr": [], "best": [], "num_bad_epochs": [], "cooldown_counter": []}
        for metric in metrics:
            optimizer.step()
            scheduler.step(metric)
            columns["lr"].append(float(optimizer.param_groups[0]["lr"]))
            columns["best"].append(plain(float(scheduler.best)))
            columns["num_bad_epochs"].append(scheduler.num_bad_epochs)
            columns["cooldown_counter"].append(scheduler.cooldown_counter)
        yield {"name": name, "base_lr": 0.1, "settings": settings, "metrics": [plain(x) for x in metrics], **columns}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", required=True)
    out = ap.parse_args().out
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for file, framework, cases in [
        ("grad_scaler", "torch.amp.GradScaler(device=\"cpu\"), torch.optim.Adamax", scaler_cases()),
        ("one_cycle", "torch.optim.lr_scheduler.OneCycleLR(cycle_momentum=False)", one_cycle_cases()),
        ("plateau", "torch.optim.lr_scheduler.ReduceLROnPlateau", plateau_cases()),
    ]:
        content = {"framework": framework, "versions": {"torch": torch.__version__.split("+")[0]}, "cases": list(cases)}
        with open(os.path.join(out, f"{file}.json"), "w") as f:
            # One case a line.
            head = json.dumps({k: v for k, v in content.items() if k != "cases"})
            lines = ",\n".join(json.dumps(case, allow_nan=False, separators=(",", ":")) for case in content["cases"])
            f.write(f"{head[:-1]}, \"cases\": [\n{lines}\n]}}\n")


if __name__ == "__main__":
    main()
