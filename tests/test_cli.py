"""The command line: checked before anything is loaded, one clear line for bad input."""

from __future__ import annotations

import json
import sys

import pytest

from tv_interp import cli


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    """Bad input must be found before a model is loaded."""
    from tv_interp.models import load

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(load, "load_model", refuse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "contry-capital"], "unknown task 'contry-capital': did you mean"),
        (["--template", "{x} foo"], "expected a template with {x} and then {y}"),
        (["--corruptions", "answers", "shuffle"], "unknown corruption 'shuffle'"),
        (["--corruptions", "labels", "answers"], "exchanges the two labels of a categorization"),
        (["--task", "digit", "--corruptions", "task", "labels"], "needs another relation"),
        (["--metric", "logit"], "unknown metric 'logit': did you mean 'logit_diff'"),
        (["--n-demos", "0"], "expected n_demos of 1 or more, got 0"),
        (["--n-demos", "many"], "Expected a <class 'int'>"),
        (["--n-prompts", "1"], "expected n_prompts of 4 or more"),
        (["--fdr", "2"], "expected fdr between 0 and 1"),
        (["--n-demos", "60"], "has inputs for at most 44 demonstrations"),
        (["--backend", "jax"], "Literal['auto', 'hooked', 'bridge']"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, "heads", *arguments)
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["circuit", "--task", "contry-capital"], "unknown task 'contry-capital': did you mean"),
        (
            ["circuit", "--method", "eep"],
            "Literal['exact', 'eap', 'eap-ig', 'eap-ig-activations', 'acdc', 'nodes']",
        ),
        (["circuit", "--method", "acdc"], "method='acdc' needs threshold"),
        (["circuit", "--corruption", "labels"], "exchanges the two labels of a categorization"),
        (["circuit", "--n-edges", "0"], "expected n_edges of 1 or more, got 0"),
        (["circuit", "--ablation", "noise"], "Literal['corrupted', 'mean', 'zero']"),
        (["circuit", "--n-prompts", "2"], "expected n_prompts of 4 or more"),
        (["saliency", "--metric", "logit"], "unknown metric 'logit': did you mean 'logit_diff'"),
        (["saliency", "--n-demos", "60"], "has inputs for at most 44 demonstrations"),
    ],
)
def test_bad_input_of_circuit_and_saliency_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and message in err


def test_pairs_come_from_a_file(capsys, tmp_path, monkeypatch):
    from tv_interp.prompts import get_task

    a_model(monkeypatch)
    path = tmp_path / "capitals.csv"
    pairs = list(get_task("country-capital").pairs.items())[:12]
    path.write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in pairs), "utf-8")
    sizes = ["--n-demos", "2", "--n-prompts", "8", "--json"]
    code, out, err = run(capsys, "saliency", "--task", str(path), *sizes)
    assert code == 0, err
    assert [row["layer"] for row in json.loads(out)] == [0, 1]
    code, _, err = run(capsys, "heads", "--task", str(tmp_path / "capitols.csv"))
    assert code == 2 and "cannot read pairs from" in err and len(err.strip().splitlines()) == 1
    code, _, err = run(capsys, "heads", "--task", str(path), "--n-demos", "30")
    assert code == 2 and "has inputs for at most 11 demonstrations" in err


def a_model(monkeypatch):
    """Let commands load a tiny random model in place of what they name."""
    from conftest import KINDS
    from random_models import hf_model, word_tokenizer

    from tv_interp.models import load
    from tv_interp.models.convert import bridge_from_hf, hooked_from_hf
    from tv_interp.prompts import get_task

    pairs = get_task("country-capital").pairs
    known = [word for pair in pairs.items() for word in pair]
    build = hooked_from_hf if KINDS[0] == "hooked" else bridge_from_hf
    tokenizer = word_tokenizer(["is", *known])
    model = build(hf_model("gpt2", n_layers=2, d_vocab=len(tokenizer)), tokenizer)
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: model)


def test_circuit_and_saliency_write_what_they_print(capsys, tmp_path, monkeypatch):
    import tv_interp as tv

    a_model(monkeypatch)
    sizes = ["--n-demos", "2", "--n-prompts", "8", "--out", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", ["tv-interp", "circuit", *sizes])
    code, out, err = run(
        capsys, "circuit", "--method", "eap", "--metric", "kl", "--n-edges", "300", *sizes
    )
    assert code == 0, err
    printed = json.loads(out)
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert len(tv.Circuit.load(tmp_path / "circuit.json")) == printed["n_edges"] > 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert (
        "tv-interp circuit --n-demos 2 --n-prompts 8" in page
        and str(printed["faithfulness"]["value"]) in page
    )
    code, out, _ = run(capsys, "saliency", *sizes)
    assert code == 0 and [row["layer"] for row in json.loads(out)] == [0, 1]
    assert tv.Scores.load(tmp_path / "saliency.nc").data.sizes["layer"] == 2


def test_an_output_directory_that_cannot_be_written_is_said_first(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, "heads", "--out", str(tmp_path / "file" / "out"))
    assert code == 2 and out == ""
    assert "cannot write to directory" in err and "name another" in err


def test_no_command_is_an_error(capsys):
    code, _, err = run(capsys)
    assert code == 2 and "{heads,vectors,circuit,saliency,linear, ...}" in err


def test_tasks_lists_every_family_in_80_columns_and_as_json(capsys):
    code, out, _ = run(capsys, "tasks")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "country-capital" in out and "simple-string" in out
    code, out, _ = run(capsys, "tasks", "--family", "categorization", "--json")
    assert [row["name"] for row in json.loads(out)] == ["simple-string", "digit", "2d-data"]


def test_models_lists_the_reference_model(capsys):
    code, out, _ = run(capsys, "models", "--json")
    assert code == 0
    (row,) = [r for r in json.loads(out) if r["name"] == "reference"]
    assert row["megabytes"] < 20


def test_help_shows_options_and_defaults(capsys):
    code, out, _ = run(capsys, "heads", "--help")
    assert code == 0
    told = " ".join(out.split())  # wherever lines are broken
    for text in ("--n-demos", "default: 8", "--out", "--json", "default: country-capital"):
        assert text in told
