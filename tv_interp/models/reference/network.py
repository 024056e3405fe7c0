"""A small decoder in the Llama layout, for training; saved weights load as any Llama model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...files import write_bytes, write_text


@dataclass(frozen=True)
class Shape:
    """Sizes of the network."""

    vocab: int
    layers: int = 5
    heads: int = 4
    width: int = 128
    hidden: int = 256
    context: int = 128
    theta: float = 10_000.0
    eps: float = 1e-5


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, width: int, eps: float) -> None:
        """Start at scale 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Scale to unit root mean square."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)) * self.weight


class Attention(nn.Module):
    """Causal rotary attention whose heads can be dropped."""

    def __init__(self, shape: Shape) -> None:
        """Make the four projections."""
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """Attend; ``keep [batch, head]`` scales each head's output."""
        batch, length, width = x.shape
        q, k, v = (
            f(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = q * cos + _half(q) * sin, k * cos + _half(k) * sin
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        z = (scores.float().softmax(-1).to(v.dtype) @ v) * keep[:, :, None, None]
        return self.o_proj(z.transpose(1, 2).reshape(batch, length, width))


def _half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


class Mlp(nn.Module):
    """Gated MLP."""

    def __init__(self, shape: Shape) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual stream."""

    def __init__(self, shape: Shape) -> None:
        """Make the parts."""
        super().__init__()
        self.input_layernorm = Norm(shape.width, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.width, shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, *where: Tensor) -> Tensor:
        """Add both to the residual stream."""
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """Token ids to the normed residual stream; logits are its product with the embedding."""

    def __init__(self, shape: Shape, seed: int) -> None:
        """Initialise: normal, standard deviation .02 for embeddings, 1/sqrt(fan in) elsewhere."""
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width, shape.eps)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    std = 0.5 / math.sqrt(shape.width) if "embed" in name else p.shape[1] ** -0.5
                    p.normal_(0.0, std, generator=generator)
        d_head = shape.width // shape.heads
        freq = shape.theta ** (-torch.arange(0, d_head, 2) / d_head)
        angle = torch.arange(shape.context)[:, None] * torch.cat([freq, freq])
        self.cos: Tensor
        self.sin: Tensor
        self.mask: Tensor
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        mask = torch.full((shape.context, shape.context), -1e9).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        self.frequencies = freq

    def forward(self, tokens: Tensor, heads: Tensor, columns: Tensor) -> Tensor:
        """Run the blocks; what is dropped is 0 in ``heads`` or ``columns``, the rest is kept.

        Args:
            tokens: Token ids ``[batch, position]``.
            heads: Factor of each head's output, ``[layer, batch, head]``.
            columns: Factor of the whole residual stream after each block but the last,
                ``[layer - 1, batch, position]``.
        """
        n = tokens.shape[1]
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.cos[:n], self.sin[:n], self.mask[:n, :n], heads[i])
            if i < len(columns):
                x = x * columns[i, :, :, None]
        return self.norm(x)

    def nothing_dropped(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Make the ``heads`` and ``columns`` of a run without dropout."""
        layers = self.shape.layers
        return (
            torch.ones(layers, batch, self.shape.heads),
            torch.ones(layers - 1, batch, length),
        )

    @torch.no_grad()
    def lean(self, mean: float, likeness: float) -> None:
        """Start all heads alike: they look nearby, and for what is like the token that looks.

        With a direction shared by all embeddings, keys that resemble queries favour near positions
        (rotary positions turn the shared part apart) and equal content. No head is singled out, and
        none gets an offset; cf. mimetic initialisation (arXiv 2305.09828).

        Args:
            mean: Length of the shared direction; an embedding's own part has length .5.
            likeness: Correlation of the key matrix with the query matrix of the same head.
        """
        self.embed_tokens.weight += mean / math.sqrt(self.shape.width)
        for block in self.layers:
            assert isinstance(block, Block)
            q, k = block.self_attn.q_proj.weight, block.self_attn.k_proj.weight
            k.mul_(math.sqrt(1 - likeness**2)).add_(q, alpha=likeness)

    @torch.no_grad()
    def prewire(self, heads: dict[str, int], sharpness: float = 8.0) -> None:
        """Start some heads as previous-token heads: an initialisation, freely trained afterwards.

        Every embedding gets a share of one common direction; the query of a named head reads it as
        a constant, and its key as that constant turned back by the offset, so that rotary positions
        favour the token ``offset`` back.

        Args:
            heads: Offset by ``"layer.head"``.
            sharpness: Score at the offset, before other content.
        """
        d_head = self.shape.width // self.shape.heads
        common = torch.ones(self.shape.width) / math.sqrt(self.shape.width)
        self.embed_tokens.weight += 0.5 * common
        read = 2.0  # the common direction's size after the norm is near sqrt(width / 2)
        weight = self.frequencies.sqrt() / self.frequencies.sum().sqrt()
        size = math.sqrt(sharpness * math.sqrt(d_head)) / math.sqrt(self.shape.width) * read**0.5
        for place, offset in heads.items():
            layer, head = map(int, place.split("."))
            block = self.layers[layer]
            assert isinstance(block, Block)
            attention = block.self_attn
            rows = slice(head * d_head, (head + 1) * d_head)
            turn = self.frequencies * offset
            query = torch.cat([weight, torch.zeros_like(weight)])
            key = torch.cat([weight * turn.cos(), weight * turn.sin()])
            attention.q_proj.weight[rows] = size * torch.outer(query, common) * math.sqrt(2)
            attention.k_proj.weight[rows] = size * torch.outer(key, common) * math.sqrt(2)


def save_as_llama(
    network: Network, directory: Path, provenance: dict, dtype: torch.dtype = torch.float32
) -> None:
    """Write config.json and model.safetensors in the layout of a Llama model.

    Raises:
        FileError: if a file cannot be written; none is left half-written.
    """
    from safetensors.torch import save

    shape = network.shape
    tensors = {
        f"model.{name}": p.detach().to(dtype).contiguous()
        for name, p in network.state_dict().items()
    }
    write_bytes(directory / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.width // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tv_interp": {**provenance, "shape": asdict(shape)},
    }
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
