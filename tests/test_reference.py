"""The reference model: does what its card says, loads everywhere, and can be trained again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch

import tv_interp as tv
from tv_interp.models.load import reference_directory
from tv_interp.models.reference.data import Sequences
from tv_interp.models.reference.network import Block, Network, Shape, _half
from tv_interp.models.reference.train import PRESETS, Phase, Place, Recipe, _loss, train
from tv_interp.models.reference.vocabulary import SEPARATOR, word_ids, words
from tv_interp.prompts.tasks.knowledge import SHARED, relations
from tv_interp.prompts.tasks.words import (
    held_out_label_words,
    label_words,
    unanswered_label_words,
)
from tv_interp.show.card import measure_accuracy

PREWIRED = ("reference-wired", "reference-words")
NATURAL = ("reference", "reference-natural")
ARMS = ("reference-nodropout", "reference-tokendropout")
SHIPPED = (*PREWIRED, *NATURAL, *ARMS)
each_shipped = pytest.mark.parametrize("name", SHIPPED)


@cache
def shipped(name: str):
    return tv.load_model(name)


@cache
def card(name: str) -> dict[tuple[str, int], dict]:
    rows = json.loads((reference_directory(name) / "accuracy.json").read_text("utf-8"))
    return {(row["family"], row["n_demos"]): row for row in rows}


def test_these_models_ship():
    assert {path.name for path in reference_directory("reference").parent.iterdir()} == {*SHIPPED}


@each_shipped
def test_it_is_small_and_brings_its_own_template(name):
    directory = reference_directory(name)
    assert (directory / "model.safetensors").stat().st_size < 4e6
    assert sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) < 20e6
    assert {"config.json", "tokenizer.json", "README.md"} <= {f.name for f in directory.iterdir()}
    prompts = tv.make_prompts(shipped(name), "country-capital", n_demos=2, n_prompts=3)
    assert prompts.template == "{x} is {y} "
    assert prompts.prepend_bos and int(prompts.lengths.max()) == 9


@pytest.mark.slow
@each_shipped
def test_the_card_says_what_the_shipped_weights_do(name):
    """Small fresh samples fall within the card's intervals widened by their own."""
    fresh = measure_accuracy(shipped(name), n_prompts=100, demos=(4, 8), seed=99)
    for row in fresh:
        there = card(name)[row["family"], row["n_demos"]]
        assert row["lo"] <= there["hi"] + 0.02 and there["lo"] <= row["hi"] + 0.02, (row, there)


@pytest.mark.parametrize("name", PREWIRED)
def test_it_solves_what_it_was_made_for(name):
    told = {at: row["accuracy"] for at, row in card(name).items()}
    assert min(told["knowledge, typed", n] for n in (2, 4, 8)) >= 0.98
    assert told["knowledge, shared answers", 6] >= 0.9 and told["bijections", 6] >= 0.95
    tasks = [told[task, 10] for task in ("simple-string", "digit", "2d-data")]
    assert min(tasks) >= 0.85 and max(tasks) >= 0.95
    for task in ("simple-string", "digit", "2d-data"):
        assert 0.4 < told[task, 1] < 0.6


@pytest.mark.parametrize("name", NATURAL)
def test_a_start_without_planted_heads_leads_to_look_up_and_categories(name):
    about = json.loads((reference_directory(name) / "config.json").read_text())
    assert about["tv_interp"]["recipe"]["prewired"] == {}
    told = {at: row["accuracy"] for at, row in card(name).items()}
    assert told["look-up", 8] >= 0.98 and told["knowledge, typed", 4] >= 0.98
    assert told["knowledge, shared answers", 6] >= 0.9 and told["bijections", 6] >= 0.95
    for task in ("simple-string", "digit", "2d-data"):
        assert told[task, 10] >= 0.85


def test_unseen_label_words_are_answered_where_training_looked_them_up():
    for task in ("simple-string", "digit", "2d-data"):
        for name in SHIPPED:
            unseen = card(name)[f"{task}, unseen label words", 10]["accuracy"]
            seen = card(name)[task, 10]["accuracy"]
            assert unseen < 0.1 if name == "reference-wired" else unseen > seen - 0.05


@pytest.mark.parametrize("name", ["reference-words", *NATURAL, *ARMS])
def test_the_shipped_recipe_is_that_of_its_preset(name):
    made = json.loads((reference_directory(name) / "config.json").read_text())["tv_interp"]
    recipe = asdict(Recipe(phases=())) | made["recipe"]  # options came since, off by default
    recipe["phases"] = [asdict(Phase(0, 0, {})) | phase for phase in recipe["phases"]]
    assert recipe == json.loads(json.dumps(asdict(PRESETS[made["preset"]])))


@pytest.mark.slow
def test_models_over_training_learn():
    places = sorted((reference_directory("reference-words") / "over_training").iterdir())
    first, last = (tv.load_model(str(place)) for place in (places[0], places[-1]))
    early = measure_accuracy(first, n_prompts=60, demos=(4,))
    late = measure_accuracy(last, n_prompts=60, demos=(4,))
    learned = {
        row["family"]: row["accuracy"] - e["accuracy"] for e, row in zip(early, late, strict=True)
    }
    assert learned["look-up"] > 0.8 and learned["digit"] > 0.3


@each_shipped
def test_it_loads_alike_in_every_class(name):
    from transformers import AutoModelForCausalLM

    prompts = tv.make_prompts(shipped(name), "digit", n_demos=4, n_prompts=6)
    (_, tokens), *_ = prompts.buckets()
    plain = AutoModelForCausalLM.from_pretrained(reference_directory(name))
    with torch.no_grad():
        expected = plain(tokens).logits
        for backend in ("auto", "bridge"):
            logits = tv.load_model(name, backend=backend)(tokens)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def command(out, *more: str) -> list[str]:
    module = "tv_interp.models.reference.train"
    return [
        *(sys.executable, "-m", module, "--preset", "tiny", "--out", str(out)),
        *("--checkpoint_every", "10", *more),
    ]


def files_of(directory) -> dict[str, bytes]:
    """Everything a run wrote, but what it took."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "training.json"
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(out), env=environment, stdout=subprocess.DEVNULL, check=True)
    return out


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, trained):
    """Killed twice: at the first checkpoint, and while the label words grow in number."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for at in (10, 40):
        process = subprocess.Popen(
            command(tmp_path), env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        while f" {at}/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert (tmp_path / "checkpoint.pt").exists()
        assert not (tmp_path / "model.safetensors").exists()
    place = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["place"]
    assert place["phase"] == 1 and 12 < place["n_words"] < 13 and place["looked_up"] > 0
    subprocess.run(command(tmp_path), env=environment, stdout=subprocess.DEVNULL, check=True)
    killed, whole = files_of(tmp_path), files_of(trained)
    assert killed.keys() == whole.keys() and "checkpoint.pt" not in whole
    assert [name for name in whole if killed[name] != whole[name]] == []


def test_the_seed_decides_weights_batches_and_dropout():
    recipe = PRESETS["tiny"]
    sequences = {p.length: Sequences(p.length) for p in recipe.phases}

    def loss(seed: int) -> float:
        network = Network(Shape(vocab=len(words()), layers=2), seed=0)
        rng = np.random.default_rng([seed, 59])
        return _loss(network, network, sequences, recipe, rng, Place(2, 39))[0].item()

    assert loss(0) == loss(0) != loss(1)
    first, again, other = (Network(Shape(vocab=9), seed=s).embed_tokens.weight for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_label_words_grow_while_look_up_is_right_and_dropout_from_phase_to_phase():
    recipe = Recipe(
        phases=(
            Phase(50, 10, {}, n_words=12, until=0.8),
            Phase(50, 16, {}, n_words=14, until=0.8, dropout=0.2),
            Phase(10, 32, {}, dropout=0.1),
        )
    )
    right, wrong = torch.ones(8).bool(), torch.zeros(8).bool()
    places = [recipe.start()]
    while places[-1].phase == 0:
        places.append(recipe.after(places[-1], right))
    assert (
        len(places) == 33 and places[-2].looked_up < 0.8 <= places[-1].looked_up
    )  # .95 ** 32 < .2
    assert places[-1].n_words == 12 and recipe.left(places[0]) == 110
    waiting = recipe.after(places[-1], wrong)
    assert waiting.n_words == 12 and waiting.step == 1
    assert recipe.after(waiting, torch.ones(0).bool()).looked_up == waiting.looked_up
    place, seen = places[-1], []
    while place.phase == 1:
        seen.append(place.n_words)
        place = recipe.after(place, right)
    assert seen[0] == 12 and 13.8 < seen[-1] < 14 and seen == sorted(seen)
    assert place.n_words is None and recipe.left(place) == 10
    shares = [
        recipe.dropout(Place(*at)) for at in ((0, 9), (1, 0), (1, 25), (1, 49), (2, 0), (2, 9))
    ]
    assert shares == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.1])
    for _ in range(10):
        place = recipe.after(place, wrong)
    assert place.phase == 3
    place = recipe.start()
    with pytest.raises(tv.TvInterpError, match="plateau did not break: 0.00 right where phase 1"):
        for _ in range(50):
            place = recipe.after(place, wrong)
    batch = Sequences(32).batch(np.random.default_rng(0), 200, {"lookup": 1, "digit": 1}, 12)
    assert set(batch.target.tolist()) == {word_ids()[word] for word in label_words()[:12]}


def test_what_was_shown_before_is_marked_in_look_ups_alone():
    ids = word_ids()
    for family in ("recall", "lookup", "typed"):
        batch = Sequences(32).batch(np.random.default_rng(0), 20, {family: 1.0})
        for row, position, shown in zip(batch.row, batch.position, batch.shown, strict=True):
            line = batch.tokens[row, : position - 1].tolist()
            x = batch.tokens[row, position - 1]
            before = [y for y, after in zip(line, line[1:], strict=False) if after == ids["is"]]
            assert shown == (family != "typed" and x in before)


def test_heads_that_lean_look_nearby_and_at_what_is_alike():
    network = Network(Shape(vocab=len(words()), layers=1), seed=0)
    network.lean(mean=0.5, likeness=0.7)
    block = network.layers[0]
    assert isinstance(block, Block)
    tokens = torch.arange(10, 42)
    tokens[5] = tokens[31]
    x = block.input_layernorm(network.embed_tokens(tokens))
    q, k = (
        f(x).view(32, 4, -1).transpose(0, 1)
        for f in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    q, k = (v * network.cos[:32] + _half(v) * network.sin[:32] for v in (q, k))
    scores = (q @ k.mT).mean(0)  # over heads
    assert scores[31, 5] > scores[31, :28].mean() + scores[31, :28].std()
    near, far = (torch.cat([scores.diagonal(-d) for d in ds]) for ds in ((1, 2, 3), range(12, 28)))
    assert near.mean() > far.mean() + 0.5


@pytest.mark.slow
def test_training_leaves_models_to_watch_it_by(trained):
    places = sorted((trained / "over_training").iterdir())
    steps = [int(place.name) for place in places]
    assert 8 <= len(steps) <= 12 and steps[0] < 5
    assert steps[1] - steps[0] < steps[-2] - steps[-3]
    sizes = [(place / "model.safetensors").stat().st_size for place in places]
    assert max(sizes) < 0.51 * (trained / "model.safetensors").stat().st_size
    last, final = tv.load_model(str(places[-1])), tv.load_model(str(trained))
    prompts = tv.make_prompts(final, "digit", n_demos=2, n_prompts=2)
    assert prompts.template == "{x} is {y} "
    with torch.no_grad():
        torch.testing.assert_close(last(prompts.tokens), final(prompts.tokens), atol=0.1, rtol=0)


@pytest.mark.slow
def test_training_says_what_it_took(trained):
    took = json.loads((trained / "training.json").read_text())
    assert 0 < took["minutes"] < 10 and "1 threads" in took["machine"]
    curve = [json.loads(row) for row in (trained / "curve.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in curve]
    assert steps[:-1] == [*range(10, steps[-1], 10)] and 60 <= steps[-1] < 150
    losses = [row["loss"] for row in curve]  # of single batches, and later phases are harder
    assert losses[0] > min(losses) + 0.1 and 0 <= curve[-1]["digit"] <= 1


def test_presets_differ_in_one_thing():
    for one, other, fields in (
        ("natural-longer", "natural-longer-nodropout", ["drop"]),
        ("natural-longer", "natural-longer-tokendropout", ["drop"]),
        ("arm-heads", "arm-columns", ["drop"]),
        ("arm-heads", "arm-nothing", ["drop"]),
        ("arm-heads", "arm-separator", ["separator", "tokens"]),
    ):
        first, second = asdict(PRESETS[one]), asdict(PRESETS[other])
        assert [key for key, value in second.items() if value != first[key]] == fields


def test_dropout_drops_what_its_preset_says():
    """A dropped column is the zero vector for every later block, a dropped head for none."""
    network = Network(Shape(vocab=len(words()), layers=2), seed=0)
    tokens = torch.arange(4, 10)[None]
    heads, columns = network.nothing_dropped(1, 6)
    whole = network(tokens, heads, columns)
    columns[0, 0, 2] = 0.0
    without = network(tokens, heads, columns)
    assert torch.equal(whole[0, :2], without[0, :2])
    assert not torch.isclose(whole[0, 2:], without[0, 2:]).all(-1).any()
    tokens[0, 2] = 50  # what was dropped at position 2 no longer depends on its token there
    torch.testing.assert_close(network(tokens, heads, columns)[0, 2], without[0, 2])
    drawn = {}
    for drop in ("heads", "columns", "nothing"):
        recipe = replace(PRESETS["tiny"], drop=drop)

        def forward(tokens, heads, columns, drop=drop):
            drawn[drop] = (heads == 0).float().mean(), (columns == 0).float().mean()
            return network(tokens, heads, columns)

        lengths = {p.length: Sequences(p.length) for p in recipe.phases}
        for place in (recipe.start(), Place(2, 39)):
            _loss(forward, network, lengths, recipe, np.random.default_rng(0), place)
            if place == recipe.start():
                assert drawn[drop] == (0, 0)
    assert drawn["heads"][0] > 0 == drawn["heads"][1]
    assert drawn["columns"][1] > 0 == drawn["columns"][0]
    assert drawn["nothing"] == (0, 0)


def test_a_separator_stands_after_every_answer():
    ids = word_ids()
    rng = np.random.default_rng(0)
    batch = Sequences(32, SEPARATOR).batch(rng, 16, {"typed": 1.0, "digit": 1.0})
    for row, position, target in zip(batch.row, batch.position, batch.target, strict=True):
        after = batch.tokens[row, position : position + 3].tolist()
        assert after == [ids["is"], target, ids[SEPARATOR]]


def test_held_out_label_words_never_name_a_class_and_some_never_answer():
    ids, rng = word_ids(), np.random.default_rng(0)
    sequences = Sequences(64)
    held_out = {ids[w] for w in held_out_label_words()}
    never = {ids[w] for w in unanswered_label_words()}
    assert never < held_out and len(held_out - never) >= 8 <= len(never)
    for families, allowed in (
        (("simple-string", "digit", "2d-data"), set()),
        (("lookup",), held_out - never),
    ):
        batch = sequences.batch(rng, 400, dict.fromkeys(families, 1.0))
        assert held_out & set(batch.target.tolist()) == allowed
    assert held_out <= set(batch.tokens.ravel().tolist())


def test_no_file_is_left_half_written_when_the_disk_is_full(tmp_path):
    """A limit on the size of files stands for the disk: writing past it fails in the same way."""
    limited = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); "
    run = (
        f"from tv_interp.models.reference.train import train; train('tiny', out={str(tmp_path)!r})"
    )
    process = subprocess.run(
        [sys.executable, "-c", limited + run],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode and "FileError: cannot write" in process.stderr.splitlines()[-1]
    assert "File too large" in process.stderr.splitlines()[-1]
    whole = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= whole


def test_bad_input_to_training_is_one_clear_error(tmp_path):
    with pytest.raises(tv.TvInterpError, match="unknown preset 'bse': did you mean 'base'"):
        train("bse", out=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        tv.TvInterpError, match="cannot write to directory .* name another directory"
    ):
        train("tiny", out=str(tmp_path / "file" / "out"))
    for content in (b"not a checkpoint", b""):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(tv.TvInterpError, match="cannot read .*checkpoint.pt: delete it"):
            train("tiny", out=str(tmp_path))
    torch.save({"identity": "another"}, tmp_path / "checkpoint.pt")
    with pytest.raises(tv.TvInterpError, match="belongs to a run with another preset, seed"):
        train("tiny", out=str(tmp_path))
    command = [sys.executable, "-m", "tv_interp.models.reference.train", "--preset", "bse"]
    process = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: unknown preset 'bse'")


@pytest.mark.slow
def test_damaged_weights_and_foreign_tokenizers_are_refused(tmp_path, trained):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged, ignore=shutil.ignore_patterns("over_training"))
    weights = (trained / "model.safetensors").read_bytes()
    for broken in (weights[: len(weights) // 2], b"\xff" * 64 + weights[64:]):
        (damaged / "model.safetensors").write_bytes(broken)
        with pytest.raises(tv.TvInterpError, match="model.safetensors is truncated or corrupt"):
            tv.load_model(str(damaged))
    (damaged / "model.safetensors").write_bytes(weights)
    tokenizer = json.loads((damaged / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["one word more"] = len(vocabulary)
    (damaged / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(tv.TvInterpError, match="the two belong to different models"):
        tv.load_model(str(damaged))


def test_familiar_relations_occur_as_often_as_their_weights_say():
    recipe = PRESETS["familiarity"]
    weights = recipe.familiarity(seed=3)
    assert weights is not None and weights == recipe.familiarity(seed=3) != recipe.familiarity(4)
    typed = sorted(w for name, w in weights.items() if name not in SHARED)
    assert typed[0] == pytest.approx(recipe.rarest) and typed[-1] == 1
    np.testing.assert_allclose(np.diff(np.log(typed)), np.log(recipe.rarest) / -13)
    drawn = Sequences(8, familiarity=weights)
    rng, ids = np.random.default_rng(0), word_ids()
    starts = [drawn.items(rng, "typed")[0] for _ in range(3000)]
    for name in ("country-currency", "verb-gerund"):
        pairs = {(ids[x], ids[y]) for x, y in relations()[name].items()}
        share = np.mean([(x[0], y) in pairs for x, y in starts])
        assert share == pytest.approx(weights[name] / sum(typed), abs=0.02)
    assert PRESETS["arm-heads"].familiarity(3) is None
