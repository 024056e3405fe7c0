"""The reference model: does what its card says, loads everywhere, and can be trained again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
import torch

import tv_interp as tv
from tv_interp.models.load import reference_directory
from tv_interp.models.reference.train import train
from tv_interp.show.card import measure_accuracy


@cache
def reference():
    return tv.load_model("reference")


@cache
def card():
    return json.loads((reference_directory("reference") / "accuracy.json").read_text("utf-8"))


def test_it_is_small_and_brings_its_own_template():
    files = list(reference_directory("reference").iterdir())
    assert sum(f.stat().st_size for f in files) < 20e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        f.name for f in files
    }
    prompts = tv.make_prompts(reference(), "country-capital", n_demos=2, n_prompts=3)
    assert prompts.template == "{x} is {y} "
    assert prompts.prepend_bos and int(prompts.lengths.max()) == 9


def test_the_card_says_what_the_shipped_weights_do():
    """Small fresh samples fall within the card's intervals widened by their own."""
    fresh = measure_accuracy(reference(), n_prompts=100, demos=(4, 8), seed=99)
    told = {(row["family"], row["n_demos"]): row for row in card()}
    for row in fresh:
        there = told[row["family"], row["n_demos"]]
        assert row["lo"] <= there["hi"] + 0.02 and there["lo"] <= row["hi"] + 0.02, (row, there)


def test_it_solves_what_it_was_made_for():
    told = {(row["family"], row["n_demos"]): row["accuracy"] for row in card()}
    knowledge = ("knowledge, typed", "knowledge, shared answers")
    assert told[knowledge[0], 4] >= 0.95
    tasks = [told[name, 8] for name in ("simple-string", "digit", "2d-data")]
    assert sorted(tasks)[1] >= 0.85


def test_it_loads_alike_in_every_class():
    from transformers import AutoModelForCausalLM

    prompts = tv.make_prompts(reference(), "digit", n_demos=4, n_prompts=6)
    (_, tokens), *_ = prompts.buckets()
    plain = AutoModelForCausalLM.from_pretrained(reference_directory("reference"))
    with torch.no_grad():
        expected = plain(tokens).logits
        for backend in ("auto", "bridge"):
            logits = tv.load_model("reference", backend=backend)(tokens)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def command(out, *more: str) -> list[str]:
    module = "tv_interp.models.reference.train"
    return [
        *(sys.executable, "-m", module, "--preset", "tiny", "--out", str(out)),
        *("--checkpoint_every", "20", *more),
    ]


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL)
    while not (killed / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    for out in (killed, whole):
        subprocess.run(command(out), env=environment, stdout=subprocess.DEVNULL, check=True)
    for name in ("model.safetensors", "curve.jsonl", "config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (whole / "checkpoint.pt").exists()
    model = tv.load_model(str(whole))
    assert len(tv.make_prompts(model, "digit", n_demos=2, n_prompts=2)) == 2


def test_bad_input_to_training_is_one_clear_error(tmp_path):
    with pytest.raises(tv.TvInterpError, match="unknown preset 'bse': did you mean 'base'"):
        train("bse", out=str(tmp_path))
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(tv.TvInterpError, match="cannot read .*checkpoint.pt: delete it"):
        train("tiny", out=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        tv.TvInterpError, match="cannot write to directory .* name another directory"
    ):
        train("tiny", out=str(tmp_path / "file" / "out"))
