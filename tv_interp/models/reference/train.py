"""Train a reference model: ``python -m tv_interp.models.reference.train --preset base --out DIR``.

Deterministic by seed (same machine, threads and versions: the same bytes) and resumable: a run that
is killed goes on from its last checkpoint and gives the weights of an uninterrupted run, since the
batch and the dropout of a step depend on the seed and the step alone. Training measures accuracy
only; the phenomena are measured elsewhere.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import FileError, TvInterpError, unknown
from ...files import make_directory, whole_file, write_text
from ...prompts.tasks import Task, get_task
from ...prompts.tasks.categorization import categorization_tasks
from ...prompts.tasks.knowledge import SHARED, relations
from .data import Sequences
from .muon import Muon
from .network import Network, Shape, save_as_llama
from .vocabulary import CONNECTIVE, save_tokenizer, word_ids, words

LOOK_UP_FIRST = {
    "typed": 0.10, "shared": 0.10, "bijection": 0.05, "lookup": 0.45,
    "simple-string": 0.14, "digit": 0.10, "2d-data": 0.06,
}  # fmt: skip
BALANCED = {
    "typed": 0.10, "shared": 0.30, "bijection": 0.06, "lookup": 0.06,
    "simple-string": 0.16, "digit": 0.14, "2d-data": 0.18,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, with the seed."""

    steps: int
    warm_steps: int
    layers: int = 5
    batch: int = 32
    length: int = 64
    warm_length: int = 32
    muon_lr: float = 0.003
    muon_decay: float = 0.1
    adam_lr: float = 1.5e-3
    decay_from: float = 0.65
    head_dropout: float = 0.05
    first_mix: dict[str, float] = field(default_factory=lambda: LOOK_UP_FIRST)
    mix: dict[str, float] = field(default_factory=lambda: BALANCED)
    prewired: dict[str, int] = field(
        default_factory=lambda: {"0.0": 2, "0.1": 1, "0.2": 3, "1.0": 1}
    )


PRESETS = {
    "base": Recipe(steps=5_000, warm_steps=2_000),
    "natural": Recipe(steps=5_000, warm_steps=2_000, prewired={}),
    "tiny": Recipe(steps=60, warm_steps=20, layers=2, batch=8, length=48),
}


def train(
    preset: str = "base",
    *,
    out: str,
    seed: int = 0,
    steps: int | None = None,
    checkpoint_every: int = 250,
) -> dict[str, float]:
    """Train, or go on training, and write the model to ``out``.

    Args:
        preset: Name of a recipe.
        out: Directory for config.json, model.safetensors, the tokenizer, ``curve.jsonl`` and, until
            the run is complete, ``checkpoint.pt``.
        seed: Decides initial weights, batches and dropout.
        steps: Another number of steps than the recipe's; the learning-rate schedule scales with it.
        checkpoint_every: Steps between checkpoints and accuracy measurements.

    Returns:
        Final accuracy by family.

    Raises:
        UnknownName: if there is no such preset.
        FileError: if ``out`` cannot be written or its checkpoint is of another run.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    recipe = PRESETS[preset] if steps is None else replace(PRESETS[preset], steps=steps)
    directory = make_directory(out)
    identity = json.dumps({"preset": preset, "seed": seed, **asdict(recipe)}, sort_keys=True)
    shape = Shape(vocab=len(words()), layers=recipe.layers)
    network = Network(shape, seed)
    if recipe.prewired:
        network.prewire(recipe.prewired)
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in network.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.muon_decay),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    base_lr = [recipe.muon_lr, recipe.adam_lr]
    done, curve = _resume(directory, identity, network, optimizers)
    warm, full = Sequences(recipe.warm_length), Sequences(recipe.length)
    run = torch.compile(network, dynamic=False) if recipe.steps > 500 else network
    started, first = time.monotonic(), done
    for step in range(done, recipe.steps):
        rate = _rate(step, recipe)
        for optimizer, lr in zip(optimizers, base_lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        sequences = warm if step < recipe.warm_steps else full
        loss = _loss(run, network, sequences, recipe, seed, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        at = step + 1
        if at % checkpoint_every == 0 or at == recipe.steps:
            if not torch.isfinite(loss):
                raise TvInterpError(
                    f"training diverged: loss {loss.item()} at step {at}; lower the learning rates"
                )
            accuracy = measure(network, n_demos=8, n_prompts=24, seed=at)
            curve.append({"step": at, "loss": round(loss.item(), 4), **accuracy})
            _save(directory, identity, network, optimizers, at, curve)
            _report(at, recipe.steps, loss, accuracy, (time.monotonic() - started) / (at - first))
    _finish(directory, network, recipe, preset, seed, curve)
    return measure(network, n_demos=8, n_prompts=100, seed=0)


def _rate(step: int, recipe: Recipe) -> float:
    """Warm up over 150 steps, stay, then fall linearly to 2 %."""
    up = min(1.0, (step + 1) / 150)
    down = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return up * min(1.0, max(0.02, down))


def _loss(run, network, sequences, recipe: Recipe, seed: int, step: int) -> Tensor:
    rng = np.random.default_rng([seed, step])
    mix = recipe.first_mix if step < recipe.warm_steps else recipe.mix
    batch = sequences.batch(rng, recipe.batch, mix)
    shape = network.shape
    keep = torch.ones(shape.layers, recipe.batch, shape.heads)
    if step >= recipe.warm_steps and recipe.head_dropout > 0:
        ramp = min(1.0, (step - recipe.warm_steps) / max(1, recipe.warm_steps))
        p = recipe.head_dropout * ramp
        keep = torch.from_numpy(rng.random(keep.shape) >= p).float() / (1 - p)
    hidden = run(torch.from_numpy(batch.tokens), keep)
    logits = hidden[batch.row, batch.position] @ network.embed_tokens.weight.T
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.target))


@torch.no_grad()
def measure(network: Network, *, n_demos: int, n_prompts: int, seed: int) -> dict[str, float]:
    """Measure exact top-1 accuracy at the last query, by family; queries are held out."""
    ids = word_ids()
    names = {
        "typed": [n for n in relations() if n not in SHARED],
        "shared": sorted(SHARED),
        "bijection": [f"{n}-bijection" for n in ("country-capital", "verb-past", "noun-plural")],
        "lookup": ["lookup"],
    }
    tasks_of: dict[str, list[Task]] = {f: [get_task(n) for n in each] for f, each in names.items()}
    tasks_of |= {task.name: [task.with_queries("held_out")] for task in categorization_tasks()}
    keep = torch.ones(network.shape.layers, 1, network.shape.heads)
    out = {}
    for family, tasks in tasks_of.items():
        rng = np.random.default_rng([seed, len(family)])
        each = max(4, 2 * n_prompts // len(tasks))
        lines, answers = [], []
        for task in tasks:
            for _ in range(each):
                sample = task.sample(rng, n_demos)
                text = [f"{x} {CONNECTIVE} {y}" for x, y in sample.demos]
                line = " ".join(["<bos>", *text, sample.query, CONNECTIVE]).split()
                lines.append([ids[w] for w in line])
                answers.append(ids[sample.answer])
        width = max(map(len, lines))
        tokens = torch.tensor([line + [0] * (width - len(line)) for line in lines])
        last = torch.tensor([len(line) - 1 for line in lines])
        hidden = network(tokens, keep.expand(-1, len(lines), -1))
        logits = hidden[torch.arange(len(lines)), last] @ network.embed_tokens.weight.T
        out[family] = round((logits.argmax(-1) == torch.tensor(answers)).float().mean().item(), 4)
    return out


def _resume(directory: Path, identity: str, network: Network, optimizers: list) -> tuple[int, list]:
    path = directory / "checkpoint.pt"
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise FileError(f"cannot read {path}: delete it to start afresh ({error})") from error
    if state["identity"] != identity:
        raise FileError(
            f"{path} belongs to a run with another preset, seed or recipe: name another --out"
        )
    network.load_state_dict(state["network"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], json.loads(state["curve"])


def _save(directory, identity, network, optimizers, step, curve) -> None:
    state = {
        "identity": identity,
        "network": network.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "curve": json.dumps(curve),
    }
    with whole_file(directory / "checkpoint.pt") as partial:
        torch.save(state, partial)


def _finish(directory, network, recipe, preset, seed, curve) -> None:
    provenance = {
        "preset": preset,
        "seed": seed,
        "recipe": asdict(recipe),
        "torch": torch.__version__,
    }
    save_as_llama(network, directory, provenance)
    save_tokenizer(directory, recipe.prewired)
    lines = "".join(json.dumps(row) + "\n" for row in curve)
    write_text(directory / "curve.jsonl", lines)
    (directory / "checkpoint.pt").unlink(missing_ok=True)


def _report(at: int, steps: int, loss: Tensor, accuracy: dict[str, float], pace: float) -> None:
    numbers = " ".join(f"{k} {v:.2f}" for k, v in accuracy.items())
    print(f"{at:>6}/{steps} {pace:.3f} s/step  loss {loss.item():.3f}  {numbers}", flush=True)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(train, as_positional=False)
