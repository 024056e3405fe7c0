"""EAP over all edges, side by side with other libraries: equal numbers, CPU time, peak memory.

    python benchmarks/bench_peers.py --envs /tmp/peers --tl4 .venv-tl4/bin/python --write

Each library runs in a process of its own, with the Python of its own environment, on one saved
checkpoint (random weights, GPT-2 architecture, 4 layers of 8 heads, d 256) and one set of prompts:

* **ours**: `score_edges(method="eap")`, recorded runs included, summed over places.
* **split hooks**: the same by TransformerLens 3.9 with `use_split_qkv_input`, `use_attn_result` and
  `use_hook_mlp_in`: two forward passes and a backward pass over all inputs, written out here. It is
  what EAP-IG's repository does.
* **TransformerLens 4.3**: `attribution_patch`, edges, one prompt at a time as it works.
* **auto-circuit** 1.0.1: `mask_gradient_prune_scores` at mask 0, its EAP. Its environment is made
  under ``--envs`` where it is not there (`PINS`; torch from wherever pip finds a CPU build).
* **EAP-IG**, with ``--eap-ig PATH`` to a checkout and TransformerLens 3.9: `attribute` by EAP.

Time is CPU seconds of one thread, the best of as many runs as take 20 s, three at least; memory is
the peak above what the process held with model and prompts, in the first run. To sum over places
and to name edges alike is not counted.

Below the table: what scores of all edges by role take on the reference model, by EAP, EAP-IG and,
between heads, by exact patching.

Then recovery: what each library finds in the planted circuits of `bench_recovery.py` (seeds from 0
on), with the methods that it has. Edges of the others have no roles, so an edge is true here if it
is true at some role; ours is scored by its largest role where it is patched, and by the sum over
roles where it is attributed, which is what the others compute. EAP-IG takes 5 steps in every
library, each with its own quadrature. TransformerLens 4.3 splits the heads of bridges of Hugging
Face models alone, which these are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
PINS = (
    "auto-circuit==1.0.1", "transformer-lens==2.18.0", "numpy==1.26.4", "pyarrow==17.0.0",
    "datasets==3.6.0", f"torch=={torch.__version__}",
)  # fmt: skip
SIZE = dict(n_layers=4, n_head=8, n_embd=256, n_inner=1024, d_vocab=1000, n_ctx=64)
N_PROMPTS, N_DEMOS = 16, 12
REPEATS, AT_LEAST = 3, 20.0
STEPS = 5  # of EAP-IG
Values = dict[str, float]
NAMES = {
    "ours": "tv_interp",
    "split": "split hooks, TransformerLens 3.9",
    "tl4": "TransformerLens 4.3",
    "auto-circuit": "auto-circuit 1.0.1",
    "eap-ig": "EAP-IG",
}


# ------------------------------------------------------------------------------ what is compared


def a_case(
    where: Path | None = None, dtype: torch.dtype = torch.float32, backend: str = "hooked"
) -> tuple:
    """Make model, clean and corrupted prompts: random weights, or the circuit of a directory."""
    import tv_interp as tv

    if where is not None and (where / "circuit.json").exists():
        from tv_interp.models.generator import draw_circuit

        about = json.loads((where / "circuit.json").read_text())
        case = draw_circuit(about["seed"], dtype=dtype, backend=backend)
        prompts = tv.make_prompts(case.model, case.task, n_demos=2, n_prompts=8)
        return case.model, prompts.corrupt(about["corruption"])
    sys.path.insert(0, str(HERE.parent / "tests"))
    from random_models import hf_model, word_tokenizer, words

    from tv_interp.models.convert import bridge_from_hf, hooked_from_hf

    convert = bridge_from_hf if backend == "bridge" else hooked_from_hf
    model = convert(hf_model("gpt2", dtype=dtype, **SIZE), word_tokenizer(words()))
    task = tv.Task.from_pairs({f"w{i}": f"w{i + 25}" for i in range(25)}, name="pairs")
    prompts = tv.make_prompts(
        model, task, n_demos=N_DEMOS, n_prompts=N_PROMPTS, template="{x} is {y} "
    )
    return model, prompts.corrupt("answers")


def save_case(where: Path) -> None:
    """Write model and prompts, for the libraries that read them from files."""
    model, contrast = a_case(where)
    cfg = {
        name: getattr(model.cfg, name)
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx",
                     "act_fn", "normalization_type", "eps", "positional_embedding_type")
    }  # fmt: skip
    state = {k: v for k, v in model.state_dict().items() if not k.endswith((".mask", ".IGNORE"))}
    torch.save((cfg, state), where / "hooked.pt")
    plain = [contrast.clean.tokens, contrast.corrupted.tokens, contrast.answer, contrast.foil]
    torch.save(plain, where / "prompts.pt")


def save_circuit(where: Path, seed: int) -> None:
    """Write a planted circuit, and which edges are true at some role."""
    from tv_interp.models.generator import draw_circuit

    where.mkdir()
    case = draw_circuit(seed)
    corruption = case.corruptions[seed % len(case.corruptions)]
    true = sorted({pooled(edge) for edge in case.truths[corruption].edges})
    about = dict(seed=seed, corruption=corruption, true=true)
    (where / "circuit.json").write_text(json.dumps(about))
    save_case(where)


def pooled(edge: str) -> str:
    """Name of an edge without its roles."""
    return "->".join(end.split("@")[0] for end in edge.split("->"))


def save_gold(where: Path) -> None:
    """Write our scores in double precision, that the rounding of each library is seen."""
    from random_models import TrueFloat64

    with TrueFloat64():
        work, read = ours(where, dtype=torch.float64)
        save_scores(where / "gold.npz", read(work()))


def save_scores(path: Path, found: Values, **more: float) -> None:
    names = sorted(found)
    np.savez(path, names=names, values=np.array([found[name] for name in names]), **more)


def tensors(where: Path) -> list[torch.Tensor]:
    return torch.load(where / "prompts.pt")


def logit_diffs(logits, answer, foil):
    row = torch.arange(len(answer))
    return logits[row, answer] - logits[row, foil]


def hooked(where: Path):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg, state = torch.load(where / "hooked.pt")
    model = HookedTransformer(HookedTransformerConfig(**cfg, device="cpu", init_weights=False))
    model.load_state_dict(state, strict=False)
    return model.eval()


# ----------------------------------- one function a library: what to time, how to read its scores


def ours(where: Path, method: str = "EAP", dtype: torch.dtype = torch.float32):
    import tv_interp as tv

    model, contrast = a_case(where, dtype)
    options = {
        "EAP": dict(method="eap"),
        "EAP-IG": dict(method="eap-ig", n_steps=STEPS),
        "exact": dict(method="exact", direction="noise"),
    }[method]

    def read(scores) -> Values:
        found: Values = {}
        mean = scores.mean()
        for edge, value in zip(mean.edge.values.tolist(), mean.values.tolist(), strict=True):
            key = pooled(edge)
            if method == "exact":
                found[key] = max(found.get(key, 0.0), abs(value))
            else:
                found[key] = found.get(key, 0.0) + value
        return found

    return lambda: tv.score_edges(model, contrast, **options), read


def split(where: Path, method: str):
    clean, corrupted, answer, foil = tensors(where)
    model = hooked(where)
    for name in ("split_qkv_input", "attn_result"):
        getattr(model, f"set_use_{name}")(True)
    model.set_use_hook_mlp_in(True)
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    senders = ["embed"]
    for la in layers:
        senders += [*(f"L{la}H{h}" for h in heads), f"L{la}.mlp"]

    def run(tokens, gradients: bool):
        kept, inputs = [], {}

        def send(x, hook):
            kept.append(x.detach() if x.ndim == 4 else x.detach()[:, :, None])

        def receive(x, hook):
            inputs[hook.name] = x
            x.retain_grad()

        outs = ["blocks.0.hook_resid_pre"]
        for la in layers:
            outs += [f"blocks.{la}.attn.hook_result", f"blocks.{la}.hook_mlp_out"]
        hooks = [(name, send) for name in outs]
        if gradients:
            whats = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
            hooks += [(f"blocks.{la}.{what}", receive) for la in layers for what in whats]
            hooks.append((f"blocks.{layers[-1]}.hook_resid_post", receive))
        with torch.set_grad_enabled(gradients):
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
            if gradients:
                logit_diffs(logits, answer, foil).sum().backward()
        return torch.cat(kept, 2), {k: x.grad for k, x in inputs.items()}

    def work():
        new, _ = run(corrupted, False)
        old, gradients = run(clean, True)
        change, tables = (old - new) / len(clean), []
        for name, gradient in gradients.items():
            la = int(name.split(".")[1])
            what = name.rsplit("_", 2)[-2:][0]
            n = 1 + la * (len(heads) + 1) + (len(heads) if "mlp_in" in name else 0)
            if "resid_post" in name:
                table, to = torch.einsum("bpsd,bpd->s", change, gradient)[:, None], ["logits"]
            elif "mlp_in" in name:
                some = change[:, :, :n]
                table = torch.einsum("bpsd,bpd->s", some, gradient)[:, None]
                to = [f"L{la}.mlp"]
            else:
                table = torch.einsum("bpsd,bphd->sh", change[:, :, :n], gradient)
                to = [f"L{la}H{h}.{what}" for h in heads]
            tables.append((to, table))
        model.zero_grad()
        return tables

    def read(tables) -> Values:
        found: Values = {}
        for to, table in tables:
            for i, row in enumerate(table.tolist()):
                found |= {f"{senders[i]}->{to[j]}": value for j, value in enumerate(row)}
        return found

    return work, read


def tl4(where: Path, method: str):
    from transformer_lens.tools.analysis import attribution_patching as theirs

    clean, corrupted, answer, foil = tensors(where)
    model, _ = a_case(where, backend="bridge")
    config = theirs.EdgeAttributionConfig(granularity="edge")
    short = {"attn_head_out": "", "mlp_out": ".mlp", "mlp_in": ".mlp"}
    short |= {f"{via}_input": f".{via}" for via in "qkv"}

    def name(node) -> str:
        if node.kind in ("embed", "logits"):
            return node.kind
        head = "" if node.head is None else f"H{node.head}"
        return f"L{node.layer}{head}{short[node.kind]}"

    def work():
        found = []
        for i in range(len(clean)):

            def metric(logits, i=i):
                last = logits.reshape(-1, logits.shape[-1])[-1]
                return last[answer[i]] - last[foil[i]]

            # theirs takes the gradient where it calls a run corrupt, so the two change places
            pair = corrupted[i : i + 1], clean[i : i + 1]
            found.append(theirs.attribution_patch(model, *pair, metric, config))
        return found

    def read(results) -> Values:
        found: Values = {}
        for result in results:
            for (writer, reader), value in result.edge_scores.items():
                key = f"{name(writer)}->{name(reader)}"
                found[key] = found.get(key, 0.0) - float(value) / len(clean)
        return found

    return work, read


def auto_circuit(where: Path, method: str):
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model

    clean, corrupted, answer, foil = tensors(where)
    model = hooked(where)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    data = PromptDataset(list(clean), list(corrupted), list(answer[:, None]), list(foil[:, None]))
    loader = PromptDataLoader(data, seq_len=clean.shape[1], diverge_idx=0, batch_size=len(clean))
    patchable = patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True)

    def name(node) -> str:
        text = node.name.replace("Resid Start", "embed").replace("Resid End", "logits")
        if text.startswith("MLP"):
            return f"L{text.split()[1]}.mlp"
        if not text.startswith("A"):
            return text
        layer, head, *via = text[1:].split(".")
        return f"L{layer}H{head}" + "".join(f".{v.lower()}" for v in via)

    def work():
        found = mask_gradient_prune_scores(
            patchable, loader, None, "logit", "avg_diff", mask_val=0.0
        )
        patchable.zero_grad()
        return found

    def read(found) -> Values:
        # theirs is the gradient of minus the metric by how much of the edge is corrupted
        return {
            f"{name(e.src)}->{name(e.dest)}": float(e.prune_score(found)) for e in patchable.edges
        }

    return work, read


def eap_ig(where: Path, method: str):
    zeros = torch.zeros  # theirs asks for CUDA by name
    torch.zeros = lambda *size, device=None, **options: zeros(*size, **options)
    from eap.attribute import attribute
    from eap.graph import Graph

    clean, corrupted, answer, foil = tensors(where)
    model = hooked(where)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    tokenizer = a_case(where)[0].tokenizer
    model.set_tokenizer(tokenizer)
    texts = [[tokenizer.decode(row[1:]) for row in side] for side in (clean, corrupted)]
    for side, tokens in zip(texts, (clean, corrupted), strict=True):
        assert torch.equal(model.to_tokens(side), tokens), "it reads other tokens"
    options = {
        "EAP": dict(method="EAP"),
        "EAP-IG": dict(method="EAP-IG-inputs", ig_steps=STEPS),
        "exact": dict(method="exact"),
    }[method]
    batches = [(texts[0], texts[1], torch.stack([answer, foil], 1))]

    def metric(logits, clean_logits, lengths, labels):
        return logit_diffs(logits[:, -1], labels[:, 0], labels[:, 1]).sum()

    def name(node: str) -> str:
        text = node.replace("input", "embed")
        if text.startswith("m"):
            return f"L{text[1:]}.mlp"
        if not text.startswith("a"):
            return text
        layer, head = text[1:].split(".h")
        return f"L{layer}H{head}"

    def work():
        graph = Graph.from_model(model)
        attribute(model, graph, batches, metric, quiet=True, **options)
        return graph

    def read(graph) -> Values:
        found: Values = {}
        for edge in graph.edges.values():
            via = "" if edge.qkv is None else f".{edge.qkv}"
            key = f"{name(edge.parent.name)}->{name(edge.child.name)}{via}"
            found[key] = -float(edge.score)
        return found

    return work, read


LIBRARIES = {
    "ours": ours, "split": split, "tl4": tl4, "auto-circuit": auto_circuit, "eap-ig": eap_ig,
}  # fmt: skip


METHODS = {
    "ours": ("EAP", "EAP-IG", "exact"), "split": ("EAP",), "tl4": (),
    "auto-circuit": ("EAP",), "eap-ig": ("EAP", "EAP-IG", "exact"),
}  # fmt: skip


def recover(library: str, where: Path) -> None:
    """Score the edges of all circuits in this process, and write scores and time."""
    torch.set_num_threads(1)
    for case in sorted(where.glob("circuit-*")):
        for method in METHODS[library]:
            work, read = LIBRARIES[library](case, method)
            start = time.process_time()
            result = work()
            seconds = time.process_time() - start
            save_scores(case / f"{library} {method}.npz", read(result), s=seconds)


def run_one(library: str, where: Path) -> None:
    """Run one library in this process, and write what it took and its scores."""
    torch.set_num_threads(1)
    work, read = LIBRARIES[library](where, "EAP")
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    seconds: list[float] = []
    while len(seconds) < REPEATS or sum(seconds) < AT_LEAST:
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
        if len(seconds) == 1:
            peak = resident("VmHWM") - before
    save_scores(where / f"{library}.npz", read(result), s=min(seconds), mb=peak)


def resident(what: str = "VmRSS") -> float:
    """Memory of this process in MB: now, or at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def floor() -> float:
    """CPU seconds of the passes that EAP needs, without anything else; the best of 30."""
    from harness import cpu

    model, contrast = a_case()
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def start(x, hook):
        return x.requires_grad_(True)

    def passes() -> None:
        with torch.no_grad():
            model(contrast.corrupted.tokens)
        hooks = [("blocks.0.hook_resid_pre", start)]
        logits = model.run_with_hooks(contrast.clean.tokens, fwd_hooks=hooks)[:, -1]
        logit_diffs(logits, contrast.answer, contrast.foil).sum().backward()

    return min(cpu(passes)[1] for _ in range(30))


def edges_by_role() -> int:
    import tv_interp as tv

    model, contrast = a_case()
    return len(tv.RoleGraph.of(model, contrast.clean).edges)


def on_reference() -> str:
    """Time the scores of edges by role on the reference model: EAP of all, exact between heads."""
    from harness import cpu

    import tv_interp as tv

    model = tv.load_model("reference")
    prompts = tv.make_prompts(model, "country-capital", n_demos=8, n_prompts=64)
    contrast = prompts.corrupt("task")
    graph = tv.RoleGraph.of(model, prompts)
    heads = [node for node in graph.nodes if "H" in node]
    edges = graph.between(heads, heads)
    lines = ["| reference model, 64 prompts of 8 demonstrations | edges | CPU s |", "|---|---|---|"]
    for title, options, n in (
        ("EAP, all edges by role", dict(method="eap"), len(graph.edges)),
        ("EAP-IG, 5 midpoints", dict(method="eap-ig"), len(graph.edges)),
        ("exact, head to head", dict(method="exact", edges=edges), len(edges)),
    ):
        _, seconds = cpu(lambda options=options: tv.score_edges(model, contrast, **options))
        lines.append(f"| {title} | {n} | {seconds:.1f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the command


def environment(directory: Path) -> Path:
    """Make auto-circuit's environment where it is not there; get its Python."""
    python = directory / "auto-circuit" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory / "auto-circuit"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PINS], check=True)
    return python


def table(where: Path, done: list[str]) -> str:
    """Compare all with ours in double precision: one row a library."""
    results = {name: np.load(where / f"{name}.npz") for name in done}
    gold = np.load(where / "gold.npz")
    mine = dict(zip(gold["names"].tolist(), gold["values"], strict=True))
    lines = [
        "| library | edges | largest error | largest score | CPU s | of ours | MB | of ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        theirs = dict(zip(found["names"].tolist(), found["values"], strict=True))
        both = sorted(set(mine) & set(theirs))
        assert len(both) == len(mine), f"{name} has no edge {sorted(set(mine) - set(theirs))[:3]}"
        apart = max(abs(mine[e] - theirs[e]) for e in both)
        cost = [float(found[k] / results["ours"][k]) for k in ("s", "mb")]
        lines.append(
            f"| {NAMES[name]} | {len(both)} | {apart:.0e} | {max(map(abs, theirs.values())):.2f} | "
            f"{float(found['s']):.2f} | {cost[0]:.1f} | {float(found['mb']):.0f} | {cost[1]:.1f} |"
        )
    return "\n".join(lines)


def table_of_recovery(where: Path, done: list[str]) -> str:
    """Rank the edges of every circuit by each library's scores: one row a method."""
    from bench_recovery import FLOOR, auc, average_precision, interval

    cases = sorted(where.glob("circuit-*"))
    lines = [
        f"| {len(cases)} planted circuits | method | AUC | AP | AP below 1 | CPU s a circuit |",
        "|---|---|---|---|---|---|",
    ]
    for name in done:
        for method in METHODS[name]:
            rows = []
            for case in cases:
                true = json.loads((case / "circuit.json").read_text())["true"]
                found = np.load(case / f"{name} {method}.npz")
                values, names = np.abs(found["values"]), found["names"].tolist()
                assert set(true) <= set(names), f"{name} has no {sorted(set(true) - set(names))}"
                values[values < FLOOR * values.max()] = 0  # or else rounding is ranked
                is_true = np.isin(names, true)
                rows.append((auc(values, is_true), average_precision(values, is_true), found["s"]))
            each = [list(map(float, column)) for column in zip(*rows, strict=True)]
            missed = [case.name for case, ap in zip(cases, each[1], strict=True) if ap < 1]
            cells = [*map(interval, each[:2]), ", ".join(missed), f"{np.mean(each[2]):.2f}"]
            lines.append(f"| {NAMES[name]} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=Path, help="directory of environments; makes auto-circuit's")
    parser.add_argument("--tl4", type=Path, help="Python with TransformerLens 4.3")
    parser.add_argument("--eap-ig", type=Path, help="checkout of EAP-IG")
    parser.add_argument("--write", action="store_true", help="remake the table of README.md")
    parser.add_argument("--circuits", type=int, default=12, help="planted circuits to recover")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "DIRECTORY"), help=argparse.SUPPRESS)
    parser.add_argument("--recover", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run = recover if given.recover else run_one
        return run(given.one[0], Path(given.one[1]))
    pythons: dict[str, Path] = {"ours": Path(sys.executable), "split": Path(sys.executable)}
    if given.tl4:
        pythons["tl4"] = given.tl4
    if given.envs:
        pythons["auto-circuit"] = environment(given.envs)
    if given.eap_ig:
        pythons["eap-ig"] = Path(sys.executable)
    from harness import provenance, write_section

    torch.set_num_threads(1)
    where = Path(tempfile.mkdtemp())
    save_case(where)
    save_gold(where)
    for seed in range(given.circuits):
        save_circuit(where / f"circuit-{seed:02}", seed)
    about, done = provenance(), []
    for name, python in pythons.items():
        path = [str(HERE.parent), *([str(given.eap_ig / "src")] if name == "eap-ig" else [])]
        if name == "auto-circuit":
            path = []  # its environment does not have what tv_interp needs
        command = [python, Path(__file__).resolve(), "--one", name, where]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        steps = [command, [*command, "--recover"]]
        if any(subprocess.run(step, env=env).returncode for step in steps):
            print(f"{NAMES[name]} did not run", file=sys.stderr)
        else:
            done.append(name)
    text = (
        f"{N_PROMPTS} prompts of {1 + 3 * N_DEMOS + 2} tokens; {edges_by_role()} edges by role in "
    )
    text += f"ours. {about} Floor {floor():.2f} s."
    text += f"\n\n{table(where, done)}\n\n{on_reference()}"
    if given.circuits:
        text += f"\n\n{table_of_recovery(where, done)}"
    print(text)
    if given.write:
        write_section("bench_peers.py", text)


if __name__ == "__main__":
    main()
