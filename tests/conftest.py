"""One thread, and every tiny model built once for the whole session."""

from __future__ import annotations

import contextlib
import functools
import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests first, so that no worker ends long after the others."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def has_hooked() -> bool:
    try:  # hasattr raises too in TransformerLens 4
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


KINDS = ("hooked", "bridge") if has_hooked() else ("bridge",)


def precise(dtype: torch.dtype):
    """Context in which models of this precision are built and run; see `TrueFloat64`."""
    from random_models import TrueFloat64

    return TrueFloat64() if dtype == torch.float64 else contextlib.nullcontext()


def as_it_is(dtype: torch.dtype):
    """As `precise`, where another context may be active already."""
    return precise(dtype) if dtype == torch.float64 else torch._C.DisableTorchFunction()


@functools.cache
def tiny_model(arch: str, kind: str, dtype: torch.dtype = torch.float32, **settings):
    """A random model with a word tokenizer; equal weights in both classes and both precisions."""
    from random_models import hf_model, word_tokenizer, words

    from tv_interp.models.convert import bridge_from_hf, hooked_from_hf

    build = hooked_from_hf if kind == "hooked" else bridge_from_hf
    with as_it_is(dtype):
        return build(hf_model(arch, dtype=dtype, **settings), word_tokenizer(words()))


CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; see the mark ``browser``."""
    if not os.path.exists(CHROMIUM):
        if os.environ.get("TV_INTERP_REQUIRE_BROWSER") == "1":
            pytest.fail(f"TV_INTERP_REQUIRE_BROWSER=1 and there is no {CHROMIUM}")
        pytest.skip(f"there is no {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """Each TransformerLens class that is installed."""
    return request.param


_DIFFERENCES: dict[str, float] = {}


def note_difference(what: str, error: float) -> None:
    """Remember the largest difference from the naive loop, by test; shown with ``-v``."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    key = f"{test}: {what}"
    _DIFFERENCES[key] = max(error, _DIFFERENCES.get(key, 0.0))


def pytest_terminal_summary(terminalreporter, config):
    if _DIFFERENCES and config.get_verbosity() > 0:
        terminalreporter.section("largest differences from the naive loop")
        for key, error in sorted(_DIFFERENCES.items()):
            terminalreporter.write_line(f"{error:.1e}  {key}")
