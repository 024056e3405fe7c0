"""Recorded runs on the CPU or on disk: the same numbers in less memory, and nothing left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from conftest import tiny_model
from random_models import words

import tv_interp as tv
from tv_interp.errors import FileError, TvInterpError
from tv_interp.models.adapter import Adapter

PAIRS = {w: words()[30 + i] for i, w in enumerate(words()[3:28])}


def pairs(model, n: int = 3, n_demos: int = 3):
    clean = tv.make_prompts(model, tv.Task.from_pairs(PAIRS), n_demos=n_demos, n_prompts=n, seed=3)
    return clean.corrupt("answers", seed=1)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_numbers_are_the_same_and_no_prompt_runs_twice(arch, where, kind, tmp_path, monkeypatch):
    model = tiny_model(arch, kind)
    contrast = pairs(model)
    calls, plain = [], Adapter.tape
    monkeypatch.setattr(Adapter, "tape", lambda *a: calls.append(len(a[1])) or plain(*a))
    store = "cpu" if where == "cpu" else f"disk:{tmp_path}"
    recorded = tv.record(model, contrast, max_memory=5e5, store=store)
    assert sum(calls) == 2 * len(contrast) and len(calls) > 2
    usual = tv.record(model, contrast)
    calls.clear()
    for call in (
        lambda r: tv.patch_heads(model, contrast, recorded=r),
        lambda r: tv.patch_sources(model, contrast, heads=[(1, 2)], parts=["k"], recorded=r),
        lambda r: tv.patch_paths(model, contrast, receivers=["L2H1.z@query_is"], recorded=r),
        lambda r: tv.knock_out(model, contrast.clean, recorded=r.clean),
    ):
        # batches of other sizes: equal to rounding
        np.testing.assert_allclose(call(recorded).data, call(usual).data, atol=2e-5)
    assert not calls


def test_files_go_with_the_last_reference(kind, tmp_path):
    model = tiny_model("gpt2", kind)
    recorded = tv.record(model, pairs(model), store=f"disk:{tmp_path}/deep")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    clean = recorded.clean
    del recorded
    gc.collect()
    assert list(tmp_path.rglob("*.safetensors"))  # the run still needs them
    del clean
    gc.collect()
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]


def test_files_go_after_an_exception_and_at_the_end_of_python(tmp_path, monkeypatch):
    from conftest import KINDS

    model = tiny_model("gpt2", KINDS[0])
    contrast = pairs(model)
    real, n = safetensors.torch.save_file, []

    def full(*args, **kwargs):
        n.append(1)
        if len(n) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(FileError, match="cannot write a recorded run to .*No space left on device"):
        tv.record(model, contrast, store=f"disk:{tmp_path}")
    assert not list(tmp_path.rglob("*"))
    monkeypatch.undo()

    def dies():
        held = tv.record(model, contrast, store=f"disk:{tmp_path}")
        assert list(tmp_path.rglob("*.safetensors"))
        raise SystemExit(3 if held else 0)

    process = multiprocessing.get_context("fork").Process(target=dies)
    process.start()
    process.join()
    assert process.exitcode == 3 and not list(tmp_path.rglob("*"))
    monkeypatch.setattr(Adapter, "tape", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tv.record(model, contrast, store=f"disk:{tmp_path}")
    gc.collect()
    assert not list(tmp_path.rglob("*"))


def peak(call) -> int:
    """Bytes by which the most memory that a fork held grows."""

    def most() -> int:
        line = next(s for s in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in s)
        return int(line.split()[1]) * 1024

    def measured(end) -> None:
        before = most()
        call()
        end.send(most() - before)

    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=measured, args=(theirs,))
    process.start()
    found = ours.recv()
    process.join()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_on_disk_less_memory_is_held_at_the_peak(tmp_path):
    from conftest import KINDS

    model = tiny_model("gpt2", KINDS[0])
    contrast = pairs(model, n=500, n_demos=20)
    tv.record(model, contrast.select([0, 1]))
    usual = peak(lambda: tv.record(model, contrast))
    disk = peak(lambda: tv.record(model, contrast, max_memory=3e7, store=f"disk:{tmp_path}"))
    print(f"peak: {usual / 2**20:.0f} MiB where the model is, {disk / 2**20:.0f} MiB on disk")
    assert disk < usual / 2


@pytest.mark.parametrize("store", ["gpu", "disk", "disk:", "", "cpu:x", None])
def test_another_store_is_refused(store, kind):
    model = tiny_model("gpt2", kind)
    with pytest.raises(TvInterpError, match="expected store to be 'model', 'cpu' or 'disk:DIR"):
        tv.record(model, pairs(model), store=store)


def test_a_directory_that_cannot_be_written_and_files_that_are_gone_are_said(kind, tmp_path):
    model = tiny_model("gpt2", kind)
    contrast = pairs(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write to directory"):
        tv.record(model, contrast, store=f"disk:{tmp_path}/file/below")
    recorded = tv.record(model, contrast, store=f"disk:{tmp_path}")
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileError, match="cannot read the recorded run .*: record again"):
        tv.patch_heads(model, contrast, recorded=recorded)
