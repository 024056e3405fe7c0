"""Train a reference model: ``python -m tv_interp.models.reference.train --preset base --out DIR``.

Deterministic by seed (same machine, threads and versions: the same bytes) and resumable: a run that
is killed goes on from its last checkpoint and gives the weights of an uninterrupted run, since the
batch and the dropout of a step depend on the seed and the step alone. Training measures accuracy
only; the phenomena are measured elsewhere.
"""

from __future__ import annotations

import io
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import FileError, TvInterpError, unknown
from ...files import make_directory, write_bytes, write_text
from ...prompts.tasks import Task, get_task
from ...prompts.tasks.categorization import categorization_tasks
from ...prompts.tasks.knowledge import SHARED, relations
from .data import Sequences
from .muon import Muon
from .network import Network, Shape, save_as_llama
from .vocabulary import BOS, SEPARATOR, save_tokenizer, template, word_ids, words

FEW_KEYS = {
    "typed": 0.10, "shared": 0.03, "bijection": 0.03, "lookup": 0.05,
    "simple-string": 0.03, "digit": 0.03, "2d-data": 0.03, "recall": 0.70,
}  # fmt: skip
LOOK_UP_FIRST = {
    "typed": 0.10, "shared": 0.10, "bijection": 0.05, "lookup": 0.45,
    "simple-string": 0.14, "digit": 0.10, "2d-data": 0.06,
}  # fmt: skip
BALANCED = {
    "typed": 0.08, "shared": 0.26, "bijection": 0.06, "lookup": 0.08,
    "simple-string": 0.14, "digit": 0.19, "2d-data": 0.19,
}  # fmt: skip
SHARED_FIRST = {
    "typed": 0.06, "shared": 0.40, "bijection": 0.06, "lookup": 0.08,
    "simple-string": 0.10, "digit": 0.15, "2d-data": 0.15,
}  # fmt: skip
KNOWLEDGE = {"typed": 0.35, "shared": 0.50, "bijection": 0.15}
TYPED_TOO = {
    "typed": 0.18, "shared": 0.32, "bijection": 0.06, "lookup": 0.08,
    "simple-string": 0.10, "digit": 0.13, "2d-data": 0.13,
}  # fmt: skip
PREVIOUS_TOKEN = {"0.0": 2, "0.1": 1, "0.2": 3, "1.0": 1}
SNAPSHOTS = 12
GROWTH = 1.008
"""Factor by which label words grow in number at a step, where a phase lets them."""
MEMORY = 0.95
"""Weight of the past in the running share of right look-ups: about 20 steps."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training: sequences of one length from one mix of families.

    Attributes:
        steps: Number of steps; at most, if ``until`` is given.
        length: Tokens of a sequence.
        mix: Weight of each family.
        batch: Sequences of a step.
        n_words: Label words that occur; None for all.
        until: Share of look-ups that must be right before the next phase begins. If the one before
            had fewer label words, they grow in number while the share is that high, and the phase
            goes on until all its words have come. None: a phase of fixed length.
        dropout: Share of heads or token columns dropped from the middle of the phase on; until then
            it grows linearly from that of the phase before.
    """

    steps: int
    length: int
    mix: dict[str, float]
    batch: int = 32
    n_words: int | None = None
    until: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where in its recipe a run is; with the seed and the step it decides the next batch.

    Attributes:
        phase: Index of the phase.
        step: Steps taken in it.
        n_words: Label words that occur; None for all. Not rounded, as it grows by a factor.
        looked_up: Running share of right answers to inputs shown before (`Batch.shown`).
    """

    phase: int = 0
    step: int = 0
    n_words: float | None = None
    looked_up: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, with the seed.

    Attributes:
        phases: What is trained on, in order.
        drop: What dropout drops: the outputs of whole ``"heads"``, or the residual stream of whole
            token ``"columns"`` after each block but the last (O_l in Proposition 5 of arXiv
            2506.09048), or ``"nothing"``.
        separator: Token after every answer; "" for none.
        tokens: Which of the vocabulary the model knows: ``"all"``, or all but ``"no separator"``. A
            row more or less in the embedding changes every draw that follows.
        prewired: Offset of each head, by ``"layer.head"``, that starts as a previous-token head.
        mean: Length of a direction that all embeddings share at the start.
        likeness: Correlation of keys with queries at the start, in every head.
        layers: Number of blocks.
        theta: Base of the rotary positions.
        muon_lr: Learning rate of matrices.
        muon_decay: Weight decay of matrices.
        adam_lr: Learning rate of embeddings and norms.
        rarest: How often the rarest relation of a family occurs, over the most frequent one; the
            others lie between, at equal ratios. The seed decides which is where.
        decay_from: Share of all steps after which the learning rates fall, linearly to 2 %.
    """

    phases: tuple[Phase, ...]
    drop: Literal["heads", "columns", "nothing"] = "heads"
    separator: str = ""
    tokens: Literal["all", "no separator"] = "all"
    prewired: dict[str, int] = field(default_factory=dict)
    mean: float = 0.0
    likeness: float = 0.0
    layers: int = 5
    theta: float = 10_000.0
    muon_lr: float = 0.003
    muon_decay: float = 0.1
    adam_lr: float = 1.5e-3
    rarest: float = 1.0
    decay_from: float = 0.65

    @property
    def steps(self) -> int:
        """Count the steps of all phases, at most."""
        return sum(phase.steps for phase in self.phases)

    @property
    def known(self) -> int:
        """Count the tokens that the model knows."""
        return len(words()) - (self.tokens == "no separator")

    def familiarity(self, seed: int) -> dict[str, float] | None:
        """Draw how often each relation occurs among those of its family; None: all alike."""
        if self.rarest == 1:
            return None
        rng, weights = np.random.default_rng(seed), {}
        for shared in (False, True):
            names = [name for name in relations() if (name in SHARED) == shared]
            ranks = rng.permutation(len(names)) / (len(names) - 1)
            weights |= dict(zip(names, (self.rarest**ranks).tolist(), strict=True))
        return weights

    def left(self, place: Place) -> int:
        """Count the steps that may still come."""
        return sum(phase.steps for phase in self.phases[place.phase :]) - place.step

    def start(self) -> Place:
        """Begin at the first phase."""
        return Place(n_words=self.phases[0].n_words)

    def dropout(self, place: Place) -> float:
        """Look up what share is dropped."""
        phase = self.phases[place.phase]
        before = self.phases[place.phase - 1].dropout if place.phase else 0.0
        return before + min(1.0, 2 * place.step / phase.steps) * (phase.dropout - before)

    def after(self, place: Place, shown: Tensor) -> Place:
        """Take one step.

        Args:
            place: Where the run is.
            shown: Whether each look-up of the batch was answered right.

        Returns:
            Where it is next; past the last phase when the run is done.

        Raises:
            TvInterpError: if look-up is not learned within the steps of a phase that waits for it.
        """
        phase, n_words, share = self.phases[place.phase], place.n_words, place.looked_up
        if len(shown):
            share = MEMORY * share + (1 - MEMORY) * shown.double().mean().item()
        ready = phase.until is None or share >= phase.until
        if ready and n_words and phase.n_words:
            n_words = min(phase.n_words, n_words * GROWTH)
            ready = n_words == phase.n_words
        if phase.until is None:
            ready = place.step + 1 == phase.steps
        elif not ready and place.step + 1 == phase.steps:
            raise TvInterpError(
                f"the look-up plateau did not break: {share:.2f} right where phase "
                f"{place.phase + 1} waits for {phase.until:g} with {phase.n_words or 'all'} label "
                f"words, after {phase.steps} steps; try another seed"
            )
        if not ready:
            return Place(place.phase, place.step + 1, n_words, share)
        for following in self.phases[place.phase + 1 : place.phase + 2]:
            n_words = n_words if following.until else following.n_words
        return Place(place.phase + 1, 0, n_words, share)


def _presets() -> dict[str, Recipe]:
    base = Recipe(
        phases=(
            Phase(1_000, 32, LOOK_UP_FIRST),
            Phase(3_000, 64, BALANCED, dropout=0.05),
            Phase(500, 96, BALANCED, dropout=0.05),
        ),
        prewired=PREVIOUS_TOKEN,
    )
    natural = Recipe(
        phases=(
            Phase(400, 10, FEW_KEYS, batch=96, n_words=12),
            Phase(700, 16, FEW_KEYS, batch=64, n_words=12, until=0.78),
            Phase(1_500, 32, FEW_KEYS, n_words=195, until=0.72),
            Phase(2_200, 64, SHARED_FIRST, batch=24, dropout=0.15),
            Phase(200, 96, SHARED_FIRST, batch=16, dropout=0.15),
        ),
        tokens="no separator",
        decay_from=0.85,
        mean=0.3,
        likeness=0.5,
    )
    longer = (
        Phase(8_000, 64, TYPED_TOO, batch=24, dropout=0.2),
        Phase(200, 96, TYPED_TOO, batch=16, dropout=0.2),
    )
    reference = replace(natural, phases=(*natural.phases[:3], *longer))
    deeper = (replace(longer[0], steps=12_000), longer[1])
    arm = Recipe(
        phases=(Phase(1_000, 48, KNOWLEDGE, dropout=0.15),),
        tokens="no separator",
        mean=0.3,
        likeness=0.5,
        muon_lr=0.01,
        adam_lr=3e-3,
    )
    short = (
        Phase(10, 32, LOOK_UP_FIRST, batch=8, n_words=12),
        Phase(100, 32, LOOK_UP_FIRST, batch=8, n_words=13, until=0.01),
        Phase(40, 48, BALANCED, batch=8, dropout=0.05),
    )
    return {
        "base": base,
        "natural": natural,
        "natural-longer": reference,
        "natural-longer-nodropout": replace(reference, drop="nothing"),
        "natural-longer-tokendropout": replace(reference, drop="columns"),
        "natural-deeper": replace(natural, phases=(*natural.phases[:3], *deeper), layers=6),
        "arm-heads": arm,
        "arm-columns": replace(arm, drop="columns"),
        "arm-nothing": replace(arm, drop="nothing"),
        "familiarity": replace(arm, rarest=0.02),
        "arm-separator": replace(arm, separator=SEPARATOR, tokens="all"),
        "tiny": Recipe(phases=short, layers=2),
    }


PRESETS = _presets()


def train(
    preset: str = "base", *, out: str, seed: int = 0, checkpoint_every: int = 250
) -> dict[str, float]:
    """Train, or go on training, and write the model to ``out``.

    Args:
        preset: Name of a recipe.
        out: Directory for config.json, model.safetensors, the tokenizer, ``curve.jsonl`` (accuracy
            by family), ``training.json`` (minutes and machine), ``over_training`` (12 models in
            bfloat16, denser at first; the names are steps) and, until the run is complete,
            ``checkpoint.pt``.
        seed: Decides initial weights, batches and dropout.
        checkpoint_every: Steps between checkpoints and accuracy measurements.

    Returns:
        Final accuracy by family.

    Raises:
        UnknownName: if there is no such preset.
        FileError: if ``out`` cannot be written or its checkpoint is of another run.
        TvInterpError: if the loss is no longer finite.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    recipe = PRESETS[preset]
    directory = make_directory(out)
    about = {"preset": preset, "seed": seed, "recipe": asdict(recipe), "torch": torch.__version__}
    familiarity = recipe.familiarity(seed)
    if familiarity:
        about["familiarity"] = familiarity
    network = Network(Shape(vocab=recipe.known, layers=recipe.layers, theta=recipe.theta), seed)
    network.lean(recipe.mean, recipe.likeness)
    if recipe.prewired:
        network.prewire(recipe.prewired)
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in network.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.muon_decay),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    identity = json.dumps(about, sort_keys=True)
    run = Run(directory, identity, network, optimizers, recipe.start())
    run.resume()
    started, before, first = time.monotonic(), run.seconds, run.step
    sequences = {
        p.length: Sequences(p.length, recipe.separator, familiarity) for p in recipe.phases
    }
    forward = torch.compile(network, dynamic=False) if recipe.steps > 500 else network
    snapshots = {
        max(1, round(recipe.steps * (i / SNAPSHOTS) ** 2)) for i in range(1, SNAPSHOTS + 1)
    }
    while run.place.phase < len(recipe.phases):
        rate = _rate(run.step, recipe.left(run.place), recipe)
        for optimizer, lr in zip(optimizers, (recipe.muon_lr, recipe.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        rng = np.random.default_rng([seed, run.step])
        loss, shown = _loss(forward, network, sequences, recipe, rng, run.place)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        run.step += 1
        run.place = recipe.after(run.place, shown)
        done = run.place.phase == len(recipe.phases)
        if run.step in snapshots or done:
            place = make_directory(directory / "over_training" / f"{run.step:06d}")
            save_as_llama(network, place, about, torch.bfloat16)
            save_tokenizer(place, recipe.prewired, recipe.separator, recipe.known)
        if run.step % checkpoint_every == 0 or done:
            if not torch.isfinite(loss):
                raise TvInterpError(
                    f"training diverged: loss {loss.item()} at step {run.step}; lower the "
                    "learning rates"
                )
            accuracy = measure(
                network, n_demos=8, n_prompts=24, seed=run.step, separator=recipe.separator
            )
            run.curve.append({"step": run.step, "loss": round(loss.item(), 4), **accuracy})
            taken = time.monotonic() - started
            run.seconds = before + taken
            run.save()
            _report(run, recipe, taken / (run.step - first))
    save_as_llama(network, directory, about)
    save_tokenizer(directory, recipe.prewired, recipe.separator, recipe.known)
    run.finish()
    return measure(network, n_demos=8, n_prompts=100, seed=0, separator=recipe.separator)


@dataclass
class Run:
    """What a killed run needs to go on as if nothing had happened."""

    directory: Path
    identity: str
    network: Network
    optimizers: list[torch.optim.Optimizer]
    place: Place
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def checkpoint(self) -> Path:
        """Name the checkpoint's file."""
        return self.directory / "checkpoint.pt"

    def resume(self) -> None:
        """Read the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, weights_only=True)
            identity = state["identity"]
        except Exception as error:  # a zip, pickle or key error, according to what is broken
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise FileError(
                f"cannot read {self.checkpoint}: delete it to start afresh ({reason})"
            ) from error
        if identity != self.identity:
            raise FileError(
                f"{self.checkpoint} belongs to a run with another preset, seed, recipe or torch: "
                "name another --out"
            )
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.place = Place(**state["place"])
        self.curve = json.loads(state["curve"])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        content = io.BytesIO()
        state = {
            "identity": self.identity,
            "network": self.network.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "place": asdict(self.place),
            "seconds": self.seconds,
            "curve": json.dumps(self.curve),
        }
        torch.save(state, content)
        write_bytes(self.checkpoint, content.getvalue())

    def finish(self) -> None:
        """Write the learning curve and what it took, and remove the checkpoint."""
        lines = "".join(json.dumps(row) + "\n" for row in self.curve)
        write_text(self.directory / "curve.jsonl", lines)
        took = {
            "minutes": round(self.seconds / 60, 1),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads",
        }
        write_text(self.directory / "training.json", json.dumps(took) + "\n")
        self.checkpoint.unlink(missing_ok=True)


def _rate(step: int, left: int, recipe: Recipe) -> float:
    """Warm up over 150 steps, stay, then fall linearly to 2 %."""
    up = min(1.0, (step + 1) / 150)
    down = left / (recipe.steps * (1 - recipe.decay_from))
    return up * min(1.0, max(0.02, down))


def _loss(
    forward,
    network: Network,
    sequences: dict[int, Sequences],
    recipe: Recipe,
    rng: np.random.Generator,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """Take the loss of a fresh batch, and whether each of its look-ups is right."""
    phase, p = recipe.phases[place.phase], recipe.dropout(place)
    n_words = round(place.n_words) if place.n_words else None
    batch = sequences[phase.length].batch(rng, phase.batch, phase.mix, n_words)
    heads, columns = network.nothing_dropped(*batch.tokens.shape)
    if recipe.drop == "heads":  # rescaled as dropout is
        heads = torch.from_numpy(rng.random(heads.shape) >= p).float() / (1 - p)
    elif recipe.drop == "columns":  # not rescaled: norms follow
        columns = torch.from_numpy(rng.random(columns.shape) >= p).float()
    hidden = forward(torch.from_numpy(batch.tokens), heads, columns)
    logits = hidden[batch.row, batch.position] @ network.embed_tokens.weight.T
    target = torch.from_numpy(batch.target)
    shown = (logits.argmax(-1) == target)[torch.from_numpy(batch.shown)]
    return torch.nn.functional.cross_entropy(logits, target), shown


@torch.no_grad()
def measure(
    network: Network, *, n_demos: int, n_prompts: int, seed: int, separator: str = ""
) -> dict[str, float]:
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
    item = template(separator)
    out = {}
    for family, tasks in tasks_of.items():
        rng = np.random.default_rng([seed, len(family)])
        each = max(4, 2 * n_prompts // len(tasks))
        lines, answers = [], []
        for task in tasks:
            for _ in range(each):
                sample = task.sample(rng, n_demos)
                shown = "".join(item.format(x=x, y=y) for x, y in sample.demos)
                asked = item.partition("{y}")[0].format(x=sample.query)
                line = f"{BOS} {shown}{asked}".split()
                lines.append([ids[w] for w in line])
                answers.append(ids[sample.answer])
        width = max(map(len, lines))
        tokens = torch.tensor([line + [0] * (width - len(line)) for line in lines])
        last = torch.tensor([len(line) - 1 for line in lines])
        hidden = network(tokens, *network.nothing_dropped(*tokens.shape))
        logits = hidden[torch.arange(len(lines)), last] @ network.embed_tokens.weight.T
        out[family] = round((logits.argmax(-1) == torch.tensor(answers)).float().mean().item(), 4)
    return out


def _report(run: Run, recipe: Recipe, pace: float) -> None:
    numbers = " ".join(f"{k} {v:.2f}" for k, v in run.curve[-1].items() if k != "step")
    place = f"phase {run.place.phase + 1}, looked up {run.place.looked_up:.2f}"
    if run.place.n_words:
        place += f" of {run.place.n_words:.0f} words"
    left = f"{run.step:>6}/{run.step + recipe.left(run.place)}"
    print(f"{left} {pace:.3f} s/step  {place}  {numbers}", flush=True)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(train, as_positional=False)
    except TvInterpError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
