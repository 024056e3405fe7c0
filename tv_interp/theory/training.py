"""Training: one optimiser for losses of sampled prompts and for losses in closed form.

A run optimises a few named tensors; a function turns them into a model. So which weights are free
is said in one place: all of V and Q (`train_one_layer`), all of D (`train_positions`,
`train_population`), A to D of any number of layers (`train_weights`), or the members of S_P
(`train_family`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TrainingError, TvInterpError
from .closed_forms import dropout_risk, frame_rate, mixing_moments, one_step_rate
from .families import make_positions
from .linear import (
    Dropout,
    Layer,
    Layout,
    LinearTransformer,
    Tasks,
    prompt_losses,
    scalar_layer,
)

Parameters = dict[str, Tensor]
Build = Callable[[Mapping[str, Tensor]], LinearTransformer]


@dataclass(frozen=True)
class Schedule:
    """Adam with betas (.9, .99): warm-up, constant, then a cosine to 0.

    Attributes:
        steps: Updates.
        rate: Learning rate.
        batch: Prompts of a batch; losses in closed form have none.
        clip: Largest norm of the gradient. Losses have heavy tails: a small clip steadies training
            and moves its end away from the critical point.
        warm_up: Updates until the full rate.
        constant: Share of the updates before the rate falls.
        penalty: Times the sum of squares of the penalised tensors, added to the loss.
    """

    steps: int = 2500
    rate: float = 2e-2
    batch: int = 256
    clip: float = 1.0
    warm_up: int = 100
    constant: float = 0.3
    penalty: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a run without updates or prompts."""
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise TvInterpError(f"expected {name} of 1 or more, got {getattr(self, name)}")

    def rate_at(self, step: int) -> float:
        """Compute the learning rate of an update, counted from 0."""
        start = self.constant * self.steps
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        if step < start:
            return self.rate
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - start) / (self.steps - start)))


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: The model.
        parameters: What was optimised.
        losses: Loss of each update, penalty included.
    """

    model: LinearTransformer
    parameters: Parameters
    losses: tuple[float, ...] = field(repr=False)


def minimise(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    penalised: tuple[str, ...] = (),
    progress: Callable[[int], object] | None = None,
) -> tuple[float, ...]:
    """Minimise a loss in place.

    Args:
        loss: Computes the loss of the tensors as they are.
        parameters: Tensors that require gradients; they are changed.
        schedule: How.
        penalised: Names of the tensors that the schedule's penalty falls on.
        progress: Called with the number of updates made, every hundred.

    Returns:
        The loss at each update.

    Raises:
        TrainingError: if the loss or its gradient is not finite any more: with the step and the
            last finite loss.
    """
    tensors = list(parameters.values())
    optimiser = torch.optim.Adam(tensors, lr=schedule.rate, betas=(0.9, 0.99))
    losses: list[float] = []
    for step in range(schedule.steps):
        optimiser.param_groups[0]["lr"] = schedule.rate_at(step)
        optimiser.zero_grad()
        value = loss()
        if penalised and schedule.penalty:
            squares = torch.stack([parameters[name].square().sum() for name in penalised])
            value = value + schedule.penalty * squares.sum()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(tensors, schedule.clip)
        if not (math.isfinite(float(value.detach())) and math.isfinite(float(norm))):
            last = f"{losses[-1]:.6g}" if losses else "none"
            raise TrainingError(
                f"training diverged at step {step}; the last finite loss was {last}: lower the "
                f"learning rate {schedule.rate:g} or the initial scale"
            )
        optimiser.step()
        losses.append(float(value.detach()))
        if progress is not None and step % 100 == 99:
            progress(step + 1)
    return tuple(losses)


def train_sampled(
    build: Build,
    parameters: Parameters,
    schedule: Schedule,
    *,
    seed: int,
    tasks: Tasks = "identity",
    dropout: Dropout | None = None,
    penalised: tuple[str, ...] = (),
    progress: Callable[[int], object] | None = None,
) -> Trained:
    """Train on prompts drawn afresh for each update.

    Args:
        build: Turns the parameters into a model.
        parameters: Initial values; they are changed.
        schedule: How.
        seed: Decides prompts and dropped tokens.
        tasks: See `linear.prompt_losses`.
        dropout: Tokens dropped while training.
        penalised: Names of the parameters that the penalty falls on.
        progress: See `minimise`.

    Raises:
        TrainingError: if training diverges.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in parameters.values():
        tensor.requires_grad_(True)

    def loss() -> Tensor:
        model = build(parameters)
        losses = prompt_losses(model, schedule.batch, generator, tasks=tasks, dropout=dropout)
        return losses.mean()

    losses = minimise(loss, parameters, schedule, penalised=penalised, progress=progress)
    final = {name: tensor.detach() for name, tensor in parameters.items()}
    return Trained(build(final).map(torch.Tensor.detach), final, losses)


def train_one_layer(
    n: int,
    d: int,
    schedule: Schedule,
    *,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> Trained:
    """Train one layer on single prompts with every entry of V and Q free.

    Only the lower rows of V reach the prediction, and only the columns of Q that meet the query's
    upper half: the rest has no gradient, stays as it was drawn and is set to 0 in the model.

    Args:
        n: Demonstrations.
        d: Dimension of x.
        schedule: How.
        seed: Decides initial weights (standard deviation .1) and prompts.
        progress: See `minimise`.

    Raises:
        TrainingError: if training diverges.
    """
    layout = Layout("single", n)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, 2 * d, 2 * d, generator=generator, dtype=torch.float64) * 0.1
    parameters = {"v": draw[0].clone(), "q": draw[1].clone()}
    lower = torch.zeros(2 * d, 1, dtype=torch.float64)
    lower[d:] = 1

    def build(p: Mapping[str, Tensor]) -> LinearTransformer:
        return LinearTransformer(layout, (Layer(p["v"] * lower, p["q"] * (1 - lower).T),))

    return train_sampled(
        build, parameters, schedule, seed=seed + 1, tasks="gaussian", progress=progress
    )


def two_layers(
    layout: Layout, d: int, positions: Tensor, rate: Tensor | float
) -> LinearTransformer:
    """Build the model of the exact results: A = B = I and C = 0 first, then one step.

    Args:
        layout: Of the prompts.
        d: Dimension of x.
        positions: D of the first layer.
        rate: b c of the second.
    """
    first = scalar_layer(d, a=1.0, b=1.0, positions=positions)
    return LinearTransformer(layout, (first, scalar_layer(d, a=0.0, b=rate, c=1.0)))


def open_entries(layout: Layout) -> Float[Tensor, "source destination"]:
    """Mark the entries of a first layer's D that are trained: all but the query's x column.

    That column could serve as one more task vector under dropout, outside the predicted family.
    """
    open_ = torch.ones(layout.width, layout.width, dtype=torch.float64)
    open_[:, layout.query] = 0
    return open_


def train_positions(
    layout: Layout,
    d: int,
    schedule: Schedule,
    *,
    seed: int,
    start: float = 0.02,
    dropout: Dropout | None = None,
    progress: Callable[[int], object] | None = None,
) -> Trained:
    """Train all of D in the first of two layers, and the rate of the second, on sampled prompts.

    Args:
        layout: Pairs or triplets.
        d: Dimension of x.
        schedule: How; its penalty falls on D / n.
        seed: Decides the initial D and the prompts.
        start: Standard deviation of the initial D / n.
        dropout: Tokens dropped while training.
        progress: See `minimise`.

    Raises:
        TrainingError: if training diverges.
    """
    n = layout.n
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(layout.width, layout.width, generator=generator, dtype=torch.float64)
    mask = open_entries(layout)
    parameters = {
        "positions": _with_copy(start * draw * mask, layout),
        "rate": torch.tensor(start_rate(layout, d, dropout), dtype=torch.float64),
    }

    def build(p: Mapping[str, Tensor]) -> LinearTransformer:
        return two_layers(layout, d, n * p["positions"] * mask, p["rate"])

    return train_sampled(
        build,
        parameters,
        schedule,
        seed=seed + 1,
        dropout=dropout,
        penalised=("positions",),
        progress=progress,
    )


def start_rate(layout: Layout, d: int, dropout: Dropout | None) -> float:
    """Compute the rate at which D of the optimum has entries of about 1, times n.

    With dropout the tokens are a tight frame; without, a demonstration's own x and y are enough.
    """
    keep = 1.0 if dropout is None else dropout.keep
    tokens = layout.n if keep == 1 else len(layout.slots)
    return frame_rate(layout.n, d, keep, tokens)


def mix(
    layout: Layout, x: Float[Tensor, "demo slot"], y: Float[Tensor, "demo slot"]
) -> tuple[Float[Tensor, "demo slot"], Float[Tensor, "demo slot"]]:
    """Add what stands at the tokens already to what a first layer writes there.

    Args:
        layout: Pairs or triplets.
        x: D / n from the demonstrations' x to the layout's slots.
        y: D / n from their y.

    Returns:
        Coefficients of X and of Y at each slot before the second layer.
    """
    own_x = (layout.x[:, None] == layout.slots).double()
    own_y = (layout.y[:, None] == layout.slots).double()
    return own_x + x, own_y + y


def mix_of(model: LinearTransformer) -> tuple[Tensor, Tensor]:
    """Read `mix` from a model of `two_layers`."""
    layout, positions = model.layout, model.layers[0].d
    assert positions is not None
    x = positions[layout.x[:, None], layout.slots] / layout.n
    y = positions[layout.y[:, None], layout.slots] / layout.n
    return mix(layout, x, y)


def train_population(
    layout: Layout,
    d: int,
    schedule: Schedule,
    *,
    seed: int,
    start: float = 0.02,
    dropout: Dropout | None = None,
    progress: Callable[[int], object] | None = None,
) -> Trained:
    """Train as `train_positions`, on the expected loss itself instead of samples of it.

    The loss is `closed_forms.dropout_risk` at the rate of `start_rate`, since the rate and the
    scale of D stand for each other. Entries of D that copy demonstrations to the end token, or the
    query's x anywhere else than to the end, are 0 here.

    Args:
        layout: Pairs or triplets.
        d: Dimension of x.
        schedule: How; its penalty falls on D / n.
        seed: Decides the initial D.
        start: Standard deviation of the initial D / n.
        dropout: Tokens dropped; None drops nothing.
        progress: See `minimise`.

    Raises:
        TrainingError: if training diverges.
    """
    n = layout.n
    dropped = dropout or Dropout(1.0)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, n, len(layout.slots), generator=generator, dtype=torch.float64) * start
    parameters = {"x": draw[0].clone(), "y": draw[1].clone()}
    for tensor in parameters.values():
        tensor.requires_grad_(True)

    rate = start_rate(layout, d, dropped)

    def loss() -> Tensor:
        x, y = mix(layout, parameters["x"], parameters["y"])
        return dropout_risk(mixing_moments(y, x, d, dropped), d, rate / n)

    losses = minimise(loss, parameters, schedule, penalised=("x", "y"), progress=progress)
    final = {name: tensor.detach() for name, tensor in parameters.items()}
    positions = torch.zeros(layout.width, layout.width, dtype=torch.float64)
    positions[layout.x[:, None], layout.slots] = n * final["x"]
    positions[layout.y[:, None], layout.slots] = n * final["y"]
    positions[layout.query, layout.end] = n
    return Trained(two_layers(layout, d, positions, rate), final, losses)


def train_weights(
    layout: Layout,
    n_layers: int,
    d: int,
    schedule: Schedule,
    *,
    seed: int,
    weights: Literal["scalars", "matrices"] = "scalars",
    start: float = 0.1,
    progress: Callable[[int], object] | None = None,
) -> Trained:
    """Train A, B, C and D of every layer, the paper's own set-up.

    Args:
        layout: Any format; a single prompt has no D.
        n_layers: Layers.
        d: Dimension of x.
        schedule: How; its penalty falls on D / n.
        seed: Decides initial weights and prompts.
        weights: Whether A, B and C are multiples of the identity or free d by d matrices.
        start: Standard deviation of the initial D / n.
        progress: See `minimise`.

    Raises:
        TvInterpError: if there are no layers.
        TrainingError: if training diverges.
    """
    if n_layers < 1:
        raise TvInterpError(f"expected L of 1 layer or more, got {n_layers}")
    n, width = layout.n, layout.width
    generator = torch.Generator().manual_seed(seed)
    side = 1 if weights == "scalars" else d
    noise = 0.1 * torch.randn(3, n_layers, side, side, generator=generator, dtype=torch.float64)
    centre = torch.tensor([0.5, 0.5, -0.5], dtype=torch.float64)
    parameters = dict(
        zip("abc", noise + centre[:, None, None, None] * torch.eye(side), strict=True)
    )
    if layout.kind != "single":
        parameters["positions"] = start * torch.randn(
            n_layers, width, width, generator=generator, dtype=torch.float64
        )

    def build(p: Mapping[str, Tensor]) -> LinearTransformer:
        eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        a, b, c = ((p[name] * eye if side == 1 else p[name]) for name in "abc")
        return LinearTransformer(
            layout,
            tuple(
                Layer(
                    torch.block_diag(a[i], b[i]),
                    torch.block_diag(c[i], zero),
                    n * p["positions"][i] if "positions" in p else None,
                )
                for i in range(n_layers)
            ),
        )

    return train_sampled(
        build,
        parameters,
        schedule,
        seed=seed + 1,
        tasks="identity" if side == 1 else "gaussian",
        penalised=("positions",) if "positions" in parameters else (),
        progress=progress,
    )


def train_family(
    layout: Layout,
    d: int,
    schedule: Schedule,
    *,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> Trained:
    """Train two layers inside the sets of Theorems 1 and 2, C of the first included.

    Args:
        layout: Pairs or triplets.
        d: Dimension of x.
        schedule: How; no penalty.
        seed: Decides initial weights and prompts.
        progress: See `minimise`.

    Raises:
        TrainingError: if training diverges.
    """
    n = layout.n
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    one = torch.ones((), dtype=torch.float64)
    k = layout.stride
    query = draw(k, k)
    query[0, -1] += 1
    parameters = {
        "a": 0.5 * one, "b": 0.5 * one, "c": -0.1 * one,
        "rate": one_step_rate(n, d) * one, "demo": draw(k, k), "query": query,
    }  # fmt: skip
    if layout.kind == "triplet":
        parameters |= {"arrows": draw(n + 1, n + 1), "alpha": torch.ones(2, dtype=torch.float64)}

    def build(p: Mapping[str, Tensor]) -> LinearTransformer:
        arrows = {} if "arrows" not in p else {"arrows": p["arrows"], "alpha": tuple(p["alpha"])}
        first = n * make_positions(layout, demo=p["demo"], query=p["query"], **arrows)
        return LinearTransformer(
            layout,
            (
                scalar_layer(d, a=p["a"], b=p["b"], c=p["c"], positions=first),
                scalar_layer(d, a=0.0, b=p["rate"], c=1.0),
            ),
        )

    return train_sampled(build, parameters, schedule, seed=seed + 1, progress=progress)


def _with_copy(positions: Tensor, layout: Layout) -> Tensor:
    """Start with the query's x copied to the end, which fixes the sign of all that follows."""
    positions = positions.clone()
    positions[layout.query, layout.end] += 1
    return positions
