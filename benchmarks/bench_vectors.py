"""How fast is a layer sweep of vectors, against a loop of hooked forward passes in this process?

    python benchmarks/bench_vectors.py                    # the reference model
    python benchmarks/bench_vectors.py --shape gpt2       # GPT-2-small shape, random weights

Local vectors go to the answers of dummy prompts, global ones to "is". The loop runs the model once
a layer, with one hook, and reads accuracy, choice and label rate off its last logits. Ours is the
sweep with the recording of the recipients' run, on its own and of both sweeps together, which share
that run. CPU seconds on one thread, the best of three. A sweep over L layers at positions near the
start has to compute half of all blocks again, and the recorded run is one more pass, so for local
vectors alone no exact method is much faster than 2 L / (L + 1); what is not unembedded adds to it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_patching import build, contrast_for, cpu  # noqa: E402

import tv_interp as tv  # noqa: E402
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


def main(shape: str, n_prompts: int) -> None:
    """Measure and print one line a sweep."""
    if shape == "reference":
        model = tv.load_model("reference")
        clean = tv.make_prompts(model, "country-currency", n_demos=8, n_prompts=n_prompts)
        contrast = clean.dummies(seed=1)
    else:
        model = build(shape)
        contrast = contrast_for(model, n_prompts)
    torch.set_num_threads(1)
    dummy = contrast.corrupted
    local, whole = (
        tv.extract_vectors(model, contrast.clean, at=at) for at in ("answer", "query_is")
    )
    loops = {name: best(lambda v=v: loop(model, dummy, v)) for name, v in
             (("local", local), ("global", whole))}  # fmt: skip
    print(f"{shape}: {len(dummy)} prompts of {int(dummy.lengths.max())} tokens, "
          f"{model.cfg.n_layers} layers, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"{'sweep':<16}{'loop s':>8}{'ours s':>8}{'ratio':>7}  cells that differ")
    for name, given in (("local", [local]), ("global", [whole]), ("both", [local, whole])):
        parts = ("local", "global") if name == "both" else (name,)
        expected = np.stack([loops[part][0] for part in parts])
        theirs = sum(loops[part][1] for part in parts)
        found, seconds = best(lambda given=given: ours(model, dummy, given))
        wrong = int((found != expected).sum())
        print(f"{name:<16}{theirs:>8.2f}{seconds:>8.2f}{theirs / seconds:>7.2f}  {wrong}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=("reference", "small", "gpt2"), default="reference")
    parser.add_argument("--prompts", type=int, default=200)
    given = parser.parse_args()
    main(given.shape, given.prompts)
