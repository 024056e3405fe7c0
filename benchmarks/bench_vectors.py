"""How fast is a layer sweep of vectors, against a loop of hooked forward passes in this process?

    python benchmarks/bench_vectors.py                    # the reference model
    python benchmarks/bench_vectors.py --shape gpt2       # GPT-2-small shape, random weights
    python benchmarks/bench_vectors.py --curves           # what every curve of vectors takes
    python benchmarks/bench_vectors.py --write            # any of these, into README.md too

Local vectors go to the answers of dummy prompts, global ones to "is". The loop runs the model once
a layer, with one hook, and reads accuracy, choice and label rate off its last logits. Ours is the
sweep with the recording of the recipients' run, on its own and of both sweeps together, which share
that run. CPU seconds on one thread, the best of three.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_patching import build, contrast_for  # noqa: E402
from harness import cpu, keep, provenance, write_section  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import tv_interp as tv  # noqa: E402
from tv_interp.analysis.comparison import attention_by_distance  # noqa: E402
from tv_interp.analysis.convergence import (  # noqa: E402
    ABLATIONS,
    convergence_boundary,
    cross_vectors,
)
from tv_interp.interventions.recording import record_run  # noqa: E402
from tv_interp.models.adapter import Adapter  # noqa: E402
from tv_interp.scores import get_metric  # noqa: E402
from tv_interp.scores.metrics import Readouts, Targets  # noqa: E402

METRICS = ("accuracy", "choice", "label_rate")


def loop(model: Any, prompts: tv.Prompts, vectors: tv.Vectors) -> np.ndarray:
    """One hooked forward pass a layer: ``[prompt, layer, metric]``."""
    positions = prompts.positions(vectors.role)
    positions = positions if positions.ndim == 2 else positions[:, None]
    values = torch.from_numpy(vectors.data.values)
    values = values if values.ndim == 4 else values[:, :, None]
    readout = Readouts.of([get_metric(name) for name in METRICS], Targets.of(prompts))
    out = np.zeros((len(prompts), model.cfg.n_layers, len(METRICS)))
    for rows, tokens in prompts.buckets():
        index = torch.arange(len(rows))[:, None]
        for layer in range(model.cfg.n_layers):

            def put(resid, hook, rows=rows, index=index, layer=layer):
                resid[index, positions[rows]] = values[rows, layer]
                return resid

            with torch.no_grad():
                hooks = [(f"blocks.{layer}.hook_resid_post", put)]
                logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
            out[rows.numpy(), layer] = readout(logits, rows)
    return out


def ours(model: Any, prompts: tv.Prompts, several: list[tv.Vectors]) -> np.ndarray:
    """Record the run once, and sweep: ``[sweep, prompt, layer, metric]``."""
    run = record_run(Adapter.of(model), prompts)
    found = [tv.inject_vectors(model, prompts, v, metric=METRICS, run=run) for v in several]
    return np.stack([np.stack([f[m].data.values for m in METRICS], -1) for f in found])


def best(function: Callable[[], np.ndarray], times: int = 3) -> tuple[np.ndarray, float]:
    """Result and CPU seconds of the fastest call."""
    runs = [cpu(function) for _ in range(times)]
    return runs[0][0], min(seconds for _, seconds in runs)


def work(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products that a call makes."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def limit(model: Any, prompts: tv.Prompts) -> float:
    """Work of the loop of local vectors over the least that is left when blocks are resumed.

    Counted in weights that a token is multiplied with. The least: of the recorded run all blocks,
    of a sweep the blocks above its layer at the tokens from the first answer on; of the last layer
    in both only keys and values, and one whole token, which alone is unembedded.
    """
    block = {
        name: weight.numel()
        for name, weight in model.blocks[0].named_parameters()
        if ".W_" in name or ".w_" in name
    }
    whole = sum(block.values())
    keys = sum(n for name, n in block.items() if name.split(".")[-1].strip("_") in ("W_K", "W_V"))
    layers, tokens = model.cfg.n_layers, int(prompts.lengths.max())
    unembed = model.cfg.d_model * model.cfg.d_vocab
    after = tokens - int(prompts.positions("answer").min())
    end = whole - keys + unembed
    theirs = layers * (layers * tokens * whole + tokens * unembed)
    record = ((layers - 1) * whole + keys) * tokens + end
    sweep = sum(
        (layers - 2 - layer) * after * whole + after * keys + end for layer in range(layers - 1)
    )
    return theirs / (record + sweep)


def sweeps(shape: str, n_prompts: int) -> dict[str, Any]:
    """Measure the layer sweeps on one model."""
    if shape == "reference":
        model = tv.load_model("reference")
        clean = tv.make_prompts(model, "country-currency", n_demos=8, n_prompts=n_prompts)
        contrast = clean.dummies(seed=1)
    else:
        model = build(shape)
        contrast = contrast_for(model, n_prompts)
    dummy = contrast.corrupted
    local, whole = (
        tv.extract_vectors(model, contrast.clean, at=at) for at in ("answer", "query_is")
    )
    given = {"local": [local], "global": [whole], "both": [local, whole]}
    few = dummy.select(range(min(8, len(dummy))))
    rows = range(len(few))
    loops = {name: best(lambda v=given[name][0]: loop(model, dummy, v))
             for name in ("local", "global")}  # fmt: skip
    forward = work(lambda: loop(model, few, local.select(rows)))
    table = []
    for name, several in given.items():
        parts = ("local", "global") if name == "both" else (name,)
        expected = np.stack([loops[part][0] for part in parts])
        theirs = sum(loops[part][1] for part in parts)
        found, seconds = best(lambda several=several: ours(model, dummy, several))
        done = work(lambda several=several: ours(model, few, [v.select(rows) for v in several]))
        table.append(
            {
                "sweep": name,
                "loop_s": theirs,
                "ours_s": seconds,
                "work": len(parts) * forward / done,
                "limit": limit(model, dummy) if name == "local" else None,
                "wrong": int((found != expected).sum()),
            }
        )
    about = (
        f"{len(dummy)} prompts of {int(dummy.lengths.max())} tokens, {model.cfg.n_layers} layers."
    )
    return {"about": about, "rows": table, "provenance": provenance()}


# --------------------------------------------------------------------------------- every curve


def calls(model: Any, name: str, metric: str, n_prompts: int) -> dict[str, Callable[[], Any]]:
    """Name every curve of a task, and how it is made."""
    settings: dict[str, Any] = dict(n_demos=8, n_prompts=n_prompts, seed=0)
    prompts = tv.make_prompts(model, name, **settings)
    contrast = prompts.dummies(seed=1)

    def without(how: Any) -> Callable[[], Any]:
        return lambda: tv.ablate_demos(model, prompts, how=[how], metric=metric)

    out: dict[str, Callable[[], Any]] = {
        "sweeps by layer with all controls (`compare_vectors`)": lambda: tv.compare_vectors(
            model, name, **settings
        ),
        "convergence by layer (`measure_convergence`)": lambda: tv.measure_convergence(
            model, name, **settings
        ),
        "local and global, 2 x 2 (`cross_vectors`)": lambda: cross_vectors(
            model, contrast, local_layer=1, global_layer=2, metric=metric
        ),
        "dPCA, distances, subspaces (`measure_geometry`)": lambda: tv.measure_geometry(
            model, name, **settings
        ),
        "attention by distance (`attention_by_distance`)": lambda: attention_by_distance(
            model, prompts
        ),
        "found heads and their share (`measure_head_shares`)": lambda: tv.measure_head_shares(
            model, name, **settings
        ),
    }
    for how in ABLATIONS:
        out[f"k of n answers, every k, {how} (`ablate_demos`)"] = without(how)
    if prompts.task.family == "knowledge":
        out["contradicted by k of n, every k (`convergence_boundary`)"] = lambda: (
            convergence_boundary(model, prompts, layer=1)
        )
    return out


def curves(n_prompts: int) -> dict[str, Any]:
    """Time every curve of task vectors on the reference model, in CPU seconds."""
    model = tv.load_model("reference")
    table: dict[str, dict[str, float]] = {}
    for name, metric in (("country-capital", "accuracy"), ("digit", "choice")):
        for title, call in calls(model, name, metric, n_prompts).items():
            table.setdefault(title, {})[name] = seconds = cpu(call)[1]
            print(f"{name:<18}{title:<62}{seconds:>7.1f}", flush=True)
    return {"rows": table, "n_prompts": n_prompts, "provenance": provenance()}


# ------------------------------------------------------------------------------------- as text


def section(known: Mapping[str, Any]) -> str:
    """Lay out what was measured as Markdown."""
    lines: list[str] = []
    for shape, found in known.items():
        if shape == "curves":
            continue
        lines += [
            f"### Layer sweeps, {shape}", "", f"{found['about']} {found['provenance']}", "",
            "| vectors | loop, s | ours, s | ratio | work | limit | cells that differ |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in found["rows"]:
            most = f"{row['limit']:.2f}" if row["limit"] else ""
            ratio = row["loop_s"] / row["ours_s"]
            lines.append(
                f"| {row['sweep']} | {row['loop_s']:.2f} | {row['ours_s']:.2f} | **{ratio:.2f}** "
                f"| {row['work']:.2f} | {most} | {row['wrong']} |"
            )
        lines.append("")
    if "curves" in known:
        found = known["curves"]
        names = list(next(iter(found["rows"].values())))
        lines += [
            "### Every curve of task vectors, reference model", "",
            f"CPU seconds, {found['n_prompts']} prompts of 8 demonstrations (in each half, where "
            f"there are two). {found['provenance']}", "",
            "| curve | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|",
        ]  # fmt: skip
        for title, seconds in found["rows"].items():
            cells = (f"{seconds[n]:.1f}" if n in seconds else "" for n in names)
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def main() -> None:
    """Measure, print, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=("reference", "small", "gpt2"), default="reference")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--curves", action="store_true", help="time every curve instead")
    parser.add_argument("--write", action="store_true", help="keep it, and write README.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.curves:
        measured = {"curves": curves(given.prompts)}
    else:
        measured = {given.shape: sweeps(given.shape, given.prompts)}
    print(section(measured))
    if given.write:
        write_section("bench_vectors.py", section(keep("vectors.json", measured)))


if __name__ == "__main__":
    main()
