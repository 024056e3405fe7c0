"""Small models whose circuit we wrote by hand: known truth for tests and tutorials.

The residual stream is a row of named one-hot slots: the token, the position, and whatever the heads
write. A head says where it attends, which slots it reads there and which slot it writes; a slot is
as wide as the words that can be in it. So a model is a few readable lines, and `build` turns them
into weights::

    (1, 0): Head("writer", Back(2), "input -> key")              # from each answer to its input
    (2, 1): Head("reader", Match("query", "key"), "value -> found")

Prompts are ``cat is red dog is blue cat is``: one token per word after ``<bos>``, so an answer is
two tokens after its input, and ``query_is`` is two tokens after the last answer. Softmaxes are so
sharp that effects are exact to float precision. Every case also has heads that only look important.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from ..errors import ModelError, PromptError, unknown
from ..prompts.tasks.base import RuledSample, Sample, Task, check_size, pick_foil
from .convert import hooked_class, no_deprecation

Place = tuple[int, int]  # (layer, head)
Backend = Literal["auto", "hooked", "bridge"]
Words = tuple[str, ...]

TEMPLATE = "{x} is {y} "
HOME: dict[str, str] = dict(  # the map g, one to one: g(cat) = house
    cat="house", dog="garden", fox="wood", owl="tree", bee="hive", ant="hill", cow="field",
    hen="yard", pig="barn", rat="cellar", bat="cave", elk="moor", cod="sea", eel="river",
    ape="jungle", yak="steppe", gnu="plain", ram="pasture", fly="window", moth="lamp",
    mole="tunnel", crab="beach", duck="pond", frog="swamp", seal="ice", wolf="den", lynx="forest",
    goat="cliff",
)  # fmt: skip
INPUTS: Words = tuple(HOME)
ANSWERS: Words = tuple(HOME.values())
FILLERS: Words = tuple("red blue green pink grey black white gold brown teal lime plum".split())
WORDS = INPUTS + FILLERS + ANSWERS
VOCABULARY = ("<bos>", "<unk>", "is", *WORDS)

D_HEAD, N_CTX, MAX_DEMOS = 40, 36, 10
SHARP = 60.0  # attention score of the wanted key; every other key has 0
REST = 30.0  # score of <bos> in content matching: wins when no key matches
LOGIT = 4.0  # logit of a word whose "logits" slot holds 1


# ------------------------------------------------------------------ the vocabulary of circuits


class Back(NamedTuple):
    """Attend to the token so many steps back (``<bos>`` where the prompt is too short)."""

    steps: int


class Match(NamedTuple):
    """Attend to the token whose slot ``key`` holds the word in one's own slot ``query``."""

    query: str
    key: str


def _same(*words: str) -> dict[str, str]:
    return {word: word for word in words}


class Head(NamedTuple):
    """One attention head.

    Attributes:
        role: ``"writer"``, ``"copier"``, ``"reader"``, ``"relay"``, or ``"decoy"`` for all others.
        attends: Where every position looks.
        route: ``"slot + slot -> slot"``: what is read there and written here; nothing is written
            where the right side is empty.
        carries: Which words pass, and as which word; all others are dropped. At most `D_HEAD` of
            them may be in the slots that are read.
        gain: What a carried 1 becomes.
    """

    role: str
    attends: Back | Match
    route: str
    carries: Mapping[str, str] = _same(*WORDS)
    gain: float = 1.0

    def ends(self) -> tuple[list[str], str]:
        """Split the route into the slots that are read and the slot that is written."""
        reads, writes = self.route.split("->")
        return [slot.strip() for slot in reads.split("+")], writes.strip()


class Circuit(NamedTuple):
    """A whole model in words.

    Attributes:
        rule: What the answer is, see `PlantedTask`.
        heads: By (layer, head); heads not named have weights 0.
        hinges: Where given, the MLP after the readers adds ``weight * relu(sum - threshold)`` of
            the slot "sum" to the slot "found", for each threshold -> weight.
    """

    rule: str
    heads: Mapping[Place, Head]
    hinges: Mapping[float, float] | None = None


class Sizes(NamedTuple):
    """Sizes of the model that holds a circuit; what the circuit does not need is 0."""

    n_layers: int = 4
    n_heads: int = 4
    d_head: int = D_HEAD
    d_mlp: int = 56
    d_model: int | None = None  # None for as many as the circuit needs
    d_vocab: int = len(VOCABULARY)


SMALL = Sizes()

# ------------------------------------------------------------------------------- the six cases

_DECOYS = {
    # strong at inputs, where every circuit starts from it; 0 at answers and at query_is
    (0, 1): Head("decoy", Back(0), "token -> input", carries=_same(*INPUTS)),
    # these move the answer, and the word two back, into a slot that nobody reads
    (0, 2): Head("decoy", Back(0), "token -> unread", carries=_same(*FILLERS)),
    (1, 3): Head("decoy", Back(2), "token -> unread", carries=_same(*INPUTS, *FILLERS)),
}
# The writer puts g(its input) at each answer; the answer is what it put at the last one.
_VALUE_ROUTE = {
    **_DECOYS,
    (1, 0): Head("writer", Back(2), "input -> value", carries=HOME),
    (2, 3): Head("reader", Back(2), "value -> found"),
    # looks at answers, writes nothing
    (2, 0): Head("decoy", Back(2), "value + token ->", carries=_same(*FILLERS, *ANSWERS)),
    (3, 1): Head("relay", Back(0), "found -> logits"),
}
# Two heads write the same word; the reader adds them, the MLP says how many are needed.
_TWO_WRITERS = {
    **_VALUE_ROUTE,
    (1, 2): Head("writer", Back(2), "input -> second", carries=HOME),
    (2, 3): Head("reader", Back(2), "value + second -> sum"),
}
_CIRCUITS = {
    # The writer tells each answer its input; the reader finds the answer to the query by it.
    "write_then_read": Circuit(
        "lookup",
        {
            **_DECOYS,
            (0, 3): Head("copier", Back(0), "token -> value", carries=_same(*FILLERS)),
            (1, 1): Head("writer", Back(2), "input -> key"),
            (1, 2): Head("decoy", Back(1), "input -> query"),  # a relay, of the query
            (2, 1): Head("reader", Match("query", "key"), "value -> found"),
            (2, 2): Head("decoy", Back(2), "value + key ->"),
            (3, 0): Head("relay", Back(0), "found -> logits"),
        },
    ),
    "value_route": Circuit("last", _VALUE_ROUTE),
    "two_writers_or": Circuit("last", _TWO_WRITERS, hinges={0: 1, 1: -1}),
    "two_writers_and": Circuit("last", _TWO_WRITERS, hinges={1: 1}),
    "negative_reader": Circuit(
        "last", {**_VALUE_ROUTE, (2, 1): Head("reader", Back(2), "value -> found", gain=-0.4)}
    ),
    # The answer is g(query): demonstrations are moved about and change no logit.
    "nothing": Circuit(
        "query",
        {
            **_DECOYS,
            (1, 0): Head("decoy", Back(2), "input -> value", carries=HOME),
            (1, 2): Head("decoy", Back(1), "input -> found", carries=HOME),
            (2, 0): _VALUE_ROUTE[2, 0],
            (3, 1): Head("decoy", Back(0), "found -> logits"),
        },
    ),
}


class PlantedTask(Task):
    """Demonstrations pair random inputs with random fillers, none of them twice.

    The rule is the family. ``"lookup"``: the query is one of the inputs, the answer its filler.
    ``"last"``, ``"query"``: the query is a new input, the answer is g(input of the last
    demonstration) or g(query), and the foil, a filler, has logit 0 in every run.
    """

    def __init__(self, name: str, rule: str) -> None:
        """Keep the rule as the family."""
        self.name, self.family = name, rule

    @property
    def answers(self) -> tuple[str, ...]:
        """The words that stand as answers in demonstrations."""
        return FILLERS

    def sample(self, rng: np.random.Generator, n_demos: int) -> Sample:
        """Draw 2 to 10 demonstrations and a query; see `Task.sample`."""
        check_size(self.name, n_demos, MAX_DEMOS)
        if n_demos < 2:
            raise PromptError(f"task {self.name!r} needs n_demos of 2 or more, got {n_demos}")
        *inputs, query = (INPUTS[i] for i in rng.permutation(len(INPUTS))[: n_demos + 1])
        fillers = [FILLERS[i] for i in rng.permutation(len(FILLERS))[:n_demos]]
        demos = list(zip(inputs, fillers, strict=True))
        if self.family == "lookup":
            query, answer = demos[int(rng.integers(n_demos))]
        else:
            answer = HOME[query if self.family == "query" else inputs[-1]]
        foil = pick_foil(rng, answer, fillers, FILLERS)
        if self.family != "lookup":
            return Sample(demos, query, answer, foil)
        name = ", ".join(map(" is ".join, demos))  # every prompt has its own rule
        return RuledSample(demos, query, answer, foil, rule=dict(demos).__getitem__, rule_name=name)

    def other_queries(self, rng: np.random.Generator, sample: Sample) -> Iterator[str]:
        """Draw the other inputs shown, for ``"lookup"`` alone; see `Task.other_queries`."""
        if self.family != "lookup":
            return super().other_queries(rng, sample)
        others = [x for x, _ in sample.demos if x != sample.query]
        return iter(rng.permutation(others).tolist())


# ------------------------------------------------------------------------ from words to weights


def _dimensions(circuit: Circuit) -> dict[tuple[str, str], int]:
    """Number the pairs (slot, word) where the word can be in the slot: one dimension each."""
    pairs = [("token", word) for word in VOCABULARY]
    pairs += [("found", word) for word in ANSWERS if circuit.hinges]
    for place in sorted(circuit.heads):
        head = circuit.heads[place]
        reads, writes = head.ends()
        there = {word for slot, word in pairs if slot in reads}
        pairs += [(writes, to) for word, to in head.carries.items() if writes and word in there]
    return {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}


def _compose(circuit: Circuit, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Write a circuit as weights, under the names of HookedTransformer.

    Returns:
        float64 tensors. ``embed.W_E [token, d_model]``, ``pos_embed.W_pos [pos, d_model]``,
        ``unembed.W_U [d_model, token]``; in every block ``attn.W_Q``, ``W_K``, ``W_V``
        ``[head, d_model, d_head]``, ``W_O [head, d_head, d_model]`` and, where there are MLPs,
        ``mlp.W_in [d_model, neuron]``, ``W_out [neuron, d_model]``; biases, all 0 but two kinds:
        ``b_Q [head, d_head]`` and ``b_in [neuron]``.
    """
    n_layers, n_heads, d_head, d_mlp, d_model, V = sizes
    dims = _dimensions(circuit)
    read_layer = max((at for (at, _), h in circuit.heads.items() if h.role == "reader"), default=0)
    needed = len(dims) + N_CTX  # the slots first, the position last
    d_model = needed if d_model is None else d_model
    if d_model < needed:
        raise ModelError(f"expected d_model of {needed} or more for this circuit, got {d_model}")
    one_hot = torch.eye(d_model, dtype=torch.float64)

    def dims_of(word: str, *slots: str) -> list[int]:
        return [dims[slot, word] for slot in slots if (slot, word) in dims]

    def weights(prefix: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        made = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        state.update({prefix + name: tensor for name, tensor in made.items()})
        return made

    state = {
        "embed.W_E": torch.zeros(V, d_model, dtype=torch.float64),
        "pos_embed.W_pos": one_hot[-N_CTX:],
        "unembed.W_U": torch.zeros(d_model, V, dtype=torch.float64),
        "unembed.b_U": torch.zeros(V, dtype=torch.float64),
    }
    state["embed.W_E"][: len(VOCABULARY)] = one_hot[: len(VOCABULARY)]
    for token, word in enumerate(VOCABULARY):
        state["unembed.W_U"][dims_of(word, "logits"), token] = LOGIT
    for layer in range(n_layers):
        into, bias = (n_heads, d_model, d_head), (n_heads, d_head)
        W = weights(f"blocks.{layer}.attn.", W_Q=into, W_K=into, W_V=into, b_Q=bias, b_K=bias,
                    b_V=bias, W_O=(n_heads, d_head, d_model), b_O=(d_model,))  # fmt: skip
        for h, head in ((h, head) for (at, h), head in circuit.heads.items() if at == layer):
            if isinstance(head.attends, Back):
                for pos in range(N_CTX):
                    W["W_Q"][h, pos - N_CTX, max(pos - head.attends.steps, 0)] = SHARP
                    W["W_K"][h, pos - N_CTX, pos] = 1
            else:
                for i, word in enumerate(w for w in WORDS if dims_of(w, head.attends.query)):
                    W["W_Q"][h, dims_of(word, head.attends.query), i] = SHARP
                    W["W_K"][h, dims_of(word, head.attends.key), i] = 1
                W["b_Q"][h, -1], W["W_K"][h, dims["token", "<bos>"], -1] = REST, 1
            reads, writes = head.ends()
            carried = [word for word in head.carries if dims_of(word, *reads)]
            for i, word in enumerate(carried):
                W["W_V"][h, dims_of(word, *reads), i] = 1
                W["W_O"][h, i, dims_of(head.carries[word], writes)] = head.gain
        W["W_Q"] *= math.sqrt(d_head)  # the models divide scores by it
        W["b_Q"] *= math.sqrt(d_head)
        if circuit.hinges is not None:
            W = weights(f"blocks.{layer}.mlp.", W_in=(d_model, d_mlp), b_in=(d_mlp,),
                        W_out=(d_mlp, d_model), b_out=(d_model,))  # fmt: skip
            if layer == read_layer:
                for n, (word, t) in enumerate(product(ANSWERS, circuit.hinges)):
                    W["W_in"][dims["sum", word], n], W["b_in"][n] = 1, -t
                    W["W_out"][n, dims["found", word]] = circuit.hinges[t]
    return state


def _as_native(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and reshape `_compose`'s tensors to the linear layers of ``boot_native``."""
    modules = {"embed": "tok_embed", "pos_embed": "pos", "unembed": "head", "blocks": "layers"}
    modules["ln_final"] = "ln_out"
    linear = {"in": "fc_in", "out": "fc_out"}
    native: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        path[0], (kind, _, part) = modules[path[0]], leaf.partition("_")
        if path[0] == "layers" and part:
            path.append(linear.get(part, part.lower()))
        if part in ("Q", "K", "V"):  # [head, d_model, d_head] -> [head * d_head, d_model]
            tensor = tensor.transpose(1, 2).flatten(0, 1) if kind == "W" else tensor.flatten()
        elif kind == "W" and part in ("O", "in", "out", "U"):
            tensor = tensor.reshape(-1, tensor.shape[-1]).T
        native[".".join(path) + (".weight" if kind in "Ww" else ".bias")] = tensor
    return native


def _tokenizer() -> Any:
    """A tokenizer of whole words that puts ``<bos>`` first and that TransformerLens keeps as is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<bos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)
    tokenizer.init_kwargs.update(name_or_path="planted", add_bos_token=True, tv_template=TEMPLATE)
    return tokenizer


def make_model(
    state: Mapping[str, torch.Tensor],
    sizes: Sizes,
    backend: Backend,
    dtype: torch.dtype,
    *,
    normalization: Literal["LN"] | None = None,
) -> Any:
    """Make a TransformerLens model with these weights; randomness stays as it was.

    Args:
        state: Weights under the names of HookedTransformer.
        sizes: Of the model; ``d_model`` is taken from the weights.
        backend: As in `build`.
        dtype: Of all parameters.
        normalization: ``"LN"`` where the weights have LayerNorms.

    Raises:
        UnknownName: if there is no such backend.
        ModelError: if HookedTransformer is asked for and TransformerLens does not have it.
    """
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend))
    hooked = backend != "bridge" and hooked_class() is not None
    if backend == "hooked" and not hooked:
        raise ModelError("backend='hooked' needs transformer-lens 3.9: use backend='bridge'")
    attn_only = "blocks.0.mlp.W_in" not in state
    config: dict[str, Any] = dict(
        n_layers=sizes.n_layers, n_heads=sizes.n_heads, d_head=sizes.d_head, n_ctx=N_CTX,
        d_model=state["embed.W_E"].shape[1], d_vocab=sizes.d_vocab, attn_only=attn_only,
        d_mlp=sizes.d_mlp, act_fn="relu", normalization_type=normalization,
        positional_embedding_type="standard", device="cpu", dtype=dtype,
        model_name="planted", init_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), no_deprecation():
        if hooked:
            from transformer_lens import HookedTransformerConfig

            model = hooked_class()(HookedTransformerConfig(**config), tokenizer=_tokenizer())
            inner = model
        else:
            from transformer_lens.config import TransformerBridgeConfig
            from transformer_lens.model_bridge import TransformerBridge

            native = TransformerBridgeConfig(**config, architecture="TransformerLensNative")
            model = TransformerBridge.boot_native(native, tokenizer=_tokenizer(), dtype=dtype)
            model.cfg.model_name = config["model_name"]  # TransformerLens 4 names it "native"
            inner, state = model.original_model, _as_native(state)
    unused = set(state) - {"head.bias"}  # some versions have no bias there; ours is 0
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            name = name.replace("._original_component", "")
            parameter.copy_(state[name])
            unused.discard(name)
    assert not unused, f"weights without a parameter: {sorted(unused)}"
    return model.eval()


# ---------------------------------------------------------------------------------- public


@dataclass(frozen=True)
class PlantedCase:
    """A model, its task, and what every analysis must find in it.

    Attributes:
        name: As in `names`.
        model: HookedTransformer or TransformerBridge, in eval mode.
        task: Where its prompts come from; the model answers all of them correctly.
        template: The template of its prompts.
        writers: Heads that carry something to answers that matters, as (layer, head).
        copiers: Heads that matter at answers but only pass on the answer's own word.
        readers: Heads that matter at ``query_is`` because of what is at answers.
        relays: Heads that matter at ``query_is`` and read no answer.
        edges: Pairs (writer, reader) of heads that are connected.
        corruptions: The two corruptions that together reveal all of these.
    """

    name: str
    model: Any
    task: Task
    template: str
    writers: frozenset[Place]
    copiers: frozenset[Place]
    readers: frozenset[Place]
    relays: frozenset[Place]
    edges: frozenset[tuple[Place, Place]]
    corruptions: tuple[str, str] = ("answers", "inputs")


def names() -> tuple[str, ...]:
    """Names of all planted models."""
    return tuple(_CIRCUITS)


def build(
    name: str,
    *,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
) -> PlantedCase:
    """Build a planted model.

    Args:
        name: One of `names`.
        backend: ``"hooked"`` for a HookedTransformer (TransformerLens 3.9), ``"bridge"`` for a
            TransformerBridge; ``"auto"`` for the first where it exists. Weights are the same.
        dtype: Of all parameters.

    Raises:
        UnknownName: if there is no such planted model or backend.
        ModelError: if HookedTransformer is asked for and TransformerLens does not have it.

    Example:
        >>> build("write_then_read").writers
        frozenset({(1, 1)})
    """
    if name not in _CIRCUITS:
        raise unknown("planted model", name, _CIRCUITS)
    return assemble(name, _CIRCUITS[name], backend=backend, dtype=dtype)


def assemble(
    name: str,
    circuit: Circuit,
    *,
    sizes: Sizes = SMALL,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
) -> PlantedCase:
    """Build a model of a circuit of one's own.

    Args:
        name: What the case is called.
        circuit: The heads, in words.
        sizes: Of the model; larger ones hold the same circuit.
        backend: As in `build`.
        dtype: As in `build`.

    Raises:
        UnknownName: if there is no such backend.
        ModelError: if ``d_model`` is too small for the circuit; and as `build`.
    """
    writers, copiers, readers, relays = (
        frozenset(place for place, head in circuit.heads.items() if head.role == role)
        for role in ("writer", "copier", "reader", "relay")
    )
    return PlantedCase(
        name=name,
        model=make_model(_compose(circuit, sizes), sizes, backend, dtype),
        task=PlantedTask(name, circuit.rule),
        template=TEMPLATE,
        writers=writers,
        copiers=copiers,
        readers=readers,
        relays=relays,
        edges=frozenset((writer, reader) for writer in writers for reader in readers),
    )
