"""The card's phenomena: vectors at the layer chosen on dev, answers taken away, learning curves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import tv_interp as tv
from tv_interp.models.load import reference_directory
from tv_interp.models.reference.vocabulary import SEPARATOR, template
from tv_interp.show.card import write_card
from tv_interp.show.learning import plot_learning, read_curve
from tv_interp.show.phenomena import KINDS, WITHOUT, measure_phenomena, phenomena_section

MODEL = "reference-natural"
HERE = [kind for kind in KINDS if kind != "separator"]  # its template has none


@pytest.fixture(scope="module")
def rows():
    tasks = ("digit", "verb-past-bijection")
    return measure_phenomena(tv.load_model(MODEL), tasks, n_demos=6, n_prompts=48)


def row(rows, kind, task="digit"):
    (found,) = [r for r in rows if (r["kind"], r["task"]) == (kind, task)]
    return found


def test_every_task_has_a_row_of_each_kind_past_block_0(rows):
    assert [r["kind"] for r in rows] == [*HERE, WITHOUT, *HERE]
    for r in rows:
        if r["kind"] != WITHOUT:
            assert 1 <= r["layer"] < len(r["by_layer"]) and r["n"] <= 48
            assert r["value"] == pytest.approx(r["by_layer"][r["layer"]], abs=1e-4)
            assert r["gain_value"] == pytest.approx(r["value"] - r["recipient"], abs=2e-4)
            assert r["lo"] <= r["value"] <= r["hi"]


def test_categories_travel_in_the_answers_and_not_in_the_query(rows):
    assert row(rows, "local")["gain_lo"] > 0.1 and row(rows, "local")["label_rate"] > 0.9
    assert row(rows, "global")["gain_lo"] < 0.1


def test_accuracy_falls_as_answers_are_taken_away(rows):
    lost = row(rows, WITHOUT)
    assert len(lost["value"]) == 7
    assert lost["value"][0] > lost["value"][-1] + 0.2
    few_shot = row(rows, "local")["few_shot"]
    assert lost["value"][0] == pytest.approx(few_shot, abs=0.1)


def test_the_section_shows_what_was_measured(rows):
    lines = phenomena_section(rows)
    local = row(rows, "local")
    shown = f"| {local['layer']} | {local['value']:.2f} [{local['lo']:.2f}, {local['hi']:.2f}] |"
    assert any(line.startswith("| digit |") and shown in line for line in lines)
    assert "| task | 0 of 6 | 1 of 6 | 2 of 6 | 3 of 6 | 4 of 6 | 5 of 6 | 6 of 6 |" in lines


def test_the_relations_that_gain_are_counted(rows):
    gains = ((0.5, 0.2), (0.4, 0.1), (0.9, -0.1))
    of = row(rows, "global") | {"family": "knowledge"}
    known = [of | {"gain_value": value, "gain_lo": lo} for value, lo in gains]
    assert (
        "Of 3 relations, 2 gain 0.5 or more; in 2 the interval of the gain is above 0."
        in phenomena_section(known)
    )
    assert not any(line.startswith("Of ") for line in phenomena_section(rows))


def test_the_same_seed_measures_the_same(rows):
    again = measure_phenomena(tv.load_model(MODEL), ["digit"], n_demos=6, n_prompts=48)
    assert again == rows[: len(again)]


def test_learning_is_drawn_as_training_wrote_it(tmp_path):
    rows = read_curve(MODEL)
    lines = (reference_directory(MODEL) / "curve.jsonl").read_text().splitlines()
    assert rows == [json.loads(line) for line in lines]
    figure = plot_learning({MODEL: rows, "the same": rows})
    digit = [trace for trace in figure.data if trace.name == "digit"]
    assert len(digit) == 2 and [t.showlegend for t in digit] == [True, False]
    np.testing.assert_array_equal(digit[0].y, [r["digit"] for r in rows])
    with pytest.raises(tv.TvInterpError, match="expected the name of a shipped model or a dir"):
        read_curve(tmp_path / "nowhere")
    with pytest.raises(tv.TvInterpError, match="directory with curve.jsonl, got 'nowhere'"):
        write_card("nowhere")
    shutil.copy(reference_directory(MODEL) / "curve.jsonl", tmp_path)
    with pytest.raises(tv.TvInterpError, match="no accuracy.json: run --parts accuracy"):
        write_card(str(tmp_path), parts="claims")
    with pytest.raises(tv.TvInterpError, match="expected at least one learning curve"):
        plot_learning({})


def test_vectors_of_separators_are_measured_where_the_template_has_one():
    model = tv.load_model("reference-words")  # it knows the separator
    model.tokenizer.init_kwargs["tv_template"] = template(SEPARATOR)
    found = measure_phenomena(model, ["verb-gerund"], n_demos=4, n_prompts=16)
    assert [row["kind"] for row in found] == list(KINDS)
    (row,) = [row for row in found if row["kind"] == "separator"]
    # in the last block nothing reads the separators any more
    assert row["by_layer"][-1] == pytest.approx(row["recipient"])
    assert "Separator: the same with the vectors" in "\n".join(phenomena_section(found))
