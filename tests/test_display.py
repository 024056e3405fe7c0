"""Results show themselves, in a terminal and in a notebook; what is in them does no harm."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from test_prompts import fixed
from test_prompts import model as model_of
from test_scores import scores

import tv_interp as tv
from tv_interp.display import Shown, Table, Tokens, as_html, as_text, columns, readable
from tv_interp.models import planted
from tv_interp.prompts import make_prompts

EVIL = '<img src=x onerror="window.pwned=1">'
HOSTILE = (
    EVIL,
    "</bdi></span></div></pre><script>window.pwned=1</script>",
    "a\nb\r\tc",
    "\x1b[31mred\x07",
    "\u202eturned\u2066",
    "🦊🦊",
    "שלום עולם",
    "漢字",
    "<bos>",
    "&amp;",
    "",
)
HARMLESS = {"div", "span", "bdi", "small", "pre", "table", "thead", "tbody", "tr", "th", "td"}


class Parsed(HTMLParser):
    """What a browser would make of a fragment: elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@functools.cache
def examples() -> dict[str, Shown]:
    """One of each kind that is made without a model that takes time."""
    case = planted.build("write_then_read")
    prompts = make_prompts(case.model, case.task, n_demos=3, n_prompts=8)
    contrast = prompts.corrupt("answers")
    edges = tv.score_edges(case.model, contrast, method="eap")
    return {
        "Prompts": prompts,
        "Contrast": contrast,
        "Scores": scores(),
        "Circuit": tv.discover_circuit(case.model, contrast, scores=edges, n_edges=20),
        "HeadReport": tv.find_heads(
            case.model, case.task, n_demos=3, n_prompts=12, corruptions=case.corruptions
        ),
        "PlantedCircuit": tv.planted_circuit(seed=0),
        "Vectors": tv.extract_vectors(case.model, prompts),
    }


def assert_harmless(fragment: str) -> Parsed:
    page = Parsed(fragment)
    assert page.open == [] and set(page.tags) <= HARMLESS and page.attributes <= {"style", "class"}
    colours = re.findall(r"(?<!-)(?:color|background):([^;\"]*)", fragment)
    assert all(c in ("inherit", "none") or c.startswith("rgba(") for c in colours), "any ground"
    return page


def assert_fits(text: str, width: int = 80) -> None:
    lines = text.split("\n")
    assert max(map(columns, lines)) <= width
    assert all(unicodedata.category(c) != "Cc" for line in lines for c in line)


@pytest.mark.parametrize("name", ["Prompts", "Contrast", "Scores", "Circuit", "HeadReport"])
def test_a_result_shows_itself_at_80_columns_and_in_a_notebook(name):
    shown = examples()[name]
    assert_fits(str(shown))
    page = assert_harmless(shown._repr_html_())
    assert len(shown._repr_html_()) < 60_000
    said = " ".join(page.texts)
    words = set(re.findall(r"L\dH\d|0\.\d{3}|query_is", str(shown)))
    assert words and words <= set(re.findall(r"L\dH\d|0\.\d{3}|query_is", said))


def test_a_circuit_of_many_heads_fits_too():
    model = tv.load_model("reference")
    contrast = make_prompts(model, "country-capital", n_demos=4, n_prompts=8).corrupt("task")
    circuit = tv.discover_circuit(model, contrast, method="eap", n_edges=200)
    assert len(", ".join(circuit.readers)) > 80, "nothing to break"
    report = tv.evaluate_circuit(model, contrast, circuit, n_random=2, minimality="none")
    for shown in (circuit, report):
        assert_fits(str(shown))
        assert all(head in str(shown) for head in (*circuit.writers, *circuit.readers))


def test_no_repr_is_a_dump_of_arrays():
    for shown in examples().values():
        assert (
            len(repr(shown)) < 6000 and "array(" not in repr(shown) and "tensor" not in repr(shown)
        )


def test_every_result_that_users_print_shows_itself():
    names = (
        *("Prompts", "Contrast", "Scores", "Vectors", "Circuit", "CircuitReport", "Claims"),
        *("HeadReport", "HeadRanking", "VectorReport", "Convergence", "Geometry", "Predictions"),
        *("OneVector", "Combination", "Swept", "RoleGraph", "PlantedCircuit"),
    )
    for name in names:
        kind = getattr(tv, name)
        assert issubclass(kind, Shown), name
        assert kind.__str__ is not Shown.__str__ or kind.__repr__ is not Shown.__repr__, name


@pytest.mark.parametrize("token", HOSTILE)
def test_a_hostile_token_is_shown_as_it_is_and_does_nothing(token):
    blocks = [Tokens([(token, "x", "x[0]")], "title"), Table(("token", "n"), [(token, "1")])]
    page = assert_harmless(as_html(blocks))
    assert page.texts.count(readable(token)) >= 1
    assert_fits(as_text(blocks))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", as_html(blocks))


def test_hostile_words_of_a_task_pass_through_prompts_harmlessly():
    task = fixed([("🦊", "שלום"), ("漢字", "naïve"), ("<b>", EVIL.replace(" ", "/"))])
    prompts = make_prompts(model_of("byte_level"), task, n_demos=3, n_prompts=1)
    pieces = prompts.pieces(0)
    assert len(pieces) == int(prompts.lengths[0]) > 20, "characters are split into bytes"
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    page = assert_harmless(prompts._repr_html_())
    assert [text for text in page.texts if text in pieces]
    assert_fits(str(prompts))
    evil = replace(examples()["HeadReport"], notes=HOSTILE)
    assert EVIL in " ".join(assert_harmless(evil._repr_html_()).texts)


def test_the_printed_heads_say_what_their_words_mean_and_how_they_are_ordered():
    report = examples()["HeadReport"]
    sources = {f"demonstration_{i}": 0.5 - i / 100 for i in range(4)}
    shown = str(replace(report, readers=(replace(report.readers[0], sources=sources),)))
    head = shown.split("WRITERS")[0]
    for verdict, how in (("sufficient", "denoise"), ("necessary", "noise"), ("both", "either")):
        assert re.search(rf"{verdict}: [^;.]*\b{how}\b", head.replace("\n", " "))
    assert "in the order of their largest share" in head
    assert_fits(shown)
    (line,) = (i for i, text in enumerate(shown.split("\n")) if "demonstration_0" in text)
    first, more = shown.split("\n")[line : line + 2]
    assert "demonstration_3" in more, "what is broken off"
    assert len(more) - len(more.lstrip()) > len(first) - len(first.lstrip()) == 9


def test_heads_are_in_the_order_that_is_told():
    for group in ("writers", "copiers", "readers", "relays"):
        shares = [abs(head.best.recovered) for head in getattr(examples()["HeadReport"], group)]
        assert shares == sorted(shares, reverse=True)


def test_a_share_above_the_whole_is_explained_where_it_is_printed():
    report = examples()["HeadReport"]
    words = "work against the task"
    assert report.joint and words not in str(report)
    (first, *rest) = report.joint
    above = replace(first, effect=replace(first.effect, recovered=1.09))
    assert words in str(replace(report, joint=(above, *rest)))


def test_columns_of_wide_characters_stand_below_each_other():
    text = as_text(
        [Tokens([("🦊", "x", "x[0]"), ("漢字漢字", "is", "is[0]"), ("a", "bos", "bos")])]
    )
    above, below = text.split("\n")
    assert columns(above[: above.index("a")]) == below.index("bos")


def test_tables_put_numbers_at_the_right_and_shorten_what_does_not_fit():
    text = as_text([Table(("name", "n"), [("a" * 200, "+1.0"), ("b", "-10.0")])], width=40)
    head, first, second = text.split("\n")
    assert len(first) == 40 and first.endswith("…   +1.0") and second.endswith("-10.0")
    assert head.endswith("n") and len(head) == 40


def test_the_numbers_of_printed_scores_are_those_of_their_intervals():
    for total, of in (("clear", "recovered"), ("unclear", "mean")):
        s = scores(total=total)
        table = s.ci(of)
        form = "{:+.3f}" if of == "recovered" else "{:+.4g}"
        order = np.argsort(-abs(s.mean().values).ravel())
        rows = str(s).split("\n\n")[-1].split("\n")[1:]
        assert len(rows) == 6
        for row, flat in zip(rows, order, strict=True):
            layer, head = divmod(int(flat), 3)
            at = {k: form.format(float(table[k][layer, head])) for k in ("value", "lo", "hi")}
            assert row.split() == [
                str(layer),
                str(head),
                at["value"],
                f"[{at['lo']},",
                at["hi"] + "]",
            ]


def test_scores_without_other_axes_show_their_mean():
    s = scores(np.ones((24,)) + np.arange(24) / 100, dims=())
    assert re.search(r"recovered +interval\n +\+0\.\d{3}  \[", str(s))
    assert_harmless(s._repr_html_())
