"""Prompts: every token knows its role, and a corruption changes what it says and nothing else."""

from __future__ import annotations

import functools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import word_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from trained_tokenizers import CONNECTIVES, byte_level, sentence_piece, wrap

from tv_interp.errors import PromptError, TvInterpError, UnknownName
from tv_interp.models.reference.vocabulary import make_tokenizer, words
from tv_interp.prompts import Contrast, Prompts, Sample, Task, get_task, make_prompts
from tv_interp.prompts.roles import DEMO_ROLES, ROLE_NAMES, Role, Template

TEMPLATES = ("{x} is {y}\n", "{x} -> {y}\n", "Q: {x}\nA: {y}\n\n", "{x}->{y};")
PAIRS = {
    "big cat": "old town",
    "hot": "cold",
    "up": "down",
    "light grey blue": "dark",
    "left": "right",
    "open": "closed for good",
    "north": "south",
}


@functools.cache
def whole_words():
    """Make a tokenizer of one token per word that also knows the templates' punctuation."""
    extra = " ".join([*PAIRS, *PAIRS.values()]).split()
    return word_tokenizer([*CONNECTIVES, *words()[3:], *extra])


TOKENIZERS = {
    "reference": make_tokenizer,
    "whole_words": whole_words,
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
}
EVERY_TEMPLATE = [
    *((name, template) for name in list(TOKENIZERS)[1:] for template in TEMPLATES),
    *(("reference", template) for template in ("{x} is {y} ", "{x} is {y}\n")),
    *(("byte_level", template) for template in ("{x} is {y} ", "{x}:\n{y}\n", "{x} =>  {y}\n")),
]


def model(tokenizer="reference", *, n_ctx: int = 512, bos: bool = True):
    """Make what `make_prompts` reads of a model."""
    tokenizer = TOKENIZERS[tokenizer]() if isinstance(tokenizer, str) else tokenizer
    return SimpleNamespace(
        tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=n_ctx, default_prepend_bos=bos)
    )


def fixed(demos, query="north", answer="Paris", foil="Madrid", **attributes):
    """Make a task of three attributes, no subclass of `Task`, whose words are always these."""
    sample = lambda rng, n_demos: (list(demos)[:n_demos], query, answer, foil)  # noqa: E731
    return SimpleNamespace(name="fixed", family="user", sample=sample, **attributes)


def assert_roles_spell_the_words(prompts: Prompts) -> None:
    """Rebuild every word of every prompt from roles and the tokenizer's offsets."""
    tokenizer, template = prompts.tokenizer, Template.parse(prompts.template)
    n_bos = int(prompts.prepend_bos)
    names = ("x", "is", "answer") if prompts.n_demos else ()
    spans = {name: prompts.spans(name) for name in (*names, "query_x", "query_is")}
    positions = {name: prompts.positions(name) for name in spans}
    storage = torch.arange(prompts.tokens.shape[1])[None] < prompts.lengths[:, None]
    assert (sum(prompts.mask(role).int() for role in ROLE_NAMES) == storage.int()).all()
    for i, sample in enumerate(prompts.samples):
        text, n = prompts.texts[i], int(prompts.lengths[i])
        ids = prompts.tokens[i, :n].tolist()
        roles, demos = prompts.role_ids[i, :n].tolist(), prompts.demo_ids[i, :n].tolist()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids[n_bos:] == encoded["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == n_bos
        assert roles.count(Role.bos) == n_bos and roles[:n_bos] == [Role.bos] * n_bos
        where: dict[tuple[int, int], list[int]] = {}
        for at, key in enumerate(zip(roles, demos, strict=True)):
            where.setdefault(key, []).append(at)
        wanted = {(Role.query_x, -1): sample.query, (Role.query_is, -1): template.between}
        for d, (x, y) in enumerate(sample.demos):
            wanted |= {(Role.x, d): x, (Role.is_, d): template.between, (Role.answer, d): y}
        for (role, demo), word in wanted.items():
            places = where[role, demo]
            first, last = places[0], places[-1]
            assert places == list(range(first, last + 1))
            (start, _), (_, end) = (encoded["offset_mapping"][at - n_bos] for at in (first, last))
            assert text[start:end].strip() == word.strip()
            span, position = spans[role.label][i], positions[role.label][i]
            if role in DEMO_ROLES:
                span, position = span[demo], position[demo]
            assert span.tolist() == [first, last] and position == last
        others = {role for role, _ in where} - {role for role, _ in wanted}
        assert others <= {Role.bos, Role.end, Role.other}
        assert roles[-1] == Role.query_is and where[Role.query_is, -1][-1] == n - 1
        assert max(demos) + 1 == len(sample.demos) == prompts.n_demos
        gap = " " if template.between.endswith(" ") else ""
        for word, token in ((sample.answer, prompts.answer[i]), (sample.foil, prompts.foil[i])):
            completed = tokenizer.encode(text + gap + word, add_special_tokens=False)
            assert completed[: n - n_bos] == ids[n_bos:] and token == completed[n - n_bos]
        assert prompts.answer[i] != prompts.foil[i]


# Roles


@pytest.mark.parametrize(
    ("tokenizer", "template", "bos"),
    [
        *((*each, True) for each in EVERY_TEMPLATE),
        *((name, "{x} is {y}\n", False) for name in TOKENIZERS),
    ],
)
def test_every_token_has_one_role_and_the_roles_spell_the_words(tokenizer, template, bos):
    prompts = make_prompts(
        model(tokenizer, bos=bos), "country-capital", n_demos=4, n_prompts=8, template=template
    )
    assert len(prompts) == 8 and prompts.prepend_bos is bos
    assert_roles_spell_the_words(prompts)
    assert prompts.positions("answer").shape == (8, 4)
    assert prompts.spans("x").shape == (8, 4, 2)
    assert prompts.spans("query_is").shape == (8, 2)
    assert torch.equal(prompts.positions("query_is"), prompts.lengths - 1)


@pytest.mark.parametrize("tokenizer", ["whole_words", "byte_level"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_words_of_several_tokens_keep_all_their_tokens(tokenizer, template):
    prompts = make_prompts(
        model(tokenizer), Task.from_pairs(PAIRS), n_demos=4, n_prompts=20, template=template
    )
    assert_roles_spell_the_words(prompts)
    size = prompts.spans("answer")[..., 1] - prompts.spans("answer")[..., 0] + 1
    assert size.min() == 1 and size.max() >= 3
    assert prompts.lengths.unique().numel() > 1


@pytest.mark.parametrize("task", ["simple-string", "2d-data", "lookup"])
def test_other_families_have_the_same_roles(task):
    prompts = make_prompts(model(), task, n_demos=4, n_prompts=12)
    assert_roles_spell_the_words(prompts)


@pytest.mark.parametrize(
    "template", ["{x}->{y};", "{x} is {y}\n", "{x} -> {y} ", "Q: {x}\nA: {y}\n"]
)
def test_non_latin_words_and_emoji_keep_their_characters(template):
    demos = [
        ("日本", "東京"),
        ("Россия", "Москва"),
        ("🍎", "🔴"),
        ("👩‍👩‍👧", "naïve café"),
        ("مصر", "القاهرة"),
        ("ไทย", "กรุงเทพ"),
    ]
    task = fixed(demos, query="Ελλάδα", answer="Αθήνα")
    prompts = make_prompts(model("byte_level"), task, n_demos=6, n_prompts=1, template=template)
    assert_roles_spell_the_words(prompts)


def test_a_space_that_is_a_token_of_its_own_belongs_to_the_word_behind_it():
    tokenizer = byte_level()
    assert tokenizer.tokenize(" 東")[0] == "Ġ"
    task = fixed([("日本", "東京"), ("hot", "cold")], answer="東京")
    prompts = make_prompts(
        model(tokenizer), task, n_demos=2, n_prompts=1, template="Q: {x} is {y}\n"
    )
    pieces = tokenizer.convert_ids_to_tokens(prompts.tokens[0].tolist())
    for role in ("x", "answer"):
        assert pieces[prompts.spans(role)[0, 0, 0]] == "Ġ"
    assert [pieces[at] for at in prompts.positions("is")[0]] == ["Ġis", "Ġis"]
    # So the connective's last token predicts the first token of the answer, as it does at the end.
    assert tokenizer.convert_ids_to_tokens([int(prompts.answer[0])]) == ["Ġ"]


def test_template_text_in_front_of_inputs_is_other_and_the_separator_is_end():
    template = "Q: {x}\nA: {y}\n\n"
    prompts = make_prompts(
        model("whole_words"), "country-capital", n_demos=2, n_prompts=1, template=template
    )
    pieces = prompts.tokenizer.convert_ids_to_tokens(prompts.tokens[0].tolist())
    roles = [ROLE_NAMES[r] for r in prompts.role_ids[0]]
    assert [p for p, r in zip(pieces, roles, strict=True) if r == "other"] == ["Q", ":"] * 3
    assert prompts.demo_ids[0][prompts.mask("other")[0]].tolist() == [0, 0, 1, 1, -1, -1]
    assert [p for p, r in zip(pieces, roles, strict=True) if r == "query_is"] == ["A", ":"]
    ended = make_prompts(
        model("whole_words"), "country-capital", n_demos=2, n_prompts=1, template="{x} -> {y};"
    )
    assert (
        ended.tokenizer.convert_ids_to_tokens(ended.tokens[ended.mask("end")].tolist()) == [";"] * 2
    )
    assert ended.positions("end").shape == (1, 2)


def test_a_line_break_in_the_connective_is_part_of_the_prompt_and_not_the_answer():
    prompts = make_prompts(
        model("byte_level"), "country-capital", n_demos=2, n_prompts=4, template="{x}:\n{y}\n"
    )
    assert all(text.endswith(":\n") for text in prompts.texts)
    first = prompts.tokenizer.convert_ids_to_tokens(prompts.answer.tolist())
    assert all(s.answer.startswith(piece) for s, piece in zip(prompts.samples, first, strict=True))


def test_buckets_hold_every_row_once_without_padding():
    prompts = make_prompts(model(), "simple-string", n_demos=3, n_prompts=30)
    seen = []
    for rows, tokens in prompts.buckets():
        assert (prompts.lengths[rows] == tokens.shape[1]).all()
        assert torch.equal(tokens, prompts.tokens[rows, : tokens.shape[1]])
        assert (prompts.role_ids[rows, : tokens.shape[1]] >= 0).all()
        seen += rows.tolist()
    assert sorted(seen) == list(range(30)) and prompts.lengths.unique().numel() > 3


def test_everything_keeps_the_order_of_the_draws():
    prompts = make_prompts(model(), "digit", n_demos=3, n_prompts=9, seed=4)
    rng = np.random.default_rng(4)
    drawn = [tuple(get_task("digit").sample(rng, 3)) for _ in range(9)]
    assert [tuple(s) for s in prompts.samples] == drawn
    assert prompts.query == tuple(d[1] for d in drawn)
    assert prompts.demos == tuple(tuple(d[0]) for d in drawn)
    for sample, text in zip(prompts.samples, prompts.texts, strict=True):
        lines = [f"{x} is {y} " for x, y in sample.demos]
        assert text == "".join(lines) + f"{sample.query} is"


def test_the_models_own_template_comes_first_and_the_default_second():
    assert make_prompts(model(), "digit", n_prompts=1).template == "{x} is {y} "
    assert make_prompts(model("byte_level"), "digit", n_prompts=1).template == "{x} is {y}\n"


def test_bos_is_what_the_model_uses_unless_asked():
    for bos, asked in [(True, False), (False, True)]:
        prompts = make_prompts(model(bos=bos), "digit", n_prompts=2, prepend_bos=asked)
        assert prompts.prepend_bos is asked
        assert_roles_spell_the_words(prompts)
    without = word_tokenizer(words()[3:])
    without.bos_token = None
    assert not make_prompts(
        model(without), "digit", n_prompts=1, template="{x} is {y} "
    ).prepend_bos


_word = st.text(st.characters(categories=["L", "N", "So", "P"]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    demos=st.lists(st.tuples(_word, _word), min_size=1, max_size=4),
    query=_word,
    template=st.sampled_from(["{x} is {y}\n", "{x} -> {y}\n", "in {x} out {y} , "]),
)
def test_law_roles_spell_any_words_that_the_tokenizer_keeps(demos, query, template):
    task = fixed(demos, query=query)
    prompts = make_prompts(
        model("byte_level"), task, n_demos=len(demos), n_prompts=1, template=template
    )
    assert_roles_spell_the_words(prompts)


# make_prompts


def _content(prompts: Prompts) -> list:
    """List all that the prompts hold, row by row and without storage padding."""
    return [
        (
            tuple(prompts.samples[i]),
            prompts.texts[i],
            *(getattr(prompts, f)[i, :n].tolist() for f in ("tokens", "role_ids", "demo_ids")),
            int(prompts.answer[i]),
            int(prompts.foil[i]),
        )
        for i, n in enumerate(prompts.lengths.tolist())
    ]


@pytest.mark.parametrize("task", ["country-capital", "digit", "lookup", "verb-past-bijection"])
def test_equal_seeds_give_equal_prompts_and_others_do_not(task):
    first, again, other = (
        make_prompts(model(), task, n_demos=4, n_prompts=6, seed=seed) for seed in (3, 3, 4)
    )
    assert _content(first) == _content(again) and first.seed == 3
    assert _content(first) != _content(other)
    assert len({p.query for p in (first, other)}) == 2


def test_prompts_left_out_are_counted_and_replaced():
    pairs = {"hot": "old town", "up": "old dark", "left": "closed", "north": "south"}
    prompts = make_prompts(
        model("whole_words"), Task.from_pairs(pairs), n_demos=3, n_prompts=40, seed=1
    )
    assert len(prompts) == 40
    reason = "answer and foil share their first token"
    assert set(prompts.dropped) == {reason} and prompts.dropped[reason] > 0
    rng = np.random.default_rng(1)
    drawn = [Task.from_pairs(pairs).sample(rng, 3) for _ in range(40 + prompts.dropped[reason])]
    good = [s for s in drawn if s.answer.split()[0] != s.foil.split()[0]]
    assert [tuple(s) for s in prompts.samples] == [tuple(s) for s in good]
    assert prompts.provenance["dropped"] == dict(prompts.dropped)


def test_no_demonstrations_leave_the_query_alone():
    prompts = make_prompts(model(), "country-capital", n_demos=0, n_prompts=5)
    assert prompts.n_demos == 0 and prompts.lengths.tolist() == [3] * 5
    assert [ROLE_NAMES[r] for r in prompts.role_ids[0]] == ["bos", "query_x", "query_is"]
    with pytest.raises(PromptError, match="not every prompt has a 'answer' token .* 0 demonstr"):
        prompts.positions("answer")


@pytest.mark.parametrize("tokenizer", ["reference", "byte_level", "sentence_piece"])
def test_zero_shot_keeps_query_answer_foil_and_rule(tokenizer):
    prompts = make_prompts(model(tokenizer), "country-capital", n_demos=3, n_prompts=8)
    bare = prompts.zero_shot()
    assert bare.n_demos == 0 and bare.query == prompts.query
    assert torch.equal(bare.answer, prompts.answer) and torch.equal(bare.foil, prompts.foil)
    assert bare.texts == tuple(
        t.split("\n")[-1] if "\n" in t else t.split(" ", 9)[-1] for t in prompts.texts
    )
    assert_roles_spell_the_words(bare)
    assert [s.rule(s.query) for s in bare.samples] == [s.answer for s in prompts.samples]


def test_select_keeps_rows_in_the_order_given():
    prompts = make_prompts(model(), "simple-string", n_demos=3, n_prompts=6)
    rows = _content(prompts)
    for asked in ([4, 0, 4], torch.tensor([4, 0, 4]), np.array([4, 0, 4]), [-2, 0, 4]):
        assert _content(prompts.select(asked)) == [rows[4], rows[0], rows[4]]
    assert _content(prompts.select(range(2))) == rows[:2]
    assert [s.rule_name for s in prompts.select([3]).samples] == [prompts.samples[3].rule_name]


def test_select_reads_a_boolean_mask_as_a_mask():
    prompts = make_prompts(model(), "simple-string", n_demos=3, n_prompts=4)
    rows = _content(prompts)
    for mask in (torch.tensor([False, True, False, True]), [False, True, False, True]):
        assert _content(prompts.select(mask)) == [rows[1], rows[3]]


@functools.cache
def _many() -> Prompts:
    return make_prompts(model(), "simple-string", n_demos=3, n_prompts=7)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(7)), cut=st.integers(1, 7))
def test_law_select_permutes_rows_and_composes(order, cut):
    prompts, rows = _many(), _content(_many())
    chosen = prompts.select(order)
    assert _content(chosen) == [rows[i] for i in order]
    assert _content(chosen.select(range(cut))) == [rows[i] for i in order[:cut]]
    assert _content(chosen.select(np.argsort(order))) == rows


@pytest.mark.parametrize("tokenizer", ["reference", "byte_level", "sentence_piece"])
def test_show_fits_80_columns_and_names_every_role(tokenizer):
    prompts = make_prompts(model(tokenizer), "country-capital", n_demos=5, n_prompts=3)
    for i in range(3):
        lines = prompts.show(i).split("\n")
        assert max(map(len, lines)) <= 80 and max(map(len, lines)) > 40
        names = " ".join(lines[1::3]).split()
        n = int(prompts.lengths[i])
        demos = prompts.demo_ids[i, :n].tolist()
        assert names == [
            ROLE_NAMES[r] + (f"[{d}]" if d >= 0 else "")
            for r, d in zip(prompts.role_ids[i, :n].tolist(), demos, strict=True)
        ]
        assert " ".join(lines[::3]).split() == prompts.pieces(i)


def test_show_takes_another_width():
    prompts = make_prompts(model(), "country-capital", n_demos=5, n_prompts=1)
    assert max(map(len, prompts.show(0, width=40).split("\n"))) <= 40


def test_provenance_and_repr_say_what_was_made():
    prompts = make_prompts(model(), "digit", n_demos=2, n_prompts=3, seed=9)
    assert prompts.provenance == {
        "task": "digit",
        "family": "categorization",
        "template": "{x} is {y} ",
        "n_prompts": 3,
        "n_demos": 2,
        "seed": 9,
        "dropped": {},
    }
    assert repr(prompts).startswith("Prompts('digit', 3 x 2 demos: '")
    contrast = prompts.corrupt("labels", seed=5)
    assert contrast.provenance == prompts.provenance | {
        "corruption": "labels",
        "corruption_seed": 5,
        "dropped_by_corruption": {},
    }
    assert repr(contrast) == "Contrast('digit', 'labels', 3 pairs)"


def test_a_task_needs_only_name_family_and_sample():
    task = fixed([("hot", "cold"), ("up", "down"), ("left", "right")])
    prompts = make_prompts(model("whole_words"), task, n_demos=3, n_prompts=2)
    assert prompts.demos[0] == (("hot", "cold"), ("up", "down"), ("left", "right"))
    assert_roles_spell_the_words(prompts)
    for kind in ("answers", "inputs", "random_answers"):
        contrast = prompts.corrupt(kind)
        assert len(contrast) == 2
        assert {s.foil for s in contrast.clean.samples} <= {"cold", "down", "right"}


# Corruptions


def _other_class(sample) -> str:
    (other,) = {sample.answer, sample.foil} - {sample.answer}
    return other


def _task_law(clean, corrupted, foil, other):
    assert corrupted.demos == [(x, other.pairs[x]) for x, _ in clean.demos]
    assert all(y != z for (_, y), (_, z) in zip(clean.demos, corrupted.demos, strict=True))
    assert foil == other.pairs[clean.query]


def _random_law(clean, corrupted, foil, other):
    assert _xs(corrupted) == _xs(clean)
    assert foil in _ys(clean)


def _answers_law(clean, corrupted, foil, other):
    assert _xs(corrupted) == _xs(clean)
    assert sorted(_ys(corrupted)) == sorted(_ys(clean))
    assert all(a != b for a, b in zip(_ys(clean), _ys(corrupted), strict=True))
    assert foil in _ys(clean)


def _inputs_law(clean, corrupted, foil, other):
    assert _ys(corrupted) == _ys(clean)
    assert sorted(_xs(corrupted)) == sorted(_xs(clean))
    assert all(a != b for a, b in zip(_xs(clean), _xs(corrupted), strict=True))
    assert foil in _ys(clean)


def _query_law(clean, corrupted, foil, other):
    assert corrupted.demos == clean.demos and corrupted.query != clean.query
    assert corrupted.query not in _xs(clean) and foil == clean.rule(corrupted.query)


def _lookup_law(law):
    def check(clean, corrupted, foil, other):
        law(clean, corrupted, foil, other)
        assert foil == dict(corrupted.demos)[clean.query]  # what the corrupted prompt suggests

    return check


def _lookup_query_law(clean, corrupted, foil, other):
    assert corrupted.demos == clean.demos and corrupted.query != clean.query
    assert foil == dict(clean.demos)[corrupted.query]


def _flipped(clean, corrupted) -> dict[str, list[bool]]:
    """Say for each label which of its demonstrations got the other label."""
    out: dict[str, list[bool]] = {}
    for (_, y), (_, z) in zip(clean.demos, corrupted.demos, strict=True):
        assert z in (clean.answer, clean.foil)
        out.setdefault(y, []).append(y != z)
    return out


def _labels_law(clean, corrupted, foil, other):
    assert _xs(corrupted) == _xs(clean) and foil == _other_class(clean)
    assert all(all(moved) for moved in _flipped(clean, corrupted).values())


def _half_labels_law(clean, corrupted, foil, other):
    assert _xs(corrupted) == _xs(clean) and foil == _other_class(clean)
    assert [sum(moved) for moved in _flipped(clean, corrupted).values()] == [2, 2]


def _half_inputs_law(clean, corrupted, foil, other):
    assert _ys(corrupted) == _ys(clean) and foil == _other_class(clean)
    assert sorted(_xs(corrupted)) == sorted(_xs(clean))
    wrong = Counter(y for x, y in corrupted.demos if clean.rule(x) != y)
    assert wrong == {clean.answer: 2, clean.foil: 2}
    kept = [x == z for x, z in zip(_xs(clean), _xs(corrupted), strict=True)]
    assert kept == [clean.rule(x) == y for x, y in corrupted.demos]


def _random_labels_law(clean, corrupted, foil, other):
    assert _xs(corrupted) == _xs(clean) and foil == _other_class(clean)
    _flipped(clean, corrupted)


def _xs(sample) -> list[str]:
    return [x for x, _ in sample.demos]


def _ys(sample) -> list[str]:
    return [y for _, y in sample.demos]


USER = Task.from_pairs({w: v for w, v in get_task("verb-past").pairs.items()})
LAWS = [
    *(
        (task, kind, law)
        for task in ("country-capital", "letter-next", "verb-past-bijection", USER)
        for kind, law in (
            ("task", _task_law),
            ("random_answers", _random_law),
            ("answers", _answers_law),
            ("inputs", _inputs_law),
            ("query", _query_law),
        )
        if (task, kind) != (USER, "task")
    ),
    ("lookup", "random_answers", _random_law),
    ("lookup", "answers", _lookup_law(_answers_law)),
    ("lookup", "inputs", _lookup_law(_inputs_law)),
    ("lookup", "query", _lookup_query_law),
    *(
        (task, kind, law)
        for task in ("digit", "2d-data", "simple-string")
        for kind, law in (
            ("labels", _labels_law),
            ("answers", _half_labels_law),
            ("inputs", _half_inputs_law),
            ("random_answers", _random_labels_law),
            ("query", _query_law),
        )
        # The rule of simple-string is the length, so the classes have no words of equal length.
        if task != "simple-string" or kind not in ("inputs", "query")
    ),
]


def assert_twins(prompts: Prompts, contrast: Contrast) -> None:
    """Check what every corruption keeps: order, lengths, roles, query, answer, one metric."""
    clean, corrupted = contrast.clean, contrast.corrupted
    assert len(clean) == len(corrupted) == len(contrast)
    assert len(contrast) + sum(corrupted.dropped.values()) == len(prompts)
    assert torch.equal(clean.lengths, corrupted.lengths)
    assert torch.equal(clean.answer, corrupted.answer) and torch.equal(clean.foil, corrupted.foil)
    assert contrast.answer is clean.answer and contrast.foil is clean.foil
    rows = iter(enumerate(prompts.texts))  # used up in order, so the order is kept
    kept = [next(row for row, text in rows if text == wanted) for wanted in clean.texts]
    assert torch.equal(clean.answer, prompts.answer[kept])
    for i, row in enumerate(kept):
        n = int(prompts.lengths[row])
        assert torch.equal(clean.tokens[i, :n], prompts.tokens[row, :n])
        assert torch.equal(clean.role_ids[i, :n], corrupted.role_ids[i, :n])
        assert torch.equal(clean.demo_ids[i, :n], corrupted.demo_ids[i, :n])
        assert clean.samples[i].foil == corrupted.samples[i].foil
        assert clean.samples[i].answer == corrupted.samples[i].answer == prompts.samples[row].answer
        assert clean.samples[i].demos == prompts.samples[row].demos
        if contrast.corruption != "query":
            assert corrupted.samples[i].query == clean.samples[i].query
    assert_roles_spell_the_words(clean)
    assert_roles_spell_the_words(corrupted)


@pytest.mark.parametrize(
    ("task", "kind", "law"), LAWS, ids=[f"{getattr(t, 'name', t)}-{k}" for t, k, _ in LAWS]
)
def test_a_corruption_changes_what_it_says_and_nothing_else(task, kind, law):
    prompts = make_prompts(model(), task, n_demos=8, n_prompts=10)
    contrast = prompts.corrupt(kind, seed=3)
    assert_twins(prompts, contrast)
    assert len(contrast) >= (10 if kind != "inputs" else 5)
    partner = getattr(get_task(task), "partner", None)
    other = get_task(partner) if kind == "task" else None
    for clean, corrupted in zip(contrast.clean.samples, contrast.corrupted.samples, strict=True):
        law(clean, corrupted, corrupted.foil, other)
        assert corrupted.foil != clean.answer


@pytest.mark.parametrize("kind", ["task", "random_answers", "answers", "inputs", "query"])
@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [
        ("byte_level", TEMPLATES[0]),
        ("byte_level", TEMPLATES[2]),
        ("byte_level", TEMPLATES[3]),
        ("sentence_piece", TEMPLATES[0]),
        ("sentence_piece", TEMPLATES[3]),
    ],
)
def test_words_change_places_only_with_words_of_equal_token_length(tokenizer, template, kind):
    prompts = make_prompts(
        model(tokenizer), "country-capital", n_demos=6, n_prompts=24, template=template
    )
    try:
        contrast = prompts.corrupt(kind, seed=2)
    except PromptError as error:
        # `task` fixes which words come, so a tokenizer may leave no prompt of six that aligns.
        assert kind == "task" and "no answer of equal token length (24)" in str(error)
        return
    assert_twins(prompts, contrast)
    law = dict(
        task=_task_law,
        random_answers=_random_law,
        answers=_answers_law,
        inputs=_inputs_law,
        query=_query_law,
    )[kind]
    other = get_task("country-neighbour-capital")
    for clean, corrupted in zip(contrast.clean.samples, contrast.corrupted.samples, strict=True):
        law(clean, corrupted, corrupted.foil, other)
    # Lengths are measured where the word stands: nothing is left out by surprise.
    assert "corrupted words split into other tokens" not in contrast.corrupted.dropped
    if kind in ("random_answers", "query"):
        assert len(contrast) >= 18


def test_random_answers_are_drawn_from_all_answers_and_labels_from_the_prompts_two():
    prompts = make_prompts(model(), "country-capital", n_demos=8, n_prompts=64)
    corrupted = prompts.corrupt("random_answers").corrupted
    drawn = [y for s in corrupted.samples for y in _ys(s)]
    assert set(drawn) == set(get_task("country-capital").answers)
    same = np.mean([y == z for s, t in zip(prompts.samples, corrupted.samples, strict=True)
                    for y, z in zip(_ys(s), _ys(t), strict=True)])  # fmt: skip
    assert same < 0.06  # 1 of 45 by chance
    prompts = make_prompts(model(), "digit", n_demos=8, n_prompts=64)
    corrupted = prompts.corrupt("random_answers").corrupted
    same = np.mean([y == z for s, t in zip(prompts.samples, corrupted.samples, strict=True)
                    for y, z in zip(_ys(s), _ys(t), strict=True)])  # fmt: skip
    assert 0.4 < same < 0.6


@pytest.mark.parametrize("n_demos", [4, 5, 7])
@pytest.mark.parametrize("kind", ["answers", "inputs"])
def test_half_of_an_odd_class_is_rounded_down(kind, n_demos):
    prompts = make_prompts(model(), "digit", n_demos=n_demos, n_prompts=10)
    contrast = prompts.corrupt(kind)
    for clean, corrupted in zip(contrast.clean.samples, contrast.corrupted.samples, strict=True):
        sizes = Counter(_ys(clean))
        wrong = Counter(y for x, y in corrupted.demos if clean.rule(x) != y)
        if kind == "answers":
            flipped = Counter(
                y for (_, y), (_, z) in zip(clean.demos, corrupted.demos, strict=True) if y != z
            )
            assert flipped == {label: n // 2 for label, n in sizes.items()}
        else:
            assert set(wrong.values()) == {min(sizes.values()) // 2} and len(wrong) == 2


@pytest.mark.parametrize("kind", ["answers", "inputs", "random_answers"])
def test_equal_seeds_corrupt_equally_and_others_do_not(kind):
    for task in ("country-capital", "digit"):
        prompts = make_prompts(model(), task, n_demos=6, n_prompts=12)
        first, again, other = (prompts.corrupt(kind, seed=seed) for seed in (1, 1, 2))
        assert _content(first.corrupted) == _content(again.corrupted)
        assert _content(first.corrupted) != _content(other.corrupted)
        assert first.corrupted.seed == 1 and other.corrupted.seed == 2
        assert first.clean.seed == prompts.seed == 0


def test_a_row_is_corrupted_by_its_seed_and_its_number_alone():
    # The generator is keyed by (seed, row number in the prompts at hand): more prompts change no
    # earlier row, but rows that are selected first take new numbers and other random words.
    prompts = make_prompts(model(), "country-capital", n_demos=6, n_prompts=12)
    whole = _content(prompts.corrupt("answers").corrupted)
    assert _content(prompts.select(range(5)).corrupt("answers").corrupted) == whole[:5]
    assert _content(prompts.select([7, 3]).corrupt("answers").corrupted) != [whole[7], whole[3]]
    # What is not random does not depend on the order.
    exact = _content(prompts.corrupt("task").corrupted)
    assert _content(prompts.select([7, 3]).corrupt("task").corrupted) == [exact[7], exact[3]]


def test_rows_that_cannot_be_aligned_leave_both_sides_and_are_counted():
    prompts = make_prompts(model("whole_words"), Task.from_pairs(PAIRS), n_demos=4, n_prompts=60)
    contrast = prompts.corrupt("answers")
    assert_twins(prompts, contrast)
    assert 0 < len(contrast) < 60
    alone = "a word has no other of equal token length to change places with"
    expected = sum(
        1 in Counter(len(y.split()) for _, y in sample.demos).values() for sample in prompts.samples
    )
    assert contrast.corrupted.dropped[alone] == expected
    assert contrast.clean.dropped == prompts.dropped
    assert contrast.provenance["dropped_by_corruption"] == dict(contrast.corrupted.dropped)


@pytest.mark.parametrize("n_ctx", [12, 99])
def test_words_that_are_longer_in_their_new_place_leave_both_sides(n_ctx):
    # "hot" is one token, but two where its answer is c: no length of a word alone foretells that.
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<s>", "<unk>", "is", "up", "hot", "h", "ot",
                                                      "left", "a", "b", "c"])}, "<unk>")
    )  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("h(?=ot is c)"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer = wrap(core, "<s>", unk_token="<unk>")
    demos = [("up", "a"), ("hot", "b"), ("left", "c")]
    task = fixed(demos, query="up", answer="a", foil="b")
    prompts = make_prompts(
        model(tokenizer, n_ctx=n_ctx), task, n_demos=3, n_prompts=20, template="{x} is {y} "
    )
    assert prompts.lengths.tolist() == [12] * 20
    contrast = prompts.corrupt("inputs")
    assert {s.demos[0][0] for s in contrast.corrupted.samples} == {"hot"}
    split = contrast.corrupted.dropped["corrupted words split into other tokens"]
    assert 0 < split == 20 - len(contrast)


def test_the_task_corruption_takes_another_relation_by_name_or_as_a_task():
    prompts = make_prompts(model(), "country-capital", n_demos=4, n_prompts=6)
    currency = get_task("country-currency")
    for other in ("country-currency", currency, Task.from_pairs(currency.pairs)):
        contrast = prompts.corrupt("task", other=other)
        for clean, corrupted in zip(
            contrast.clean.samples, contrast.corrupted.samples, strict=True
        ):
            _task_law(clean, corrupted, corrupted.foil, currency)
    some = {x: y for x, y in currency.pairs.items() if x != prompts.query[0]}
    contrast = prompts.corrupt("task", other=Task.from_pairs(some))
    assert contrast.corrupted.dropped["the other relation lacks an input of the prompt"] > 0
    assert prompts.query[0] not in contrast.clean.query


def test_only_the_query_can_be_corrupted_without_demonstrations():
    for bare in (
        make_prompts(model(), "country-capital", n_demos=0, n_prompts=6),
        make_prompts(model(), "country-capital", n_demos=4, n_prompts=6).zero_shot(),
    ):
        contrast = bare.corrupt("query")
        assert_twins(bare, contrast)
        for clean, corrupted in zip(
            contrast.clean.samples, contrast.corrupted.samples, strict=True
        ):
            _query_law(clean, corrupted, corrupted.foil, None)
        for kind in ("task", "random_answers", "answers", "inputs"):
            with pytest.raises(PromptError, match="changes demonstrations, and there are none"):
                bare.corrupt(kind)


def test_select_of_pairs_keeps_them_pairs():
    contrast = make_prompts(model(), "digit", n_demos=4, n_prompts=6).corrupt("labels")
    chosen = contrast.select([5, 2])
    assert _content(chosen.clean) == [_content(contrast.clean)[i] for i in (5, 2)]
    assert _content(chosen.corrupted) == [_content(contrast.corrupted)[i] for i in (5, 2)]
    assert chosen.corruption == "labels" and len(chosen) == 2


def test_nothing_is_changed_by_corrupting():
    prompts = make_prompts(model(), "digit", n_demos=4, n_prompts=6)
    before = _content(prompts), dict(prompts.dropped), prompts.seed
    demos = [list(s.demos) for s in prompts.samples]
    for kind in ("labels", "answers", "inputs", "random_answers", "query"):
        prompts.corrupt(kind)
    assert (_content(prompts), dict(prompts.dropped), prompts.seed) == before
    assert [list(s.demos) for s in prompts.samples] == demos


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), n_demos=st.integers(2, 8))
def test_law_a_derangement_leaves_nothing_in_place(seed, n_demos):
    prompts = make_prompts(model(), "letter-next", n_demos=n_demos, n_prompts=2, seed=seed)
    for kind, law in (("answers", _answers_law), ("inputs", _inputs_law)):
        contrast = prompts.corrupt(kind, seed=seed)
        assert len(contrast) == 2
        for clean, corrupted in zip(
            contrast.clean.samples, contrast.corrupted.samples, strict=True
        ):
            law(clean, corrupted, corrupted.foil, None)


# Must fail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(task="country-capitol"), r"'country-capitol': did you mean 'country-capital'"),
        (dict(task="zzz"), r"unknown task 'zzz': known are .*lookup"),
        (dict(task=7), r"expected a task .* got 7"),
        (dict(template="{x} is\n"), r"a template with \{x\} and then \{y\}.*'\{x\} is\\n'"),
        (dict(template="is {y}"), r"expected a template with \{x\} and then \{y\}"),
        (dict(template="{y} is {x}"), r"expected a template with \{x\} and then \{y\}"),
        (dict(template="{x} is {x} {y}"), r"expected a template .* once each"),
        (dict(template="{x} is {y} {y}"), r"expected a template .* once each"),
        (dict(template="{x} {y}\n"), r"expected a connective between \{x\} and \{y\}"),
        (dict(template="{x}{y}\n"), r"expected a connective between \{x\} and \{y\}"),
        (dict(template="{x} becomes {y} "), r"does not know 'becomes' and reads each as '<unk>'"),
        (dict(n_demos=45), r"'country-capital' has inputs for at most 44 .*n_demos=45"),
        (dict(n_demos=-1), r"expected n_demos of 0 or more, got -1"),
        (dict(n_prompts=0), r"expected n_prompts of 1 or more, got 0"),
        (dict(n_prompts=-3), r"expected n_prompts of 1 or more, got -3"),
        (dict(task="digit", n_demos=41), r"'digit' has inputs for at most 40 demonstrations"),
        (dict(task="lookup", n_demos=200), r"'lookup' has inputs for at most \d+ demonstrations"),
        (dict(task="month-next-bijection"), r"unknown task"),
        (dict(task=Task.from_pairs({"France": "Oz", "Spain": "Madrid"}), n_demos=1),
         r"does not know 'Oz'"),
        (dict(task=Task.from_pairs({"Oz": "Paris", "Spain": "Madrid"}), n_demos=1),
         r"does not know 'Oz'"),
        (dict(task=Task.from_pairs({"France": "Oz", "Spain": "Madrid"}), n_demos=0),
         r"does not know 'Oz' and reads"),
        (dict(task=Task.from_pairs({f"Oz{i}": "Madrid" for i in range(9)} | {"Spain": "Rome"}),
              n_demos=8, n_prompts=20), r"does not know ('Oz\d', ){8}'Oz\d' and reads"),
        (dict(task=Task.from_pairs({f"Oz{i}": "Madrid" for i in range(13)} | {"Spain": "Rome"}),
              n_demos=12, n_prompts=20), r"does not know ('Oz\d+'(, )?){10} and 3 more and reads"),
        (dict(task=Task.from_pairs({"France": "Paris", "Spain": "Paris"}), n_demos=1),
         r"no answer differs from 'Paris'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_reason(change, message):
    arguments = dict(task="country-capital", n_demos=4, n_prompts=4) | change
    with pytest.raises(TvInterpError, match=message) as caught:
        make_prompts(model(), arguments.pop("task"), **arguments)
    assert "\n" not in str(caught.value)


def test_prompts_longer_than_the_context_are_refused():
    exact = 1 + 3 * 4 + 2
    make_prompts(model(n_ctx=exact), "country-capital", n_demos=4, n_prompts=2)
    with pytest.raises(PromptError, match=r"has 15 tokens and the model's context 14: use fewer"):
        make_prompts(model(n_ctx=exact - 1), "country-capital", n_demos=4, n_prompts=2)


@pytest.mark.parametrize("bad", ["x", "answer", "query", "metric"])
def test_a_word_that_the_tokenizer_drops_is_refused(bad):
    tokenizer = byte_level(normalizers.Replace(Regex("[0-9]"), ""))
    demos = [("hot", "cold"), ("42" if bad == "x" else "up", "42" if bad == "answer" else "down")]
    task = fixed(
        demos,
        query="42" if bad == "query" else "left",
        answer="42" if bad == "metric" else "Paris",
    )
    with pytest.raises(PromptError, match=r"the tokenizer drops ' ?42'"):
        make_prompts(model(tokenizer), task, n_demos=2, n_prompts=1)


def test_a_connective_that_the_tokenizer_drops_is_refused():
    tokenizer = byte_level(normalizers.Replace(Regex("[0-9]"), ""))
    with pytest.raises(PromptError, match=r"the tokenizer drops ' 42.* \((is|query_is)\)"):
        make_prompts(model(tokenizer), "verb-past", n_prompts=1, template="{x} 42 {y}\n")


def test_words_that_merge_with_the_template_are_left_out_with_a_short_reason():
    assert byte_level().tokenize(" Madrid") == ["ĠM", "ad", "rid"]
    task = fixed([("up", "Ma"), ("drid", "cold")])
    message = r"only 0 of 8 prompts .* left out a token covers answer and x \(160\)"
    with pytest.raises(PromptError, match=message):
        make_prompts(model("byte_level"), task, n_demos=2, n_prompts=8, template="{x} is {y}")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "the model has no tokenizer"),
        (SimpleNamespace(is_fast=False), "expected a fast tokenizer .* got SimpleNamespace"),
        (object(), "expected a fast tokenizer .* got object"),
    ],
)
def test_a_slow_or_missing_tokenizer_is_refused(tokenizer, message):
    with pytest.raises(PromptError, match=message):
        make_prompts(model(tokenizer), "country-capital", n_prompts=1)


def test_a_bos_that_the_tokenizer_lacks_is_refused():
    tokenizer = word_tokenizer(words()[3:])
    tokenizer.bos_token = None
    with pytest.raises(PromptError, match="the tokenizer has no BOS token"):
        make_prompts(
            model(tokenizer), "digit", n_prompts=1, template="{x} is {y} ", prepend_bos=True
        )


@pytest.mark.parametrize("drawn", [("a", "b"), ([("up", "down")], "hot", "cold")])
def test_a_task_that_draws_something_else_is_refused(drawn):
    task = SimpleNamespace(name="odd", family="user", sample=lambda rng, n_demos: drawn)
    with pytest.raises(PromptError, match=r"task 'odd' .* \(demos, query, answer, foil\)"):
        make_prompts(model("byte_level"), task, n_demos=1, n_prompts=1)


def test_a_task_that_draws_another_number_of_demonstrations_is_refused():
    task = SimpleNamespace(
        name="odd",
        family="user",
        sample=lambda rng, n: ([("up", "down")], "hot", "Paris", "Madrid"),
    )
    with pytest.raises(PromptError, match=r"task 'odd' drew 1 demonstrations, expected 3"):
        make_prompts(model("byte_level"), task, n_demos=3, n_prompts=1)


def test_unknown_roles_are_refused_with_the_nearest():
    prompts = make_prompts(model(), "country-capital", n_demos=2, n_prompts=1)
    for ask in (prompts.mask, prompts.spans, prompts.positions):
        with pytest.raises(UnknownName, match=r"unknown role 'anwser': did you mean 'answer'"):
            ask("anwser")
    with pytest.raises(
        PromptError, match=r"not every prompt has a 'end' token .*'\{x\} is \{y\} '"
    ):
        prompts.positions("end")


def test_roles_without_one_span_are_refused():
    prompts = make_prompts(
        model("whole_words"), "verb-past", n_demos=2, n_prompts=1, template="Q: {x}\nA: {y}\n"
    )
    assert prompts.mask("other").sum() == 6
    with pytest.raises(PromptError, match="'other' .*mask"):
        prompts.positions("other")


@pytest.mark.parametrize(
    ("task", "kind", "arguments", "message"),
    [
        ("simple-string", "inputs", {}, r"too few inputs of equal token length in the two classes"),
        ("simple-string", "query", {}, r"no other query of equal token length and another answer"),
        ("country-capital", "answer", {}, r"unknown corruption 'answer': did you mean 'answers'"),
        ("country-capital", "task", dict(other="nope-nope"), r"unknown task 'nope-nope'"),
        ("country-capital", "labels", {}, r"'labels' exchanges .* family 'knowledge'"),
        ("verb-past-bijection", "labels", {}, r"'labels' exchanges .* family 'bijection'"),
        ("lookup", "labels", {}, r"'labels' exchanges .* family 'lookup'"),
        (USER, "labels", {}, r"'labels' exchanges .* family 'user'"),
        ("digit", "task", {}, r"inputs of 'digit' have none: use 'labels' or 'answers'"),
        ("digit", "task", dict(other="number-next"), r"inputs of 'digit' have none"),
        ("lookup", "task", {}, r"'lookup', which declares no partner: pass other="),
        (USER, "task", {}, r"'user-pairs', which declares no partner: pass other="),
        ("noun-plural", "task", {}, r"'noun-plural', which declares no partner"),
        ("country-capital", "task", dict(other="digit"), r"needs a relation of pairs, got 'digit'"),
        ("country-capital", "task", dict(other="country-capital"),
         r"fits none of 4 .* foil and answer are the same word \(4\)"),
        ("country-capital", "task", dict(other="letter-next"),
         r"fits none of 4 .* the other relation lacks an input of the prompt \(4\)"),
    ],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_a_corruption_that_a_task_cannot_have_is_refused(task, kind, arguments, message):
    prompts = make_prompts(model(), task, n_demos=4, n_prompts=4)
    with pytest.raises(TvInterpError, match=message) as caught:
        prompts.corrupt(kind, **arguments)
    assert "\n" not in str(caught.value)


def test_the_query_of_a_task_without_a_rule_cannot_be_corrupted():
    prompts = make_prompts(
        model("byte_level"), fixed([("hot", "cold"), ("up", "down")]), n_demos=2, n_prompts=1
    )
    with pytest.raises(PromptError, match=r"'fixed' cannot have the corruption 'query'.* no rule"):
        prompts.corrupt("query")


def test_too_few_demonstrations_to_corrupt_are_refused():
    one = make_prompts(model(), "country-capital", n_demos=1, n_prompts=4)
    for kind in ("answers", "inputs"):
        with pytest.raises(PromptError, match=r"fits none of 4 .* no other of equal token length"):
            one.corrupt(kind)
    for n_demos in (1, 2, 3):
        few = make_prompts(model(), "digit", n_demos=n_demos, n_prompts=4)
        for kind in ("answers", "inputs"):
            with pytest.raises(
                PromptError, match=r"fits none of 4 .* fewer than two demonstrations"
            ):
                few.corrupt(kind)


def test_twins_made_by_hand_that_do_not_align_are_refused():
    def made(task, n_prompts=4, **arguments):
        return make_prompts(model(), task, n_prompts=n_prompts, **dict(n_demos=2) | arguments)

    clean = made("country-capital")
    Contrast(clean, made("country-capital", seed=1), "by hand")
    with pytest.raises(PromptError, match=r"misaligned: 4 and 3 prompts"):
        Contrast(clean, made("country-capital", n_prompts=3), "by hand")
    with pytest.raises(PromptError, match=r"misaligned: at prompt 0 they have 9 and 12 tokens"):
        Contrast(clean, made("country-capital", n_demos=3), "by hand")
    long, short = made("simple-string", seed=1), made("simple-string", seed=2)
    with pytest.raises(PromptError, match=r"misaligned: at prompt \d they have \d+ and \d+ tokens"):
        Contrast(long, short, "by hand")
    tokenizer = model("whole_words")
    two = Task.from_pairs({"hot": "up", "left": "down"})
    ours, theirs = (
        make_prompts(tokenizer, task, n_demos=1, n_prompts=1, template="{x} is {y} ")
        for task in (fixed([("big cat", "old")]), fixed([("cat", "old town")]))
    )
    with pytest.raises(PromptError, match=r"prompt 0 they differ in role at token 2: 'x' and 'is'"):
        Contrast(ours, theirs, "by hand")
    assert len(make_prompts(tokenizer, two, n_demos=1, n_prompts=1, template="{x} is {y} ")) == 1


def test_an_empty_selection_and_rows_that_are_not_there_are_refused():
    prompts = make_prompts(model(), "digit", n_demos=4, n_prompts=3)
    contrast = prompts.corrupt("labels")
    for each in (prompts, contrast):
        for none in ([], torch.tensor([], dtype=torch.long), [False] * 3):
            with pytest.raises(PromptError, match="empty selection: expected at least one prompt"):
                each.select(none)
        for rows in ([3], [-4], [0, 99]):
            with pytest.raises(PromptError, match=r"expected rows of 0 to 2, got"):
                each.select(rows)


def test_a_sample_is_four_values():
    assert Sample([("a", "b")], "c", "d", "e")._fields == ("demos", "query", "answer", "foil")
