"""Metrics: from logits at the last token to one number a prompt, with unit and chance level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ScoreError, unknown
from ..prompts import Prompts


@dataclass(frozen=True, eq=False)
class Targets:
    """What a metric compares logits with, prompt by prompt.

    Attributes:
        answer: Right first token.
        foil: Wrong first token.
        labels: First tokens of the demonstrations' answers, of answer and foil.
        reference: Log-probabilities of the clean run, for ``kl``; None where it is not needed.
    """

    answer: Int[Tensor, " prompt"]
    foil: Int[Tensor, " prompt"]
    labels: Int[Tensor, "prompt label"]
    reference: Float[Tensor, "prompt vocab"] | None = None

    @classmethod
    def of(cls, prompts: Prompts, clean_logits: Tensor | None = None) -> Targets:
        """Take the targets of prompts, and of their clean run where ``kl`` is wanted."""
        labels = [prompts.answer[:, None], prompts.foil[:, None]]
        if prompts.n_demos:
            first = prompts.spans("answer")[..., 0]
            labels.append(prompts.tokens.gather(1, first))
        reference = None if clean_logits is None else clean_logits.log_softmax(-1)
        return cls(prompts.answer, prompts.foil, torch.cat(labels, 1), reference)


Compute = Callable[[Tensor, Tensor, Targets], Tensor]
Pair = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """A number read off the logits where the answer is predicted.

    Attributes:
        name: Name that users write.
        unit: Unit of the number and of differences of it.
        compute: From logits ``[row, vocab]``, prompt numbers ``[row]`` and targets to ``[row]``.
        chance: Its value where the answer is not known; None where it has no such level.
        pair: For a metric that only reads the logits of answer and foil: from these two, ``[row]``
            each, to ``[row]``. Then no more than they need be unembedded.
    """

    name: str
    unit: str
    compute: Compute
    chance: Callable[[int], float | None]
    pair: Pair | None = None

    @classmethod
    def of_pair(cls, name: str, unit: str, pair: Pair, chance: float) -> Metric:
        """Make a metric of the logits of answer and foil."""

        def compute(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
            return pair(_pick(logits, targets.answer[rows]), _pick(logits, targets.foil[rows]))

        return cls(name, unit, compute, lambda vocab: chance, pair)

    def readout(self, targets: Targets) -> Readout:
        """Fix the targets, to be called with logits and prompt numbers.

        Raises:
            ScoreError: if the metric needs a clean run and the targets have none.
        """
        if self.name == "kl" and targets.reference is None:
            raise ScoreError("metric 'kl' compares with a clean run, and this analysis has none")
        return Readout(self, targets)


@dataclass(frozen=True)
class Readout:
    """A metric on given prompts: from logits and prompt numbers to one number each, on the CPU.

    Attributes:
        metric: The metric.
        targets: What it compares with.
    """

    metric: Metric
    targets: Targets

    def __call__(
        self, logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """Read the logits of the whole vocabulary."""
        return self.metric.compute(_precise(logits), rows, self.targets)

    @property
    def tokens(self) -> Int[Tensor, "prompt 2"] | None:
        """The two tokens whose logits are all that the metric reads; None where it reads more."""
        if self.metric.pair is None:
            return None
        return torch.stack([self.targets.answer, self.targets.foil], 1)

    def of_tokens(self, logits: Float[Tensor, "row 2"]) -> Float[Tensor, " row"]:
        """Read the logits of `tokens`."""
        assert self.metric.pair is not None
        return self.metric.pair(*_precise(logits).unbind(1))


@dataclass(frozen=True)
class Readouts:
    """Several metrics on the same prompts, read off the same logits in one go.

    Attributes:
        each: The metrics' readouts, with equal targets.
    """

    each: tuple[Readout, ...]

    @classmethod
    def of(cls, metrics: Sequence[Metric], targets: Targets) -> Readouts:
        """Fix the targets of every metric; see `Metric.readout`."""
        return cls(tuple(metric.readout(targets) for metric in metrics))

    def __call__(
        self, logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "row metric"]:
        """Read the logits of the whole vocabulary."""
        return torch.stack([readout(logits, rows) for readout in self.each], -1)

    @property
    def tokens(self) -> Int[Tensor, "prompt 2"] | None:
        """The two tokens whose logits are all that any of them reads; None where one reads more."""
        if any(readout.tokens is None for readout in self.each):
            return None
        return self.each[0].tokens

    def of_tokens(self, logits: Float[Tensor, "row 2"]) -> Float[Tensor, "row metric"]:
        """Read the logits of `tokens`."""
        return torch.stack([readout.of_tokens(logits) for readout in self.each], -1)


def _precise(logits: Tensor) -> Tensor:
    logits = logits.cpu()
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _pick(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None])[:, 0]


def _difference(answer: Tensor, foil: Tensor) -> Tensor:
    return answer - foil


def _preference(answer: Tensor, foil: Tensor) -> Tensor:
    return (answer > foil).to(answer.dtype) + 0.5 * (answer == foil).to(answer.dtype)


def _log_prob(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return _pick(logits.log_softmax(-1), targets.answer[rows])


def _kl(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    assert targets.reference is not None
    reference = targets.reference[rows].to(logits.dtype)
    return -(reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)


def _accuracy(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return (logits.argmax(-1) == targets.answer[rows]).to(logits.dtype)


def _label_rate(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return (logits.argmax(-1)[:, None] == targets.labels[rows]).any(-1).to(logits.dtype)


def _rank(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return 1 + (logits > _pick(logits, targets.answer[rows])[:, None]).sum(-1).to(logits.dtype)


METRICS = {
    metric.name: metric
    for metric in (
        # Logit of the answer minus logit of the foil; linear in the residual stream.
        Metric.of_pair("logit_diff", "logits", _difference, 0.0),
        # Probability of the answer.
        Metric("prob", "probability", lambda *a: _log_prob(*a).exp(), lambda vocab: 1 / vocab),
        # Log-probability of the answer.
        Metric("log_prob", "nats", _log_prob, lambda vocab: -math.log(vocab)),
        # Minus the KL divergence from the clean run: 0 is the clean run (Zhang & Nanda 2309.16042).
        Metric("kl", "nats", _kl, lambda vocab: None),
        # 1 where the answer is the top token of the whole vocabulary.
        Metric("accuracy", "fraction", _accuracy, lambda vocab: 1 / vocab),
        # 1 where the answer beats the foil, 1/2 where they tie.
        Metric.of_pair("choice", "fraction", _preference, 0.5),
        # 1 where the top token is a label at all: one of the prompt's answers, or the foil.
        Metric("label_rate", "fraction", _label_rate, lambda vocab: 0.0),
        # Rank of the answer; 1 is the top, so helping is negative.
        Metric("rank", "rank", _rank, lambda vocab: (vocab + 1) / 2),
    )
}


def get_metric(name: str | Metric) -> Metric:
    """Get a metric by name; a metric object is handed back.

    Raises:
        UnknownName: if there is no such metric; the message has the nearest names.
    """
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]
