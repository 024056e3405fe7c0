"""Compile programs with tracr and keep them as test data: weights, and the edges that are true.

    python -m venv /tmp/tracr && /tmp/tracr/bin/pip install tracr-pypi==1.0.0 safetensors
    /tmp/tracr/bin/python benchmarks/compile_tracr.py          # remakes tests/data/tracr

tracr (Lindner et al. 2023, arXiv 2301.05062) turns a RASP program into a transformer, so that its
circuit is known and is not ours. Nothing of tv_interp or TransformerLens is used here. Two
programs, on prompts ``<bos> x is y x is y x is`` of one token a word, compiled with causal
attention and read at the last token, which sees all tokens either way:

* **reverse**, tracr's own: the last token's answer is the first word. One head a layer.
* **lookup**, ours: ``y`` of the demonstration whose ``x`` is the query's. Each answer takes up the
  word two back, ``query_is`` the word one back, and a head matches the two: a key route.

Truth of an edge, by role, for one ablation. It is true if on some of a hundred prompts

1. what its sender writes at its place changes when ablated, by more than rounding,
2. the receiver's first weights do not map that change to 0,
3. the receiver takes it up: a query or a key changes the head's scores otherwise than all by the
   same amount; a value is one that the head attends to, in the run or its twin,
4. the receiver's own node has a true edge on the way to the logits.

*corrupted*: the change is to the twin prompt's run; *zero*: to nothing. Every run is tracr's own
(its activations, layer by layer). These are conditions on each edge's two ends, so a true edge may
have no effect: where a sharp softmax does not mind, or where another edge does the same.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

WHERE = Path(__file__).resolve().parents[1] / "tests" / "data" / "tracr"
WORDS = tuple("abcdefgh")
BOS, CONNECTIVE, N_DEMOS, N_PROMPTS = "<bos>", "is", 2, 100
ROLES = ["bos", *["x", "is", "answer"] * N_DEMOS, "query_x", "query_is"]
VOCABULARY = [BOS, CONNECTIVE, *WORDS]
LEAST = 1e-3  # of what is 0 or 1 in these models
Words = list[str]


def reverse() -> rasp.SOp:
    return lib.make_reverse(rasp.tokens)


def lookup() -> rasp.SOp:
    def back(steps: int) -> rasp.SOp:
        there = rasp.Map(lambda i: i - steps, rasp.indices)
        return rasp.Aggregate(rasp.Select(rasp.indices, there, rasp.Comparison.EQ), rasp.tokens)

    match = rasp.Select(back(2), back(1), rasp.Comparison.EQ)
    return rasp.Aggregate(match, rasp.tokens).named("lookup")


def prompts(program: str, rng: np.random.Generator) -> Iterator[list[tuple[Words, str]]]:
    """Draw prompts and their corrupted twins, each with what the program must answer."""
    for _ in range(N_PROMPTS):
        words, others = rng.permutation(WORDS), rng.permutation(WORDS)
        x, y, query = words[:N_DEMOS], words[-N_DEMOS:], words[N_DEMOS]
        if program == "reverse":  # all words anew, the first one another
            others = others[others != x[0]]
            twin = (others[:N_DEMOS], others[-N_DEMOS:], others[N_DEMOS])
            yield [(write(*each), each[0][0]) for each in ((x, y, query), twin)]
        else:  # inputs exchanged, so that the other answer is right
            which = rng.integers(N_DEMOS)
            pairs = ((x, y, x[which]), (x[::-1], y, x[which]))
            yield [(write(*pairs[0]), y[which]), (write(*pairs[1]), y[::-1][which])]


def write(x: Sequence[str], y: Sequence[str], query: str) -> Words:
    demos = [[x[i], CONNECTIVE, y[i]] for i in range(N_DEMOS)]
    return [BOS, *itertools.chain(*demos), query, CONNECTIVE]


# ------------------------------------------------------------------------------------ the weights


def weights(program: str, model) -> dict[str, np.ndarray]:
    """tracr's weights, by head, and the maps into and out of the residual stream."""
    cfg, labels = model.model_config, model.residual_labels
    params = {
        f"{module}/{name}": np.asarray(value)
        for module, some in model.params.items()
        for name, value in some.items()
    }
    assert not any(value.any() for name, value in params.items() if name.endswith("/b"))
    rows = [model.input_encoder.encoding_map[word] for word in VOCABULARY]
    out = {
        "embed": params["token_embed/embeddings"][rows],
        "pos_embed": params["pos_embed/embeddings"][: len(ROLES)],
        "unembed": np.zeros((len(labels), len(VOCABULARY))),
    }
    (output,) = {at.split(":")[0] for at in labels if at.startswith(f"{program}_")}
    for i, word in enumerate(VOCABULARY[1:], 1):
        out["unembed"][labels.index(f"{output}:{word}"), i] = 1
    split = (cfg.num_heads, cfg.key_size)
    for layer in range(cfg.num_layers):
        where = f"transformer/layer_{layer}"
        for part in ("query", "key", "value"):
            w = params[f"{where}/attn/{part}/w"]
            out[f"{layer}.{part[0].upper()}"] = w.reshape(len(w), *split).swapaxes(0, 1)
        out[f"{layer}.O"] = params[f"{where}/attn/linear/w"].reshape(*split, -1)
        out[f"{layer}.in"] = params[f"{where}/mlp/linear_1/w"]
        out[f"{layer}.out"] = params[f"{where}/mlp/linear_2/w"]
    return {name: np.ascontiguousarray(w, dtype=np.float32) for name, w in out.items()}


# -------------------------------------------------------------------------------------- the truth


class Activations:
    """What every sender writes in tracr's own run of a prompt, and where every head attends."""

    def __init__(self, model, w: dict[str, np.ndarray], words: Words) -> None:
        run, cfg = model.apply(words), model.model_config
        self.words, self.answer = words, run.decoded[-1]
        x = np.asarray(run.input_embeddings)[0]
        self.written = {"embed": x}
        self.pattern: dict[str, np.ndarray] = {}
        self.queries: dict[str, np.ndarray] = {}
        self.keys: dict[str, np.ndarray] = {}
        for layer in range(cfg.num_layers):
            heads, mlp = (np.asarray(run.layer_outputs[2 * layer + i])[0] for i in range(2))
            scores = np.asarray(run.attn_logits[layer])[0]
            whole = 0
            for head in range(cfg.num_heads):
                seen = np.where(np.tri(len(x), dtype=bool), scores[head], -np.inf)
                pattern = np.exp(seen - seen.max(-1, keepdims=True))
                pattern = pattern / pattern.sum(-1, keepdims=True)
                each = pattern @ x @ w[f"{layer}.V"][head] @ w[f"{layer}.O"][head]
                self.written[f"L{layer}H{head}"], whole = each, whole + each
                self.pattern[f"L{layer}H{head}"] = pattern
                self.queries[f"L{layer}H{head}"] = x @ w[f"{layer}.Q"][head]
                self.keys[f"L{layer}H{head}"] = x @ w[f"{layer}.K"][head]
            assert np.allclose(whole, heads, atol=1e-4)  # so the split into heads is right
            self.written[f"L{layer}.mlp"] = mlp
            x = x + heads + mlp
        self.logits = x[-1] @ w["unembed"]


def truth(model, w: dict[str, np.ndarray], runs, ablation: str) -> list[str]:
    """The edges that meet conditions 1 to 3 on some prompt, and 4."""
    cfg, found = model.model_config, set()
    layers, heads = range(cfg.num_layers), range(cfg.num_heads)
    order = ["embed"]
    for layer in layers:
        order += [*(f"L{layer}H{head}" for head in heads), f"L{layer}.mlp"]
    for clean, twin in runs:
        change = {  # what is lost at each place when ablated
            name: out - (twin.written[name] if ablation == "corrupted" else 0)
            for name, out in clean.written.items()
        }
        for sender, layer in itertools.product(order, layers):
            below = sender == "embed" or int(sender[1]) < layer
            for head in heads if below else ():
                name = f"L{layer}H{head}"
                by = {via: change[sender] @ w[f"{layer}.{via.upper()}"][head] for via in "qkv"}
                read = {
                    "q": np.diag(differ(by["q"] @ clean.keys[name].T)),
                    "k": abs(clean.queries[name] @ by["k"].T) > LEAST,
                    "v": np.maximum(clean.pattern[name], twin.pattern[name]) > LEAST,
                }
                read["k"][0] = False  # a key alone is attended to whatever it is
                read["v"] &= (abs(by["v"] @ w[f"{layer}.O"][head]) > LEAST).any(-1)
                for via, table in read.items():
                    for dest, src in np.argwhere(np.tril(table)):
                        to = f"{name}.{via}@{ROLES[dest]}"
                        found.add(f"{sender}@{ROLES[src]}->{to}")
            if below or sender.startswith(f"L{layer}H"):
                for at in np.flatnonzero(is_not_zero(change[sender] @ w[f"{layer}.in"])):
                    found.add(f"{sender}@{ROLES[at]}->L{layer}.mlp@{ROLES[at]}")
        for sender in order:
            if is_not_zero(change[sender] @ w["unembed"])[-1]:
                found.add(f"{sender}@query_is->logits")
    return sorted(on_the_way(found))


def differ(scores: np.ndarray) -> np.ndarray:
    """Whether the scores of a query's keys, itself and those before it, are not all the same."""
    rows = [row[: i + 1] for i, row in enumerate(scores)]
    return np.array([np.ptp(row) > LEAST for row in rows])


def is_not_zero(x: np.ndarray) -> np.ndarray:
    return abs(x).max(-1) > LEAST


def on_the_way(edges: set[str]) -> set[str]:
    """Edges from whose receiver others lead on to the logits."""
    reached, kept = {"logits"}, set()
    while True:
        more = {e for e in edges - kept if node(e.split("->")[1]) in reached}
        if not more:
            return kept
        kept |= more
        reached |= {e.split("->")[0] for e in more}


def node(receiver: str) -> str:
    what, _, role = receiver.partition("@")
    return (
        what if not role else f"{what.removesuffix(what[-2:]) if what[-2] == '.' else what}@{role}"
    )


def main() -> None:
    WHERE.mkdir(parents=True, exist_ok=True)
    for name, program in (("reverse", reverse()), ("lookup", lookup())):
        model = compiling.compile_rasp_to_model(
            program,
            vocab=set(VOCABULARY[1:]),
            max_seq_len=len(ROLES) - 1,
            causal=True,
            compiler_bos=BOS,
        )
        w, runs = weights(name, model), []
        for drawn in prompts(name, np.random.default_rng(0)):
            runs.append([Activations(model, w, words) for words, _ in drawn])
            assert [run.answer for run in runs[-1]] == [answer for _, answer in drawn]
        example = runs[0][0]
        about = {
            "program": name,
            "compiler": f"tracr-pypi {version('tracr-pypi')}",
            "vocabulary": VOCABULARY,
            "n_demos": N_DEMOS,
            "example": {"words": example.words, "logits": example.logits.tolist()},
            "truths": {a: truth(model, w, runs, a) for a in ("corrupted", "zero")},
        }
        save_file(w, WHERE / f"{name}.safetensors")
        (WHERE / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        print(name, {n: len(edges) for n, edges in about["truths"].items()})


if __name__ == "__main__":
    main()
