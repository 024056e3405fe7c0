"""Metrics: from logits at the last token to one number a prompt, with unit and chance level."""

from __future__ import annotations

import math
from collections.abc import Callable
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


@dataclass(frozen=True)
class Metric:
    """A number read off the logits where the answer is predicted.

    Attributes:
        name: Name that users write.
        unit: Unit of the number and of differences of it.
        compute: From logits ``[row, vocab]``, prompt numbers ``[row]`` and targets to ``[row]``.
        chance: Its value where the answer is not known; None where it has no such level.
    """

    name: str
    unit: str
    compute: Compute
    chance: Callable[[int], float | None]

    def readout(self, targets: Targets) -> Callable[[Tensor, Tensor], Tensor]:
        """Fix the targets, to be called with logits and prompt numbers.

        Raises:
            ScoreError: if the metric needs a clean run and the targets have none.
        """
        if self.name == "kl" and targets.reference is None:
            raise ScoreError("metric 'kl' compares with a clean run, and this analysis has none")

        def read(logits: Tensor, rows: Tensor) -> Tensor:
            logits = logits.cpu()
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            return self.compute(logits, rows, targets)

        return read


def _pick(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None])[:, 0]


def _logit_diff(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return _pick(logits, targets.answer[rows]) - _pick(logits, targets.foil[rows])


def _log_prob(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return _pick(logits.log_softmax(-1), targets.answer[rows])


def _kl(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    assert targets.reference is not None
    reference = targets.reference[rows].to(logits.dtype)
    return -(reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)


def _accuracy(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return (logits.argmax(-1) == targets.answer[rows]).to(logits.dtype)


def _choice(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    difference = _logit_diff(logits, rows, targets)
    return (difference > 0).to(logits.dtype) + 0.5 * (difference == 0).to(logits.dtype)


def _label_rate(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return (logits.argmax(-1)[:, None] == targets.labels[rows]).any(-1).to(logits.dtype)


def _rank(logits: Tensor, rows: Tensor, targets: Targets) -> Tensor:
    return 1 + (logits > _pick(logits, targets.answer[rows])[:, None]).sum(-1).to(logits.dtype)


METRICS = {
    metric.name: metric
    for metric in (
        # Logit of the answer minus logit of the foil; linear in the residual stream.
        Metric("logit_diff", "logits", _logit_diff, lambda vocab: 0.0),
        # Probability of the answer.
        Metric("prob", "probability", lambda *a: _log_prob(*a).exp(), lambda vocab: 1 / vocab),
        # Log-probability of the answer.
        Metric("log_prob", "nats", _log_prob, lambda vocab: -math.log(vocab)),
        # Minus the KL divergence from the clean run: 0 is the clean run (Zhang & Nanda 2309.16042).
        Metric("kl", "nats", _kl, lambda vocab: None),
        # 1 where the answer is the top token of the whole vocabulary.
        Metric("accuracy", "fraction", _accuracy, lambda vocab: 1 / vocab),
        # 1 where the answer beats the foil, 1/2 where they tie.
        Metric("choice", "fraction", _choice, lambda vocab: 0.5),
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
