"""Tasks: rules as data, and the samples that are drawn from them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from tv_interp.errors import FileError, PromptError, UnknownName
from tv_interp.prompts import Sample, Task, get_task, list_tasks
from tv_interp.prompts.corruptions import default_corruptions
from tv_interp.prompts.tasks.bijection import BIJECTIVE
from tv_interp.prompts.tasks.categorization import Categorization
from tv_interp.prompts.tasks.knowledge import PARTNERS, SHARED, relations
from tv_interp.prompts.tasks.words import held_out_label_words, label_words

FAMILIES = {"knowledge": 28, "categorization": 3, "bijection": 16, "lookup": 1}
PAIRS = {"hot": "cold", "up": "down", "left": "right"}


def draws(task: str | Task, n_demos: int, n: int = 200) -> list[Sample]:
    """Draw n samples, each with a seed of its own."""
    return [get_task(task).sample(np.random.default_rng(seed), n_demos) for seed in range(n)]


# Registry


def test_the_registry_lists_every_task_once_by_family():
    names = list_tasks()
    assert len(names) == len(set(names)) == sum(FAMILIES.values())
    for family, count in FAMILIES.items():
        members = list_tasks(family)
        assert len(members) == count
        assert all(get_task(name).family == family for name in members)
    assert [name for family in FAMILIES for name in list_tasks(family)] == names


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_has_the_name_that_it_is_found_by_and_samples_with_8_demonstrations(name):
    task = get_task(name)
    assert task.name == name and get_task(task) is task
    for seed in range(5):
        sample = task.sample(np.random.default_rng(seed), 8)
        demos, query, answer, foil = sample
        assert len(demos) == 8 and len({x for x, _ in demos}) == 8
        assert sample.rule(query) == answer != foil
        assert all(sample.rule(x) == y for x, y in demos)
        assert {answer, foil, *(y for _, y in demos)} <= set(task.answers)
        assert len(set(task.answers)) == len(task.answers)
        if task.family != "lookup":
            assert query not in {x for x, _ in demos}
        again = task.sample(np.random.default_rng(seed), 8)
        assert tuple(again) == tuple(sample)


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_samples_without_demonstrations(name):
    sample = get_task(name).sample(np.random.default_rng(0), 0)
    assert sample.demos == [] and sample.rule(sample.query) == sample.answer != sample.foil


@pytest.mark.parametrize("name", list_tasks())
def test_other_queries_are_new_inputs_that_the_rule_knows(name):
    task = get_task(name)
    sample = task.sample(np.random.default_rng(0), 5)
    others = list(task.other_queries(np.random.default_rng(1), sample))
    assert others and len(set(others)) == len(others) and sample.query not in others
    shown = {x for x, _ in sample.demos}
    assert all(sample.rule(x) in task.answers for x in others)
    if name == "lookup":
        assert set(others) == shown - {sample.query}
    else:
        assert not shown & set(others)
    assert others == list(task.other_queries(np.random.default_rng(1), sample))


def test_unknown_tasks_and_families_are_refused_with_the_nearest():
    with pytest.raises(UnknownName, match=r"unknown task 'digits': did you mean 'digit'"):
        get_task("digits")
    with pytest.raises(UnknownName, match=r"unknown family 'knowlege': did you mean 'knowledge'"):
        list_tasks("knowlege")
    with pytest.raises(UnknownName, match=r"unknown family 'q': known are bijection, categor.*"):
        list_tasks("q")
    for odd in (7, None, {"hot": "cold"}, object()):
        with pytest.raises(PromptError, match=r"expected a task \(name, family, sample\) or the"):
            get_task(odd)


def test_any_object_with_name_family_and_sample_is_a_task():
    class Own:
        name, family = "own", "mine"

        def sample(self, rng, n_demos):
            return [("a", "b")] * n_demos, "c", "d", "e"

    own = Own()
    assert get_task(own) is own


def test_default_corruptions_are_those_of_the_family():
    for name, kinds in {
        "country-capital": ("task", "random_answers", "inputs"),
        "noun-plural": ("answers", "random_answers", "inputs"),  # it has no partner
        "verb-past-bijection": ("task", "random_answers", "inputs"),
        "digit": ("labels", "answers", "inputs"),
        "lookup": ("answers", "inputs"),
    }.items():
        assert default_corruptions(get_task(name)) == kinds
    assert default_corruptions(Task.from_pairs({"a": "b", "c": "d"})) == ("answers", "inputs")


# Relations


def test_partner_relations_have_the_same_inputs_and_another_rule():
    known = relations()
    for name, partner in PARTNERS.items():
        assert get_task(name).partner == partner
        ours, theirs = known[name], known[partner]
        assert ours.keys() == theirs.keys()
        same = sum(ours[x] == theirs[x] for x in ours)
        assert same == (6 if "language" in name and "country" in name and name in SHARED else 0)
    for name in list_tasks("bijection"):
        task = get_task(name)
        partner = get_task(task.partner)
        assert partner.partner == name and task.pairs.keys() == partner.pairs.keys()
        assert set(task.answers) == set(partner.answers)
        assert all(task.pairs[x] != partner.pairs[x] for x in task.pairs)
    without = {name for name in list_tasks("knowledge") if get_task(name).partner is None}
    assert without == {"noun-plural"}


def test_shared_relations_have_the_answers_of_their_partners_up_to_a_few():
    known = relations()
    for name in SHARED:
        ours, theirs = (set(known[each].values()) for each in (name, PARTNERS[name]))
        assert PARTNERS[PARTNERS[name]] == name and PARTNERS[name] in SHARED
        alone = {"capital": 12, "language": 7}.get(name.split("-")[-1], 0)
        assert len(ours ^ theirs) == alone
        assert min(len(ours), len(theirs)) >= 12
    typed = {name: PARTNERS[name] for name in PARTNERS if name not in SHARED}
    for name, partner in typed.items():
        if (name, partner) != ("number-decade", "number-next"):
            assert not set(known[name].values()) & set(known[partner].values())


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("country-capital", "France", "Paris"),
        ("country-neighbour-capital", "France", "Madrid"),
        ("capital-country", "Paris", "France"),
        ("country-currency", "France", "euro"),
        ("adjective-antonym-comparative", "hot", "colder"),
        ("verb-past", "go", "went"),
        ("noun-plural", "child", "children"),
        ("letter-next", "z", "a"),
        ("letter-previous", "a", "z"),
        ("letter-next-upper", "a", "B"),
        ("month-next", "December", "January"),
        ("number-next", "99", "0"),
        ("number-previous", "0", "99"),
        ("number-decade", "42", "forties"),
        ("number-decade", "7", "ones"),
        ("number-parity", "7", "odd"),
    ],
)
def test_relations_say_what_their_names_say(name, x, y):
    assert get_task(name).pairs[x] == y


def test_no_word_of_a_relation_is_empty_or_padded():
    for pairs in relations().values():
        for word in (*pairs, *pairs.values()):
            assert word and word == word.strip() and " " not in word


def test_pair_tasks_draw_every_input_as_query_and_in_every_place():
    task = get_task("month-next")
    samples = draws(task, 3, 400)
    for words in ([s.query for s in samples], [s.demos[0][0] for s in samples]):
        counts = Counter(words)
        assert counts.keys() == task.pairs.keys() and max(counts.values()) < 60  # 33 expected
    # The foil answers a demonstration, so the prompt itself argues for it.
    assert all(s.foil in {y for _, y in s.demos} for s in samples)


def test_the_foil_comes_from_elsewhere_where_no_demonstration_differs():
    task = Task.from_pairs({"a": "same", "b": "same", "c": "same", "d": "other"})
    for sample in draws(task, 2, 30):
        assert {sample.answer, sample.foil} == {"same", "other"}


# Bijections


@pytest.mark.parametrize("base", BIJECTIVE)
def test_bijections_are_one_to_one_and_both_directions_are_drawn(base):
    pairs = relations()[base]
    task, identity = get_task(f"{base}-bijection"), get_task(f"{base}-identity")
    assert len(set(pairs.values())) == len(pairs) and not pairs.keys() & set(pairs.values())
    assert len(task.pairs) == 2 * len(pairs)
    assert all(task.pairs[task.pairs[x]] == x != task.pairs[x] for x in task.pairs)
    assert all(identity.pairs[x] == x for x in task.pairs)
    turned = []
    for sample in draws(task, 6, 40):
        shown = [frozenset(pair) for pair in (*sample.demos, (sample.query, sample.answer))]
        assert len(set(shown)) == 7  # no pair is shown twice, in whichever direction
        turned += [x not in pairs for x, _ in (*sample.demos, (sample.query, ""))]
    assert 0.4 < np.mean(turned) < 0.6


# Categorization

_STRINGS = {f"length>={n}": lambda x, n=n: len(x.split()) >= n for n in (2, 3, 4, 5)}
_DIGITS = {f"x>={n}": lambda x, n=n: int(x) >= n for n in range(25, 76)}
_POINTS = {
    f"{name}>={n}": lambda x, a=a, b=b, n=n: a * int(x[0]) + b * int(x[2]) >= n
    for name, a, b, low, high in (
        ("a", 1, 0, 4, 6),
        ("b", 0, 1, 4, 6),
        ("a+b", 1, 1, 8, 11),
        ("a-b", 1, -1, -1, 2),
    )
    for n in range(low, high + 1)
}
RULES = {"simple-string": _STRINGS, "digit": _DIGITS, "2d-data": _POINTS}
INPUTS = {
    "simple-string": [" ".join("a" * n) for n in range(1, 6)],
    "digit": [str(n) for n in range(100)],
    "2d-data": [f"{a} {b}" for a in range(10) for b in range(10)],
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_agrees_with_every_demonstration_and_the_answer(name):
    seen = Counter()
    for sample in draws(name, 9, 400 if name == "digit" else 150):
        demos, query, answer, foil = sample
        seen[sample.rule_name] += 1
        is_high = RULES[name][sample.rule_name]
        labels = Counter(y for _, y in demos)
        assert labels.keys() == {answer, foil} and sorted(labels.values()) == [4, 5]
        high = {y for x, y in (*demos, (query, answer)) if is_high(x)}
        low = {y for x, y in (*demos, (query, answer)) if not is_high(x)}
        assert len(high) == len(low) == 1 and not high & low
        assert all(sample.rule(x) in (high if is_high(x) else low) for x in INPUTS[name])
        assert len({query, *(x for x, _ in demos)}) == 10
    assert seen.keys() == RULES[name].keys()


@pytest.mark.parametrize("name", RULES)
def test_held_out_inputs_are_queries_and_nothing_else(name):
    task = get_task(name).with_queries("held_out")
    for sample in draws(task, 8, 60):
        assert task.held_out(sample.query)
        assert not any(task.held_out(x) for x, _ in sample.demos)
        others = task.other_queries(np.random.default_rng(0), sample)
        assert all(task.held_out(x) for _, x in zip(range(5), others, strict=False))
    either = {task.held_out(s.query) for s in draws(name, 8, 60)}
    assert either == {True, False}  # the default takes both
    seen = task.with_queries("seen")
    assert not any(task.held_out(s.query) for s in draws(seen, 8, 60))
    assert seen.labels == task.labels and seen.name == name
    if name != "simple-string":
        share = np.mean([task.held_out(x) for x in INPUTS[name]])
        assert 0.1 < share < 0.3


@pytest.mark.parametrize("name", RULES)
def test_classes_labels_and_places_are_balanced(name):
    samples = draws(name, 8, 200)
    assert all(sorted(Counter(y for _, y in s.demos).values()) == [4, 4] for s in samples)
    is_high = [RULES[name][s.rule_name](s.query) for s in samples]
    assert 0.4 < np.mean(is_high) < 0.6
    last = [s.demos[-1][1] == s.answer for s in samples]
    assert 0.4 < np.mean(last) < 0.6  # copying the last label is chance
    first = [min(s.answer, s.foil) == s.answer for s in samples]
    assert 0.4 < np.mean(first) < 0.6
    more = Counter(Counter(y for _, y in s.demos)[s.answer] for s in draws(name, 5, 200))
    assert set(more) == {2, 3} and 0.4 < more[2] / 200 < 0.6


@pytest.mark.parametrize("name", RULES)
def test_labels_are_drawn_from_the_words_given(name):
    task = get_task(name)
    assert task.labels == task.answers == label_words()
    assert len(label_words()) > 150 and not set(label_words()) & set(held_out_label_words())
    own = task.with_labels(["red", "blue"])
    assert own.answers == ("red", "blue")
    assert all({s.answer, s.foil} == {"red", "blue"} for s in draws(own, 4, 20))
    assert not any(s.answer in ("red", "blue") for s in draws(name, 0, 20))
    drawn = {s.answer for s in draws(name, 0, 400)}
    assert len(drawn) > 100


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n_demos", [0, 1, 40])
def test_few_and_many_demonstrations_can_be_drawn(name, n_demos):
    for sample in draws(name, n_demos, 10):
        assert len(sample.demos) == n_demos


@pytest.mark.parametrize("name", RULES)
def test_a_bayes_observer_is_right_in_more_than_nine_of_ten_prompts(name):
    # It knows the rules and how inputs are drawn: each input of a class is equally likely.
    if name == "2d-data":  # an orientation first, then a threshold
        prior = {r: 1 / Counter(q.split(">")[0] for q in RULES[name])[r.split(">")[0]]
                 for r in RULES[name]}  # fmt: skip
    else:
        prior = dict.fromkeys(RULES[name], 1.0)
    sizes = {}
    for rule, is_high in RULES[name].items():
        n_high = sum(map(is_high, INPUTS[name]))
        sizes[rule] = n_high, len(INPUTS[name]) - n_high
    right = []
    for sample in draws(name, 8, 400):
        votes = Counter()
        for rule, is_high in RULES[name].items():
            high = {y for x, y in sample.demos if is_high(x)}
            low = {y for x, y in sample.demos if not is_high(x)}
            if len(high) == len(low) == 1 and high != low:
                (guess,) = high if is_high(sample.query) else low
                n_high, n_low = sizes[rule]
                votes[guess] += prior[rule] / (n_high * n_low) ** 4
        assert votes[sample.answer] > 0
        right.append(votes.most_common(1)[0][0] == sample.answer)
    assert np.mean(right) > 0.9, np.mean(right)


def test_a_categorization_needs_two_labels():
    with pytest.raises(PromptError, match=r"expected at least 2 label words, got \('red',\)"):
        get_task("digit").with_labels(["red"])
    with pytest.raises(PromptError, match=r"expected at least 2 label words"):
        get_task("digit").with_labels(["red", "red"])


def test_a_categorization_that_runs_out_of_inputs_says_so():
    task = Categorization(
        "tiny",
        inputs=lambda rng: str(rng.integers(4)),
        held_out=lambda x: x == "3",
        classifier=lambda rng: ("x>=2", lambda x: int(x) >= 2),
        queries="seen",
    )
    with pytest.raises(PromptError, match=r"task 'tiny' ran out of inputs at n_demos=4: ask for"):
        task.sample(np.random.default_rng(0), 4)


# Look-up


def test_lookup_repeats_one_of_the_inputs_shown():
    task = get_task("lookup")
    places = Counter()
    for demos, query, answer, foil in draws(task, 4, 300):
        shown = [x for x, _ in demos]
        assert shown.count(query) == 1 and answer == dict(demos)[query]
        assert foil in {y for _, y in demos} - {answer}
        assert len({w for pair in demos for w in pair}) == 8
        places[shown.index(query)] += 1
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 110
    assert [s.foil != s.answer for s in draws(task, 1, 5)] == [True] * 5


# Pairs of the user


@pytest.mark.parametrize(
    "pairs",
    [
        PAIRS,
        pd.DataFrame({"x": list(PAIRS), "y": list(PAIRS.values())}),
        pd.DataFrame({"y": list(PAIRS.values()), "x": list(PAIRS)}),
        pd.DataFrame({"y": list(PAIRS.values()), "n": 1, "x": list(PAIRS)}, index=[7, 7, 9]),
        pd.DataFrame({"word": list(PAIRS), "opposite": list(PAIRS.values())}),
        pd.DataFrame(list(PAIRS.items())),
    ],
    ids=["dict", "x-y", "y-x", "more columns", "two other columns", "numbered columns"],
)
def test_pairs_come_as_a_dict_or_a_frame(pairs):
    task = Task.from_pairs(pairs)
    assert task.pairs == PAIRS and list(task.pairs) == list(PAIRS)
    assert (task.name, task.family, task.partner) == ("user-pairs", "user", None)
    assert task.answers == ("cold", "down", "right")
    sample = task.sample(np.random.default_rng(0), 2)
    assert dict([*sample.demos, (sample.query, sample.answer)]) == PAIRS
    assert repr(task) == "PairTask('user-pairs', family='user', 3 pairs)"


def test_pairs_keep_the_name_and_family_given_and_equal_pairs_count_once():
    frame = pd.DataFrame({"x": ["hot", "up", "hot"], "y": ["cold", "down", "cold"]})
    task = Task.from_pairs(frame, name="opposites", family="mine")
    assert (task.name, task.family) == ("opposites", "mine")
    assert task.pairs == {"hot": "cold", "up": "down"}


def test_later_changes_to_the_pairs_do_not_reach_the_task():
    pairs = dict(PAIRS)
    task = Task.from_pairs(pairs)
    pairs["hot"] = "warm"
    assert task.pairs["hot"] == "cold"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({}, "expected at least 2 pairs, got 0: add more pairs"),
        ({"hot": "cold"}, "expected at least 2 pairs, got 1"),
        (pd.DataFrame({"x": ["a", "a"], "y": ["b", "b"]}), "expected at least 2 pairs, got 1"),
        ({"one": 1, "two": 2}, r"non-empty strings, got \('one', 1\): convert numbers with str"),
        ({1: "one", 2: "two"}, r"non-empty strings, got \(1, 'one'\)"),
        ({"hot": "", "up": "down"}, r"non-empty strings, got \('hot', ''\)"),
        ({" \n": "cold", "up": "down"}, r"non-empty strings, got \(' \\n', 'cold'\)"),
        (pd.DataFrame({"x": ["a", "b"], "y": ["c", None]}), r"non-empty strings, got \('b', "),
        (pd.DataFrame({"x": ["a", "b", "a"], "y": ["c", "d", "e"]}),
         "input 'a' has two answers, 'c' and 'e': keep one"),
        (pd.DataFrame({"a": ["b"], "c": ["d"], "e": ["f"]}), r"got columns \['a', 'c', 'e'\]"),
        (pd.DataFrame({"x": ["a", "b"]}), r"with columns x and y, got columns \['x'\]"),
        ([("hot", "cold"), ("up", "down")], "expected a dict or a DataFrame of pairs, got list"),
        (None, "expected a dict or a DataFrame of pairs, got NoneType"),
    ],
)  # fmt: skip
def test_pairs_that_are_no_map_of_words_are_refused(pairs, message):
    with pytest.raises(PromptError, match=message):
        Task.from_pairs(pairs)


@pytest.mark.parametrize("name", ["month-next", "digit", "lookup", "verb-past-bijection"])
def test_sizes_that_a_task_cannot_fill_are_refused(name):
    task, rng = get_task(name), np.random.default_rng(0)
    with pytest.raises(PromptError, match=r"expected n_demos of 0 or more, got -1"):
        task.sample(rng, -1)
    with pytest.raises(PromptError, match=rf"'{name}' has inputs for at most \d+ demonstrations"):
        task.sample(rng, 500)
    most = {"month-next": 11, "digit": 40, "verb-past-bijection": len(relations()["verb-past"]) - 1}
    if name in most:
        assert len(task.sample(rng, most[name]).demos) == most[name]
        with pytest.raises(PromptError, match=f"at most {most[name]} .*n_demos={most[name] + 1}:"):
            task.sample(rng, most[name] + 1)


def test_a_task_that_names_no_inputs_cannot_have_its_query_corrupted():
    class Own(Task):
        name, family = "own", "mine"

        def sample(self, rng, n_demos):
            return Sample([("a", "b")] * n_demos, "c", "d", "e")

    own = Own()
    assert own.answers == () and own.partner is None
    with pytest.raises(PromptError, match=r"'own' cannot have the corruption 'query'"):
        own.other_queries(np.random.default_rng(0), own.sample(None, 1))
    with pytest.raises(TypeError, match="abstract"):
        Task()


def test_pairs_from_a_csv_file(tmp_path):
    path = tmp_path / "codes.csv"
    path.write_text("y, x ,note\nNA, Namibia,a code\n FR ,France,\n", "utf-8")
    task = Task.from_csv(path)
    assert task.name == "codes" and task.pairs == {"Namibia": "NA", "France": "FR"}
    assert Task.from_csv(path, name="mine").name == "mine"
    for text, error, message in (
        ("France,Paris\nItaly,Rome\n", FileError, "that names the columns x and y"),
        ("", FileError, "cannot read pairs from"),
        ("x,y\nFrance,Paris\n", PromptError, "expected at least"),
        ("x,y\nFrance,\nItaly,Rome\n", PromptError, "pairs of non-empty strings"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(error, match=message):
            Task.from_csv(path)
    with pytest.raises(FileError, match="cannot read pairs from"):
        Task.from_csv(tmp_path / "nothing.csv")
