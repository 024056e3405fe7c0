"""Make prompts from tasks, and pairs of clean and corrupted prompts that differ in words alone."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..display import Shown, Tokens, as_text, readable
from ..errors import PromptError, check_seed
from .corruptions import Words, check_corruption, corrupt_words, draw_answers
from .roles import (
    DEMO_ROLES,
    ROLE_NAMES,
    Misaligned,
    Role,
    Template,
    assign_roles,
    check_tokenizer,
    parse_role,
)
from .tasks import RuledSample, Sample, Task, get_task
from .tasks.base import pick_foil
from .tasks.registry import unrelated_answers

DEFAULT_TEMPLATE = "{x} is {y}\n"
MOST_WORDS = 10
"""That a message names."""


@dataclass(frozen=True, eq=False)
class Prompts(Shown):
    """Prompts of one task in which every token knows its role.

    Attributes:
        samples: The words of each prompt.
        tokens: Token ids, right-padded in storage only: what models see comes from `buckets`.
        lengths: Number of tokens of each prompt.
        role_ids: `Role` of each token; -1 where padded.
        demo_ids: Demonstration of each token; -1 outside of demonstrations.
        answer: First token of the right answer, as it stands after the connective.
        foil: First token of a wrong answer.
        texts: The prompts as text, without BOS.
        task: Where the words come from.
        template: Template text.
        seed: Seed the words were drawn with.
        tokenizer: The tokenizer.
        prepend_bos: Whether each prompt starts with one BOS.
        n_ctx: Context length of the model they were made for.
        dropped: What was left out, as reason to count.
    """

    samples: tuple[Sample, ...]
    tokens: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    role_ids: Int[Tensor, "prompt pos"]
    demo_ids: Int[Tensor, "prompt pos"]
    answer: Int[Tensor, " prompt"]
    foil: Int[Tensor, " prompt"]
    texts: tuple[str, ...]
    task: Task
    template: str
    seed: int
    tokenizer: Any
    prepend_bos: bool
    n_ctx: int
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.samples)

    @property
    def n_demos(self) -> int:
        """Number of demonstrations of each prompt."""
        return len(self.samples[0].demos)

    @property
    def demos(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """The demonstrations of each prompt as (input, answer)."""
        return tuple(tuple(sample.demos) for sample in self.samples)

    @property
    def query(self) -> tuple[str, ...]:
        """The query of each prompt."""
        return tuple(sample.query for sample in self.samples)

    @property
    def provenance(self) -> dict[str, Any]:
        """What these prompts were made from, as plain values."""
        return {
            "task": self.task.name,
            "family": self.task.family,
            "template": self.template,
            "n_prompts": len(self),
            "n_demos": self.n_demos,
            "seed": self.seed,
            "dropped": dict(self.dropped),
        }

    def mask(self, role: str) -> Bool[Tensor, "prompt pos"]:
        """Mark every token of a role.

        Raises:
            UnknownName: if there is no such role.
        """
        return self.role_ids == parse_role(role)

    def spans(self, role: str) -> Int[Tensor, "prompt *demo end"]:
        """Get first and last token (inclusive) of a role's span.

        Returns:
            ``[prompt, demo, 2]`` for roles of demonstrations, ``[prompt, 2]`` for bos, query_x and
            query_is.

        Raises:
            UnknownName: if there is no such role.
            PromptError: if the prompts have no such tokens, or for ``other``, which has many spans.
        """
        wanted = parse_role(role)
        if wanted == Role.other:
            raise PromptError("role 'other' has no one span in a prompt: use mask('other')")
        mask = self.mask(role)
        if wanted in DEMO_ROLES:
            index = torch.arange(self.n_demos)
            each = mask[:, None] & (self.demo_ids[:, None] == index[:, None])
        else:
            each = mask[:, None]
        if each.shape[1] == 0 or not each.any(-1).all():
            have = [ROLE_NAMES[r] for r in sorted(set(self.role_ids.flatten().tolist())) if r >= 0]
            raise PromptError(
                f"not every prompt has a {wanted.label!r} token in each demonstration (template "
                f"{self.template!r}, {self.n_demos} demonstrations): roles here are {have}"
            )
        first = each.int().argmax(-1)
        last = each.shape[-1] - 1 - each.int().flip(-1).argmax(-1)
        ends = torch.stack([first, last], -1)
        return ends if wanted in DEMO_ROLES else ends[:, 0]

    def positions(self, role: str) -> Int[Tensor, "prompt *demo"]:
        """Get the last token of a role's span, ``[prompt, demo]`` or ``[prompt]``; see `spans`."""
        return self.spans(role)[..., 1]

    def buckets(self) -> Iterator[tuple[Int[Tensor, " row"], Int[Tensor, "row pos"]]]:
        """Go through the prompts by length: row numbers and their tokens, with no padding."""
        for length in self.lengths.unique().tolist():
            rows = (self.lengths == length).nonzero()[:, 0]
            yield rows, self.tokens[rows, :length]

    def select(self, rows: Sequence[int] | Tensor) -> Prompts:
        """Keep some prompts, in the order given: row numbers, or a boolean mask over all rows.

        Raises:
            PromptError: if none is selected, or a row does not exist.
        """
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool and len(index) == len(self):
            index = index.nonzero()[:, 0]
        if len(index) == 0:
            raise PromptError("empty selection: expected at least one prompt")
        wrong = index[(index < -len(self)) | (index >= len(self))]
        if len(wrong) or index.is_floating_point() or index.dtype == torch.bool:
            got = f"row {wrong[0]}" if len(wrong) else f"{len(index)} values of {index.dtype}"
            raise PromptError(
                f"expected rows of 0 to {len(self) - 1}, got {got}: pass row numbers, or a boolean "
                "mask over all rows"
            )
        fields = ("tokens", "lengths", "role_ids", "demo_ids", "answer", "foil")
        return replace(
            self,
            samples=tuple(self.samples[i] for i in index),
            texts=tuple(self.texts[i] for i in index),
            **{name: getattr(self, name)[index] for name in fields},
        )

    def with_samples(self, samples: Sequence[Sample]) -> Prompts:
        """Write other words with the same template and tokenizer, prompt by prompt.

        Args:
            samples: The words of each prompt, in the order of the rows they stand for.

        Raises:
            PromptError: if one of them cannot be cut at its roles, so that rows would not match.
        """
        made, kept = _assemble(samples, replace(self, dropped={}))
        if len(kept) < len(samples):
            lost = next(i for i in range(len(samples)) if i not in set(kept))
            raise PromptError(
                f"{len(samples) - len(kept)} of {len(samples)} prompts cannot be built, first "
                f"number {lost}: {_reasons(made.dropped)}; leave them out with select(...)"
            )
        return replace(made, dropped=self.dropped)

    def zero_shot(self) -> Prompts:
        """Take the demonstrations away: the queries alone, with the same answers and foils.

        Raises:
            PromptError: as `with_samples`.
        """
        return self.keep_demos([])

    def keep_demos(self, which: Sequence[int]) -> Prompts:
        """Keep some demonstrations of each prompt, in the order given.

        Args:
            which: Numbers of demonstrations, from 0.

        Raises:
            PromptError: if there is no such demonstration, or as `with_samples`.
        """
        wrong = [i for i in which if not 0 <= i < self.n_demos]
        if wrong:
            raise PromptError(
                f"demonstration {wrong[0]} does not exist: these prompts have {self.n_demos}, "
                "counted from 0"
            )
        return self.with_samples(
            [_rewrite(sample, demos=[sample.demos[i] for i in which]) for sample in self.samples]
        )

    def other_query(self, *, seed: int = 1) -> Prompts:
        """Ask something else behind the same demonstrations.

        Unlike the corruption ``query``, answer and foil are those of the new query, which may be of
        another length.

        Args:
            seed: Decides the queries; each prompt has a generator of its own.

        Raises:
            PromptError: if the task does not know its other inputs, or a prompt has no other query.
        """
        check_seed(seed)
        waiting = {}
        for row, sample in enumerate(self.samples):
            rule = getattr(sample, "rule", None)
            if rule is None or not hasattr(self.task, "other_queries"):
                raise PromptError(
                    f"the samples of task {self.task.name!r} carry no rule, so the answer to "
                    "another query is not known: use a task made by Task.from_pairs, or a subclass "
                    "of Task whose sample() returns a RuledSample"
                )
            rng = np.random.default_rng([seed, row])
            waiting[row] = (rng, self.task.other_queries(rng, sample))
        found: dict[int, Sample] = {}
        while waiting:
            tried = {}
            for row, (rng, queries) in waiting.items():
                query = next(queries, None)
                if query is None:
                    raise PromptError(
                        f"prompt {row} of task {self.task.name!r} has no other query that can be "
                        "built: leave it out with select(...)"
                    )
                tried[row] = self._requery(self.samples[row], query, rng)
            rows = list(tried)
            _, kept = _assemble([tried[row] for row in rows], self, Counter())
            for i in kept:
                found[rows[i]] = tried[rows[i]]
                del waiting[rows[i]]
        return self.with_samples([found[row] for row in range(len(self))])

    def _requery(self, sample: Any, query: str, rng: np.random.Generator) -> Sample:
        answer = sample.rule(query)
        if self.task.family == "categorization":
            foil = sample.foil if answer == sample.answer else sample.answer
        else:
            shown = [y for _, y in sample.demos]
            foil = pick_foil(rng, answer, shown, getattr(self.task, "answers", ()))
        return _rewrite(sample, query=query, answer=answer, foil=foil)

    def corrupt(self, kind: str, *, seed: int = 1, other: str | Task | None = None) -> Contrast:
        """Make the corrupted twin of each prompt: same lengths, same roles, other words.

        Args:
            kind: ``task``, ``random_answers``, ``labels``, ``answers``, ``inputs`` or ``query``.
            seed: Decides what is drawn; each prompt has a generator of its own.
            other: The other relation for ``task``; None for the task's declared partner.

        Returns:
            The pairs; prompts that cannot be aligned leave both sides and are counted in
            ``corrupted.dropped``.

        Raises:
            UnknownName: if there is no such corruption or other task.
            PromptError: if the task cannot have this corruption, or no prompt could be aligned.
        """
        if other is None and kind == "task" and getattr(self.task, "partner", None):
            other = self.task.partner
        other = get_task(other) if other is not None else None
        check_corruption(kind, self.task, other)
        if kind != "query" and self.n_demos == 0:
            raise PromptError(
                f"corruption {kind!r} changes demonstrations, and there are none: make prompts "
                "with n_demos of 1 or more"
            )
        return self._twins(
            kind, seed, lambda words, rng: corrupt_words(kind, words, rng, self.task, other)
        )

    def dummies(self, *, seed: int = 1, pool: Sequence[str] = ()) -> Contrast:
        """Make the dummy prompts that vectors are put into: the same inputs, answers at random.

        Where the task is a shipped relation, answers are drawn from those of the other shipped
        relations: drawn from its own (the corruption ``random_answers``) they still tell it. For
        all other tasks this is ``random_answers``: categorization draws from its two labels.

        Args:
            seed: Decides what is drawn.
            pool: Answers to draw from instead.

        Raises:
            PromptError: as `corrupt`.
        """
        pool = pool or unrelated_answers(self.task)
        if not pool:
            return self.corrupt("random_answers", seed=seed)
        return self._twins("unrelated", seed, lambda words, rng: draw_answers(words, rng, pool))

    def _twins(
        self, kind: str, seed: int, make: Callable[[Words, np.random.Generator], Sample]
    ) -> Contrast:
        check_seed(seed)
        dropped: Counter[str] = Counter()
        kept, samples = [], []
        for row in range(len(self)):
            rng = np.random.default_rng([seed, row])
            try:
                samples.append(make(self._words(row), rng))
                kept.append(row)
            except Misaligned as reason:
                dropped[str(reason)] += 1
        corrupted, rows = _assemble(samples, replace(self, seed=seed), dropped)
        kept = [kept[row] for row in rows]
        ours = zip(self.role_ids[kept], self.lengths[kept], strict=True)
        theirs = zip(corrupted.role_ids, corrupted.lengths, strict=True)
        same = torch.tensor(
            [torch.equal(a[:n], b[:m]) for (a, n), (b, m) in zip(ours, theirs, strict=True)],
            dtype=torch.bool,
        )
        if not same.all():
            corrupted.dropped["corrupted words split into other tokens"] = int((~same).sum())  # type: ignore[index]
        if not same.any():
            raise PromptError(
                f"corruption {kind!r} fits none of {len(self)} prompts of {self.task.name!r}: "
                f"{_reasons(corrupted.dropped)}; use another corruption"
            )
        index = same.nonzero()[:, 0]
        corrupted = corrupted.select(index)
        clean = self.select([kept[i] for i in index])
        clean = replace(
            clean,
            answer=corrupted.answer,
            foil=corrupted.foil,
            samples=tuple(
                _rewrite(sample, foil=twin.foil)
                for sample, twin in zip(clean.samples, corrupted.samples, strict=True)
            ),
        )
        return Contrast(clean, corrupted, kind)

    def show(self, i: int = 0, width: int = 80) -> str:
        """Write one prompt as its tokens above their roles, in lines of at most ``width``.

        Raises:
            PromptError: if there is no such prompt.
        """
        self.select([i])  # refuses a row that is not there
        return as_text([self.labelled(i)], width)

    def pieces(self, i: int = 0) -> list[str]:
        """Get the text of each token of one prompt, so that nothing of it is invisible.

        A space in front is a dot and a line break an arrow; a token that is a part of a character
        is written as its tokenizer writes it.
        """
        ids = self.tokens[i, : self.lengths[i]].tolist()
        raw = self.tokenizer.convert_ids_to_tokens(ids)
        out = []
        for token, fallback in zip(ids, raw, strict=True):
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if not text or "\ufffd" in text:
                text = str(fallback)
            word = text.lstrip(" ")
            out.append(readable("·" * (len(text) - len(word)) + word))
        return out

    def roles_of(self, i: int = 0) -> list[str]:
        """Get the role of each token of one prompt: ``bos``, ``x[0]``, ``is[0]``, ``answer[0]``."""
        roles, demos = self.role_ids[i].tolist(), self.demo_ids[i].tolist()
        return [
            ROLE_NAMES[role] + (f"[{demo}]" if demo >= 0 else "")
            for role, demo in zip(roles, demos, strict=True)
        ][: int(self.lengths[i])]

    def labelled(self, i: int = 0, title: str = "") -> Tokens:
        """Put the tokens of one prompt above their roles, to be shown; see `show`."""
        labels = self.roles_of(i)
        roles = [label.split("[")[0] for label in labels]
        return Tokens(tuple(zip(self.pieces(i), roles, labels, strict=True)), title)

    def _blocks(self) -> Iterator[str | Tokens]:
        task, sample = self.task, self.samples[0]
        yield (
            f"{len(self)} prompts of {task.name} ({task.family}), {self.n_demos} demonstrations, "
            f"template {self.template!r}, seed {self.seed}"
            + (f"; left out: {_reasons(self.dropped)}" if self.dropped else "")
        )
        title = f"the first; right answer {readable(sample.answer)}, foil {readable(sample.foil)}"
        yield self.labelled(0, title)

    def __str__(self) -> str:
        """What it is made of, and the first prompt."""
        return as_text(self._blocks())

    def __repr__(self) -> str:
        """Task, number, and the first prompt."""
        first = textwrap.shorten(self.texts[0], 60, placeholder=" ...")
        return f"Prompts({self.task.name!r}, {len(self)} x {self.n_demos} demos: {first!r})"

    @cached_property
    def _lengths_of(self) -> dict[tuple[str, str], int]:
        return {}

    def _n_tokens(self, word: str, role: str) -> int:
        """Count the tokens of a word where it stands in a prompt; 0 where it has none of its own.

        Args:
            word: Any word.
            role: ``"start"`` and ``"x"`` for an input at the start of a prompt and elsewhere,
                ``"answer"``, or ``"query_x"``.
        """
        if role == "query_x":
            role = "x" if self.n_demos else "start"
        key = (word, role)
        if key not in self._lengths_of:
            x, y = self.samples[0].query, self.samples[0].answer
            demos = {"start": [], "x": [(x, y)], "answer": [(x, word)]}[role]
            query = x if role == "answer" else word
            segments = Template.parse(self.template).render(demos, query)
            text = "".join(part for part, _, _ in segments)
            encoded = _encode(self.tokenizer, [text])
            try:
                roles, _ = assign_roles(text, segments, encoded["offset_mapping"][0])
            except Misaligned:
                roles = []
            wanted = Role.answer if role == "answer" else Role.query_x
            self._lengths_of[key] = roles.count(wanted)
        return self._lengths_of[key]

    def _words(self, row: int) -> Words:
        roles, demos = self.role_ids[row], self.demo_ids[row]

        def count(role: Role, demo: int) -> int:
            return int(((roles == role) & (demos == demo)).sum())

        each = range(self.n_demos)
        inputs = self.samples[row].demos
        return Words(
            self.samples[row],
            tuple((self._n_tokens(x, "start"), self._n_tokens(x, "x")) for x, _ in inputs),
            tuple(count(Role.answer, i) for i in each),
            count(Role.query_x, -1),
            self._n_tokens,
        )


def _rewrite(sample: Sample, **words: Any) -> Sample:
    """Replace some words of a sample and keep its rule, where it carries one."""
    fields: dict[str, Any] = dict(zip(Sample._fields, sample, strict=True)) | words
    if not isinstance(sample, RuledSample):
        return Sample(**fields)
    return RuledSample(**fields, rule=sample.rule, rule_name=sample.rule_name)


def _reasons(dropped: Mapping[str, int]) -> str:
    """Write the most frequent reasons with their counts."""
    return ", ".join(f"{reason} ({count})" for reason, count in Counter(dropped).most_common(4))


@dataclass(frozen=True, eq=False)
class Contrast(Shown):
    """Clean prompts and their corrupted twins: equal lengths and roles, row by row.

    The metric reads the same two tokens, ``answer`` and ``foil``, in both runs.
    """

    clean: Prompts
    corrupted: Prompts
    corruption: str

    def __post_init__(self) -> None:
        """Refuse twins that do not align."""
        check_aligned(self.clean, self.corrupted)

    @property
    def answer(self) -> Int[Tensor, " prompt"]:
        """First token of the clean answer."""
        return self.clean.answer

    @property
    def foil(self) -> Int[Tensor, " prompt"]:
        """First token of the wrong answer that this corruption argues for."""
        return self.clean.foil

    @property
    def provenance(self) -> dict[str, Any]:
        """What the pairs were made from, as plain values."""
        return {
            **self.clean.provenance,
            "corruption": self.corruption,
            "corruption_seed": self.corrupted.seed,
            "dropped_by_corruption": dict(self.corrupted.dropped),
        }

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.clean)

    def select(self, rows: Sequence[int] | Tensor) -> Contrast:
        """Keep some pairs, in the order given."""
        return Contrast(self.clean.select(rows), self.corrupted.select(rows), self.corruption)

    def _blocks(self) -> Iterator[str | Tokens]:
        clean, dropped = self.clean, self.corrupted.dropped
        yield (
            f"{len(self)} pairs of {clean.task.name}, {clean.n_demos} demonstrations, corruption "
            f"{self.corruption}" + (f"; left out: {_reasons(dropped)}" if dropped else "")
        )
        sample = clean.samples[0]
        yield clean.labelled(0, f"the first, clean: answer {readable(sample.answer)}")
        yield self.corrupted.labelled(0, f"the first, corrupted: foil {readable(sample.foil)}")

    def __str__(self) -> str:
        """What it is made of, and the first pair."""
        return as_text(self._blocks())

    def __repr__(self) -> str:
        """Task, corruption and number."""
        return f"Contrast({self.clean.task.name!r}, {self.corruption!r}, {len(self)} pairs)"


def check_prompts(value: Any) -> None:
    """Refuse what is not `Prompts`.

    Raises:
        PromptError: if it is something else.
    """
    if isinstance(value, Contrast):
        raise PromptError(
            "expected Prompts, got a Contrast, which has two of them: pass its .clean or .corrupted"
        )
    if not isinstance(value, Prompts):
        raise PromptError(
            f"expected Prompts, got {type(value).__name__}: make them with make_prompts(...)"
        )


def check_contrast(value: Any) -> None:
    """Refuse what is not a `Contrast`.

    Raises:
        PromptError: if it is something else.
    """
    if not isinstance(value, Contrast):
        raise PromptError(
            f"expected a Contrast, got {type(value).__name__}: make one with "
            'prompts.corrupt("random_answers")'
        )


def check_aligned(clean: Prompts, corrupted: Prompts) -> None:
    """Refuse prompts that differ in number, length or roles.

    Raises:
        PromptError: with the first prompt and token at which they differ.
    """
    if len(clean) != len(corrupted):
        raise PromptError(
            f"clean and corrupted are misaligned: {len(clean)} and {len(corrupted)} prompts; "
            "make the pair with prompts.corrupt(...)"
        )
    for row in range(len(clean)):
        n, m = int(clean.lengths[row]), int(corrupted.lengths[row])
        ours, theirs = clean.role_ids[row, :n], corrupted.role_ids[row, :m]
        if n != m or (ours != theirs).any():
            at = int((ours[: min(n, m)] != theirs[: min(n, m)]).int().argmax()) if n == m else None
            where = (
                f"have {n} and {m} tokens"
                if at is None
                else f"differ in role at token {at}: {ROLE_NAMES[ours[at]]!r} and "
                f"{ROLE_NAMES[theirs[at]]!r}"
            )
            raise PromptError(
                f"clean and corrupted are misaligned: at prompt {row} they {where}; make the pair "
                "with prompts.corrupt(...)"
            )


def make_prompts(
    model: Any,
    task: str | Task,
    *,
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    template: str | None = None,
    prepend_bos: bool | None = None,
) -> Prompts:
    r"""Make prompts of a task for a model.

    Args:
        model: A model; only its tokenizer, its context length and whether it wants BOS are read.
        task: A task or the name of a shipped one.
        n_demos: Demonstrations in each prompt.
        n_prompts: Number of prompts. What cannot be aligned is left out, counted in ``dropped``
            and replaced by further draws.
        seed: Decides the words.
        template: Text with ``{x}`` and ``{y}``; None for the model's own (``tv_template`` in its
            tokenizer_config.json), else ``"{x} is {y}\n"``.
        prepend_bos: Whether to start with BOS; None for what the model uses.

    Raises:
        UnknownName: if there is no such task.
        PromptError: for a template without ``{x}`` or ``{y}``, more demonstrations than the task
            has, a word that the tokenizer drops or does not know, or prompts longer than the
            model's context.

    Example:
        >>> model = load_model("reference")  # doctest: +SKIP
        >>> make_prompts(model, "country-capital", n_demos=2, n_prompts=1)  # doctest: +SKIP
    """
    if n_prompts < 1:
        raise PromptError(f"expected n_prompts of 1 or more, got {n_prompts}")
    check_seed(seed)
    task = get_task(task)
    if n_demos < 0:
        raise PromptError(f"expected n_demos of 0 or more, got {n_demos}")
    tokenizer: Any = getattr(model, "tokenizer", None)
    check_tokenizer(tokenizer)
    if template is None:
        template = str(tokenizer.init_kwargs.get("tv_template", DEFAULT_TEMPLATE))
    if prepend_bos is None:
        wanted = getattr(model.cfg, "default_prepend_bos", True)
        prepend_bos = bool(wanted) and tokenizer.bos_token_id is not None
    if prepend_bos and tokenizer.bos_token_id is None:
        raise PromptError("the tokenizer has no BOS token: pass prepend_bos=False")
    Template.parse(template)
    empty = Prompts(
        samples=(), tokens=_NONE, lengths=_NONE[0], role_ids=_NONE, demo_ids=_NONE,
        answer=_NONE[0], foil=_NONE[0], texts=(), task=task, template=template, seed=seed,
        tokenizer=tokenizer, prepend_bos=prepend_bos, n_ctx=model.cfg.n_ctx, dropped={},
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    good: list[Sample] = []
    dropped: Counter[str] = Counter()
    for _ in range(20):
        drawn = [_draw(task, rng, n_demos) for _ in range(n_prompts - len(good))]
        built, kept = _assemble(drawn, empty, dropped)
        longest = max(built.lengths.tolist(), default=0)
        if longest > empty.n_ctx:
            raise PromptError(
                f"a prompt has {longest} tokens and the model's context {empty.n_ctx}: "
                "use fewer demonstrations or a shorter template"
            )
        good += [drawn[i] for i in kept]
        if len(good) == n_prompts:
            return _assemble(good, replace(empty, dropped=dict(dropped)))[0]
    raise PromptError(
        f"only {len(good)} of {n_prompts} prompts of {task.name!r} could be built: left out "
        f"{_reasons(dropped)}; use another template or task"
    )


_NONE = torch.zeros(1, 0, dtype=torch.long)


def _draw(task: Task, rng: np.random.Generator, n_demos: int) -> Sample:
    """Draw a sample; any four values will do, and a sample that carries its rule keeps it."""
    drawn: Any = task.sample(rng, n_demos)
    if not isinstance(drawn, Sample):
        if not isinstance(drawn, Sequence) or len(drawn) != 4:
            raise PromptError(
                f"task {task.name!r} has to draw (demos, query, answer, foil), got {drawn!r}: "
                "return these four from sample()"
            )
        drawn = Sample(*drawn)
    if len(drawn.demos) != n_demos:
        raise PromptError(
            f"task {task.name!r} drew {len(drawn.demos)} demonstrations, expected {n_demos}: "
            "sample(rng, n_demos) has to return that many"
        )
    return drawn


def _assemble(
    samples: Sequence[Sample], like: Prompts, dropped: Counter[str] | None = None
) -> tuple[Prompts, list[int]]:
    """Tokenize samples with the settings of other prompts.

    Args:
        samples: The words.
        like: Prompts whose template, tokenizer and so on to use.
        dropped: Counts what is left out; None to count from what ``like`` had.

    Returns:
        The prompts, and which samples they are.
    """
    dropped = Counter(like.dropped) if dropped is None else dropped
    template = Template.parse(like.template)
    rendered = [template.render(list(s.demos), s.query) for s in samples]
    texts = ["".join(part for part, _, _ in segments) for segments in rendered]

    unknown = _unknown_id(like.tokenizer)
    if samples:
        plain = _encode(like.tokenizer, texts)
        _refuse_unknown(
            like.tokenizer,
            (
                text[start:end]
                for text, ids, offsets in zip(
                    texts, plain["input_ids"], plain["offset_mapping"], strict=True
                )
                for token, (start, end) in zip(ids, offsets, strict=True)
                if token == unknown
            ),
        )
        answers, foils = (
            _encode(
                like.tokenizer, [t + template.gap + w for t, w in zip(texts, words, strict=True)]
            )
            for words in ([s.answer for s in samples], [s.foil for s in samples])
        )
    rows: list[tuple] = []
    kept: list[int] = []
    lead = [like.tokenizer.bos_token_id] if like.prepend_bos else []
    for i in range(len(samples)):
        ids, offsets = plain["input_ids"][i], plain["offset_mapping"][i]
        start = len(texts[i]) + len(template.gap)
        try:
            roles, demos = assign_roles(texts[i], rendered[i], offsets)
            answer, foil = (
                _first_new(ids, longer["input_ids"][i], longer["offset_mapping"][i], start, word)
                for longer, word in ((answers, samples[i].answer), (foils, samples[i].foil))
            )
            if answer == foil:
                raise Misaligned("answer and foil share their first token")
        except Misaligned as reason:
            dropped[str(reason)] += 1
            continue
        said = {samples[i].answer: answer, samples[i].foil: foil}
        _refuse_unknown(like.tokenizer, (word for word, token in said.items() if token == unknown))
        roles = [Role.bos] * len(lead) + roles
        rows.append((lead + ids, roles, [-1] * len(lead) + demos, answer, foil))
        kept.append(i)
    width = max((len(row[0]) for row in rows), default=0)
    pad = like.tokenizer.pad_token_id or 0

    def stack(column: int, fill: int) -> Tensor:
        padded = [list(row[column]) + [fill] * (width - len(row[0])) for row in rows]
        return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)

    prompts = replace(
        like,
        samples=tuple(samples[i] for i in kept),
        texts=tuple(texts[i] for i in kept),
        tokens=stack(0, pad),
        lengths=torch.tensor([len(row[0]) for row in rows], dtype=torch.long),
        role_ids=stack(1, -1),
        demo_ids=stack(2, -1),
        answer=torch.tensor([row[3] for row in rows], dtype=torch.long),
        foil=torch.tensor([row[4] for row in rows], dtype=torch.long),
        dropped=dict(dropped),
    )
    return prompts, kept


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    """Tokenize texts, with the characters of each token.

    Raises:
        PromptError: if one is no Unicode text.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"{text[error.start]!r} in a prompt is half of a surrogate pair and no character: "
                "read your words and template as UTF-8"
            ) from error
    return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)


def _first_new(
    ids: list[int], longer: list[int], offsets: list[tuple[int, int]], start: int, word: str
) -> int:
    """Get the first token of a word put behind a prompt, where it starts at a character."""
    if longer[: len(ids)] != ids:
        raise Misaligned("the answer's first token merges with the connective")
    if all(end <= start for _, end in offsets[len(ids) :]):
        raise PromptError(f"the tokenizer drops {word!r}: it has no token for it; use another word")
    return longer[len(ids)]


def _refuse_unknown(tokenizer: Any, words: Iterable[str]) -> None:
    """Refuse words that are unknown tokens: a model reads all of them as the same word."""
    told = [repr(word) for word in dict.fromkeys(words)]
    if not told:
        return
    more = f" and {len(told) - MOST_WORDS} more" if len(told) > MOST_WORDS else ""
    raise PromptError(
        f"the tokenizer does not know {', '.join(told[:MOST_WORDS])}{more} and reads each as "
        f"{tokenizer.unk_token!r}: use words and a template of the model's vocabulary"
    )


def _unknown_id(tokenizer: Any) -> int | None:
    """Get the id of unknown words, where it says nothing else."""
    return None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token_id
