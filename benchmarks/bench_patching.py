"""How fast is exact head patching, against loops of forward passes in the same process?

    python benchmarks/bench_patching.py                 # small shape, about two minutes
    python benchmarks/bench_patching.py --shape gpt2    # GPT-2-small shape, about half an hour
    python benchmarks/bench_patching.py --shape both --write    # and the tables of README.md

`--write` keeps what was measured in patching.json, shape by shape, and makes the tables anew.

Baselines, on the same random weights and prompts (10 demonstrations, 16 prompts):

(a) `transformer_lens.patching`, as users call it: one full forward pass a cell;
(b) a tuned loop: from the recorded input of the patched layer on, last token unembedded.

Times are CPU seconds of this process on one thread, so that other load matters little; what it does
to caches still does. Where a baseline would take hours, a stratified sample of its cells is run and
scaled, and the number of cells is printed. Every ratio comes with the largest difference between
the two sets of numbers. Peak memory is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from harness import cpu, keep, provenance, write_section  # noqa: E402

import tv_interp as tv  # noqa: E402

SHAPES = {
    "small": dict(n_layers=4, d_model=256, n_heads=8, d_head=32, d_vocab=5000, n_ctx=1280),
    "gpt2": dict(n_layers=12, d_model=768, n_heads=12, d_head=64, d_vocab=50257, n_ctx=1024),
    "7b": dict(n_layers=32, d_model=4096, n_heads=32, d_head=128, d_vocab=32000, n_ctx=2048),
}
RACE = {  # 144 heads each
    "small": dict(n_layers=12, n_heads=12, d_head=40, d_mlp=960, d_model=480, d_vocab=5000),
    "gpt2": dict(n_layers=12, n_heads=12, d_head=64, d_mlp=3072, d_model=768, d_vocab=50257),
}
NAMES = {"small": "4 layers, 8 heads, d 256", "gpt2": "GPT-2-small shape", "7b": "7B shape"}
TARGETS = {  # from issue 4: least ratio
    "readers": (100, 50), "pattern": (100, 50), "knock-outs": (100, 50),
    "readers with set-up": (50, 14), "readers against (b)": (35, 15), "paths": (150, 120),
    "writers": (3, 2.5), "head x token": (5, 5), "race for the top 10": (9, 7),
}  # fmt: skip


def build(shape: str, *, device: str = "cpu", **sizes):
    """A random HookedTransformer with a word tokenizer; attention is far from uniform."""
    from random_models import word_tokenizer
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tv_interp.models.convert import no_deprecation

    kw = SHAPES[shape] | sizes
    with no_deprecation():
        cfg = HookedTransformerConfig(
            act_fn="gelu_new", normalization_type="LN", seed=0, device=device, **kw
        )
        model = HookedTransformer(cfg).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".W_" in name:
                weight.mul_(2.5)
    model.tokenizer = word_tokenizer(["is", ";", *(f"w{i}" for i in range(400))])
    return model


def build_planted(shape: str, noise: float = 0.1):
    """A circuit of 14 writers among 144 heads, of different strength, in small random weights.

    Each writer puts the word that answers the task into one slot, the reader at ``query_is`` moves
    the slot's sum on; the weights around them are noise, so that every head does something.
    """
    from tv_interp.models.planted import HOME, Back, Circuit, Head, Sizes, assemble

    sizes = RACE[shape]
    heads = {(0, 1): Head("decoy", Back(0), "token -> input", carries={w: w for w in HOME})}
    for i in range(14):
        place = (1 + i * 9 // 14, (5 * i) % 12)
        heads[place] = Head("writer", Back(2), "input -> value", carries=HOME, gain=1 - 0.06 * i)
    heads[10, 3] = Head("reader", Back(2), "value -> sum")
    heads[11, 1] = Head("relay", Back(0), "found -> logits")
    case = assemble("many writers", Circuit("last", heads, hinges={0: 0.1}), sizes=Sizes(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in case.model.named_parameters():
            if ".W_" in name and "embed" not in name:
                scale = noise / weight.shape[-2] ** 0.5
                weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return case


def contrast_for(model, n_prompts: int = 16, n_demos: int = 10):
    """43 tokens a prompt with 10 demonstrations."""
    task = tv.Task.from_pairs({f"w{i}": f"w{i + 200}" for i in range(200)})
    template = "{x} is {y} ; "
    clean = tv.make_prompts(model, task, n_demos=n_demos, n_prompts=n_prompts, template=template)
    return clean.corrupt("inputs")


def sample(cells: Sequence, n: int | None) -> list:
    """Every cell, or n of them spread evenly."""
    cells = list(cells)
    if n is None or n >= len(cells):
        return cells
    rng = np.random.default_rng(0)
    chunks = np.array_split(np.arange(len(cells)), n)
    return [cells[int(rng.choice(chunk))] for chunk in chunks]


class Baseline:
    """The loops of forward passes."""

    def __init__(self, model, contrast, device: str) -> None:
        self.model, self.contrast, self.device = model, contrast, device
        self.clean = contrast.clean.tokens.to(device)
        self.corrupted = contrast.corrupted.tokens.to(device)
        self.answer, self.foil = contrast.answer.to(device), contrast.foil.to(device)
        self.places = contrast.clean.positions("answer")[0].tolist()

    def metric(self, logits):
        rows = torch.arange(len(logits), device=logits.device)
        return (logits[rows, -1, self.answer] - logits[rows, -1, self.foil]).mean()

    def set_up(self):
        with torch.no_grad():
            self.plain = float(self.metric(self.model(self.corrupted)))
            keep = ("z", "pattern")
            _, self.cache = self.model.run_with_cache(
                self.clean, names_filter=lambda name: name.split("hook_")[-1] in keep
            )

    def transformer_lens(self, activation: str, setter, cells) -> np.ndarray:
        """Effects by `generic_activation_patch`, as its wrappers call it."""
        from transformer_lens.patching import generic_activation_patch

        frame = pd.DataFrame(cells, columns=["layer", *(f"i{n}" for n in range(len(cells[0]) - 1))])
        with torch.no_grad():
            out = generic_activation_patch(
                self.model, self.corrupted, self.cache, self.metric, setter, activation,
                index_df=frame,
            )  # fmt: skip
        return out.cpu().numpy() - self.plain

    def cut(self, cells) -> np.ndarray:
        """Effects of cutting query_is from the answers in the clean run, one forward a head."""
        out = []
        with torch.no_grad():
            clean = float(self.metric(self.model(self.clean)))
            for layer, head in cells:

                def edit(scores, hook, head=head):
                    scores[:, head, -1, self.places] = -float("inf")
                    return scores

                hooks = [(f"blocks.{layer}.attn.hook_attn_scores", edit)]
                logits = self.model.run_with_hooks(self.clean, fwd_hooks=hooks)
                out.append(clean - float(self.metric(logits)))
        return np.array(out)

    def tuned(self, cells) -> np.ndarray:
        """Readers from the patched layer's recorded input on; only the last token is unembedded."""
        model, out = self.model, []
        with torch.no_grad():
            _, inputs = model.run_with_cache(
                self.corrupted, names_filter=lambda n: n.endswith("resid_pre")
            )
            for layer, head in cells:
                donor = self.cache[f"blocks.{layer}.attn.hook_z"][:, -1, head]

                def edit(z, hook, head=head, donor=donor):
                    z[:, -1, head] = donor
                    return z

                resid = inputs[f"blocks.{layer}.hook_resid_pre"]
                with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", edit)]):
                    resid = model(resid, start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
                logits = model.unembed(model.ln_final(resid[:, -1:]))
                out.append(float(self.metric(logits)) - self.plain)
        return np.array(out)

    def path(self, cells) -> np.ndarray:
        """Two forwards a pair: sender exchanged and all between held; then the receiver's z."""
        import naive

        one = self.contrast.select([0])
        return naive.patch_paths(self.model, one, [(s, r, "kv") for s, r in cells])[0].numpy()

    def forward(self):
        with torch.no_grad():
            return self.model(self.corrupted)


def set_head(corrupted, index, clean):
    """transformer_lens's `layer_pos_head_vector_patch_setter`, for the last token."""
    _, pos, head = index
    corrupted[:, pos, head] = clean[:, pos, head]
    return corrupted


def set_pattern(corrupted, index, clean):
    """`layer_head_pos_pattern_patch_setter`: one row of a head's pattern."""
    _, head, dest = index
    corrupted[:, head, dest] = clean[:, head, dest]
    return corrupted


def measure(shape: str, device: str = "cpu", cells: int | None = None) -> dict:
    """Run every sweep with its baselines; the rows of the table."""
    model = build(shape, device=device)
    contrast = contrast_for(model)
    base = Baseline(model, contrast, device)
    L, H = model.cfg.n_layers, model.cfg.n_heads
    last, heads = base.corrupted.shape[1] - 1, [(la, h) for la in range(L) for h in range(H)]
    big = cells if cells is not None else (None if shape == "small" else 12)

    def timed(function):
        return cpu(function, device=device)

    def theirs(function):
        out, seconds = timed(function)
        for _ in range(2 if shape == "small" else 0):  # the best of three
            seconds = min(seconds, timed(function)[1])
        return out, seconds

    rows: list[dict] = []

    def row(name, ours_s, theirs_s, n_run, n_all, difference, flops=None):
        scaled = theirs_s * n_all / n_run
        rows.append(
            dict(sweep=name, cells=n_all, run=n_run, baseline=scaled, ours=ours_s,
                 ratio=scaled / ours_s, difference=difference, flops=flops)
        )  # fmt: skip
        print(f"  {name:<22}{scaled / ours_s:8.1f}x  ({n_run} of {n_all} cells run)", flush=True)

    base.forward()  # the first run of anything pays for libraries being loaded
    warm = tv.record(model, contrast)
    tv.patch_heads(model, contrast, at="query_is", recorded=warm)
    tv.patch_heads(model, contrast.select([0]), at="answer")
    del warm
    _, set_up_a = theirs(base.set_up)
    recorded, set_up = theirs(lambda: tv.record(model, contrast))

    one = contrast.select([0])
    recorded_one = tv.record(model, one)

    def ours(function):
        scores, seconds = timed(lambda: function(contrast, recorded))
        for _ in range(6 if seconds < 1 else 2 if seconds < 3 else 0):  # short ones: the best
            seconds = min(seconds, timed(lambda: function(contrast, recorded))[1])
        if device != "cpu":
            return scores, seconds, None
        return scores, seconds, _flops(lambda: function(one, recorded_one)) * len(contrast)

    def mean(scores, some):
        values = scores.data.mean("prompt").squeeze().values
        return np.array([values[cell] for cell in some])

    def apart(found, expected):
        return float(np.abs(found - expected).max())

    # readers, against (a) and (b)
    readers, s, f = ours(lambda c, r: tv.patch_heads(model, c, at="query_is", recorded=r))
    some = sample(heads, big)
    cells_z = [(la, last, h) for la, h in some]
    expected, t = theirs(lambda: base.transformer_lens("z", set_head, cells_z))
    row("readers", s, t, len(some), len(heads), apart(mean(readers, some), expected), f)
    rows.append(
        rows[-1] | dict(sweep="readers with set-up", ours=s + set_up, flops=None,
                        baseline=rows[-1]["baseline"] + set_up_a,
                        ratio=(rows[-1]["baseline"] + set_up_a) / (s + set_up))
    )  # fmt: skip
    expected, t = theirs(lambda: base.tuned(some))
    row("readers against (b)", s, t, len(some), len(heads), apart(mean(readers, some), expected))

    pattern, s, f = ours(
        lambda c, r: tv.patch_sources(model, c, roles=["all"], parts=["pattern"], recorded=r)
    )
    cells_p = [(la, h, last) for la, h in some]
    expected, t = theirs(lambda: base.transformer_lens("pattern", set_pattern, cells_p))
    found = pattern.data.mean("prompt").values.reshape(L, H)
    found = np.array([found[cell] for cell in some])
    row("pattern", s, t, len(some), len(heads), apart(found, expected), f)

    cut, s, f = ours(lambda c, r: tv.knock_out(model, c.clean, recorded=r.clean))
    expected, t = theirs(lambda: base.cut(some))
    row("knock-outs", s, t, len(some), len(heads), apart(mean(cut, some), expected), f)

    def set_answers(corrupted, index, clean):
        corrupted[:, base.places, index[1]] = clean[:, base.places, index[1]]
        return corrupted

    writers, s, f = ours(lambda c, r: tv.patch_heads(model, c, at="answer", recorded=r))
    expected, t = theirs(lambda: base.transformer_lens("z", set_answers, some))
    row("writers", s, t, len(some), len(heads), apart(mean(writers, some), expected), f)

    # paths: the baseline's numbers from two forwards a pair, prompt by prompt, on one prompt
    receivers = heads if shape == "small" else [(4, 3), (8, 3), (11, 3)]
    pairs = [(w, r) for r in receivers for w in heads if w[0] < r[0]]
    paths, s, f = ours(lambda c, r: tv.patch_paths(model, c, receivers=receivers, recorded=r))
    _, t = theirs(lambda: [base.forward() for _ in range(4)])
    checked = sample(pairs, 12)
    expected = base.path(checked)
    first = paths.data.isel(prompt=0, via=0)
    found = [
        float(first.sel(sender=f"L{w[0]}H{w[1]}.z@answer", receiver=f"L{r[0]}H{r[1]}.z@query_is"))
        for w, r in checked
    ]
    row("paths", s, t / 4 * 2 * len(pairs), len(pairs), len(pairs), apart(found, expected), f)

    # head x token: every head at every token
    everywhere = [(la, p, h) for la in range(L) for p in range(last + 1) for h in range(H)]
    if shape == "small":
        tokens, s, f = ours(lambda c, r: tv.patch_positions(model, c, by="token", recorded=r))
        n_ours = len(everywhere)
        cells_t = sample(everywhere, 64)
        found = tokens.data.mean("prompt").values
        found = np.array([found[la, h, p] for la, p, h in cells_t])
    else:
        cells_t = sample(everywhere, 24)
        found, s, f = _some_tokens(model, contrast, recorded, cells_t, timed)
        n_ours = len(cells_t)
    expected, t = timed(lambda: base.transformer_lens("z", set_head, cells_t))
    row("head x token", s * len(everywhere) / n_ours, t, len(cells_t), len(everywhere),
        apart(found, expected), None if shape != "small" else f)  # fmt: skip
    rows += race(shape, timed)
    peak = matrix_peak() if device == "cpu" else None
    for r in rows:
        r["of_peak"] = r["flops"] / r["ours"] / peak if peak and r.get("flops") else None
    return dict(shape=shape, rows=rows, set_up=set_up, set_up_a=set_up_a, peak=peak)


def _some_tokens(model, contrast, recorded, cells, timed):
    """Effects of some (layer, token, head) cells; each cell pays for itself alone."""
    from tv_interp.analysis.common import Experiment
    from tv_interp.interventions import Patch, Site

    run = Experiment(model, contrast, recorded, "denoise", "logit_diff", "query_is")
    variants = []
    for layer, pos, head in cells:
        at = torch.full((len(contrast), 1), pos)
        value = run.donor.z_at(at)[:, layer, :, head]
        variants.append((Patch(Site(layer, head, "z", "query_is"), value, positions=at),))
    effects, seconds = timed(lambda: run.effects(variants))
    return effects.mean(0), seconds, None


def race(shape: str, timed) -> list[dict]:
    """The race for the top 10 of 144 heads on 64 prompts: a planted circuit, and random weights."""
    case = build_planted(shape)
    clean = tv.make_prompts(case.model, case.task, n_demos=10, n_prompts=64)
    rows, races = [], [("race for the top 10", case.model, clean.corrupt("inputs"))]
    if shape == "small":  # where all heads matter alike, the race is a full sweep: a long one
        sizes = {k: v for k, v in RACE[shape].items() if k != "d_mlp"} | {"n_ctx": 64}
        random = build(shape, **sizes)
        races.append(("race, random weights", random, contrast_for(random, n_prompts=64)))
    for label, model, contrast in races:
        ranking, s = timed(functools.partial(tv.rank_heads, model, contrast, k=10))
        base = Baseline(model, contrast, "cpu")
        base.forward()
        _, t = timed(base.forward)
        full = ranking.top  # where every head saw every prompt
        if ranking.share < 1:
            full = tv.patch_heads(model, contrast).top(10)
        both = len({x.at for x in ranking.top} & {x.at for x in full})
        rows.append(
            dict(sweep=label, cells=144, run=1, baseline=144 * t, ours=s, ratio=144 * t / s,
                 difference=None, flops=None, agree=both, share=ranking.share)
        )  # fmt: skip
        print(f"  {label:<22}{144 * t / s:8.1f}x  ({both} of 10, {ranking.share:.0%} of the runs)")
    return rows


def _flops(function: Callable) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matrix_peak() -> float:
    """Float32 operations a second of a large matrix product on this thread; best of five."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = min(cpu(lambda: [a @ b for _ in range(10)])[1] for _ in range(5))
    return 10 * 2 * 1024**3 / best


# ---------------------------------------------------------------------------------------- growth


def growth() -> list[dict]:
    """Readers and writers against one forward a head, as sizes grow (small shape)."""
    rows = []
    settings = [("demonstrations", dict(n_demos=n)) for n in (5, 10, 20, 40, 80)]
    settings += [("layers", dict(n_layers=n)) for n in (2, 4, 8, 16)]
    settings += [("prompts", dict(n_prompts=n)) for n in (1, 4, 16, 64)]
    for what, change in settings:
        sizes = {k: v for k, v in change.items() if k == "n_layers"}
        model = build("small", **sizes)
        rest = {k: v for k, v in change.items() if k != "n_layers"}
        contrast = contrast_for(model, **rest)
        recorded = tv.record(model, contrast)
        base = Baseline(model, contrast, "cpu")
        base.forward()
        seconds = min(cpu(base.forward)[1] for _ in range(3))
        n = model.cfg.n_layers * model.cfg.n_heads
        out = dict(what=what, value=next(iter(change.values())), tokens=base.clean.shape[1])
        for name, at, repeats in (("readers", "query_is", 3), ("writers", "answer", 1)):
            sweep = functools.partial(tv.patch_heads, model, contrast, at=at, recorded=recorded)
            ours = min(cpu(sweep)[1] for _ in range(repeats))
            out[name] = n * seconds / ours
        rows.append(out)
        print(f"  {what} {out['value']}: readers {out['readers']:.0f}x, "
              f"writers {out['writers']:.1f}x", flush=True)  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------- memory


def memory(shape: str) -> dict[str, float]:
    """Peak memory above the loaded model, in MB: median over processes that run one sweep each."""
    out = {}
    for name in ("naive", "readers", "readers, half"):
        command = [sys.executable, __file__, "--shape", shape, "--peak-of", name]
        budget = str(out["naive"] * 1e6 / 2) if name.endswith("half") else "0"
        runs = []
        for _ in range(9 if shape == "small" else 1):
            done = subprocess.run([*command, "--budget", budget], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            runs.append([float(x) for x in done.stdout.split()[-2:]])
        out[name], out[name + " s"] = map(float, np.median(runs, 0))
    return out


def peak_of(name: str, shape: str, budget: float) -> None:
    """Print the rise of this process's peak memory while one sweep runs, in MB, and seconds."""
    model = build(shape)
    contrast = contrast_for(model)
    tv.patch_heads(model, contrast.select([0]), at="query_is")  # loads what is loaded once
    base = Baseline(model, contrast, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of building the model
    before = peak()

    def sweep():
        if name == "naive":
            base.set_up()
            heads = [(la, base.clean.shape[1] - 1, 0) for la in range(model.cfg.n_layers)]
            return base.transformer_lens("z", set_head, heads)
        recorded = tv.record(model, contrast, max_memory=budget or None)
        return tv.patch_heads(model, contrast, at="query_is", recorded=recorded)

    _, seconds = cpu(sweep)
    print((peak() - before) / 1e3, seconds)


def peak() -> int:
    """Peak resident memory of this process since it was last forgotten, in kB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


# ----------------------------------------------------------------------------------------- table


def table(result: dict) -> str:
    """One shape as a Markdown table."""
    column = 0 if result["shape"] == "gpt2" else 1
    lines = [
        f"### {NAMES[result['shape']]}",
        "",
        result["provenance"],
        "",
        "| sweep | cells (run) | baseline, s | ours, s | ratio | asked | difference | of peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        asked = TARGETS.get(r["sweep"])
        asked = f"≥ {asked[column]:g}" if asked else ""
        apart = "" if r["difference"] is None else f"{r['difference']:.0e}"
        if "agree" in r:
            apart = f"{r['agree']} of 10, {r['share']:.0%} of the runs"
        peak = f"{r['of_peak']:.0%}" if r.get("of_peak") else ""
        lines.append(
            f"| {r['sweep']} | {r['cells']} ({r['run']}) | {r['baseline']:.2f} | {r['ours']:.3f} "
            f"| **{r['ratio']:.1f}** | {asked} | {apart} | {peak} |"
        )
    lines += [
        "",
        f"Set-up: {result['set_up']:.2f} s ours (two recorded runs), {result['set_up_a']:.2f} s "
        "theirs (one run with cache, one plain).",
    ]
    if result["peak"]:
        lines[-1] += f" Matrix peak of this thread: {result['peak'] / 1e9:.0f} GF/s."
    if m := result.get("memory"):
        lines += [
            "",
            f"Peak memory of a readers sweep above the model: naive loop {m['naive']:.0f} MB, ours "
            f"{m['readers']:.0f} MB ({m['readers s']:.2f} s with set-up), with half of the naive "
            f"loop's as `max_memory` {m['readers, half']:.0f} MB ({m['readers, half s']:.2f} s).",
        ]
    if grown := result.get("growth"):
        lines += ["", growth_table(grown)]
    return "\n".join(lines)


def growth_table(rows: list[dict]) -> str:
    """The growth of the ratios as a Markdown table."""
    lines = [
        "Growth: ratio to one forward pass a head, as sizes grow.",
        "",
        "| | value | tokens | readers | writers |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['what']} | {r['value']} | {r['tokens']} | {r['readers']:.0f} "
            f"| {r['writers']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cells", type=int, help="baseline cells that are run; the rest is scaled")
    parser.add_argument("--write", action="store_true", help="keep the result, remake README.md")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.peak_of:
        peak_of(given.peak_of, given.shape, given.budget)
        return
    shapes = ["small", "gpt2"] if given.shape == "both" else [given.shape]
    results = []
    for shape in shapes:
        print(f"{NAMES[shape]} on {given.device}", flush=True)
        result = measure(shape, given.device, given.cells)
        if given.device == "cpu":
            result["memory"] = memory(shape)
        if shape == "small" and given.write:
            result["growth"] = growth()
        results.append(result | {"provenance": provenance()})
        if given.write:
            write(results[-1])
    text = "\n\n".join(map(table, results))
    print(json.dumps(results, indent=2) if given.json else "\n" + text)


def write(result: dict) -> None:
    """Keep one shape's result, and make the tables of README.md anew from all that is kept."""
    known = keep("patching.json", {result["shape"]: result})
    write_section(
        "bench_patching.py", "\n\n".join(table(known[shape]) for shape in SHAPES if shape in known)
    )


if __name__ == "__main__":
    main()
