"""Plain loops of TransformerLens hooks: what every number of tv_interp must equal.

One run of the model for one prompt and one intervention: no batches, no padding, no reuse. Slow on
purpose, and the baseline of the benchmarks. Of tv_interp it knows only the fields of prompts:
``tokens, lengths, role_ids, demo_ids, answer, foil``.
"""

from __future__ import annotations

import torch

INPUTS = ("q", "k", "v", "pattern", "z")
ROLES = ("other", "bos", "x", "is", "answer", "end", "query_x", "query_is")


# ---------------------------------------------------------------------------------- one prompt


def tokens_of(prompts, i):
    """Tokens of prompt i, ``[1, pos]``, without padding."""
    return prompts.tokens[i : i + 1, : prompts.lengths[i]]


def tokens_with(prompts, i, role):
    """Every token of a role in prompt i."""
    return [p for p in range(prompts.lengths[i]) if ROLES[prompts.role_ids[i, p]] == role]


def last_tokens(prompts, i, role, demo=None):
    """The last token of each span of a role: one a demonstration, or one in all."""
    last = {int(prompts.demo_ids[i, p]): p for p in tokens_with(prompts, i, role)}
    return [p for d, p in sorted(last.items()) if demo is None or d == demo]


def logit_diff(logits, prompts, i):
    """Logit of the answer minus logit of the foil."""
    return logits[prompts.answer[i]] - logits[prompts.foil[i]]


# -------------------------------------------------------------------------------------- one run


def run(model, tokens, edits=()):
    """Run with ``edits``, pairs of (hook name, function of the activation): last token's logits."""

    def hook_of(edit):
        return lambda activation, hook: edit(activation.clone())

    hooks = [(name, hook_of(edit)) for name, edit in edits]
    with torch.no_grad():
        return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)[0, -1]


def read(model, tokens, names, edits=()):
    """Run with ``edits`` and return the activations of the one prompt at hooks, in order."""
    seen = {}

    def keep_as(name):
        def keep(activation):
            seen[name] = activation[0].clone()
            return activation

        return keep

    run(model, tokens, [*edits, *((name, keep_as(name)) for name in names)])
    return [seen[name] for name in names]


def z_name(layer):
    return f"blocks.{layer}.attn.hook_z"


def read_z(model, tokens):
    """Head outputs of one prompt, by layer: ``[pos, head, d_head]`` each."""
    return read(model, tokens, [z_name(layer) for layer in range(model.cfg.n_layers)])


def put(positions, head, value):
    """Edit: put ``value [position, d_head]`` at positions of a head."""

    def edit(activation):
        activation[0, positions, head] = value
        return activation

    return edit


def hold(value, free=()):
    """Edit: put a recorded activation ``[pos, ...]`` back, but at the positions that are free."""

    def edit(activation):
        new = value.clone()
        for p in free:
            new[p] = activation[0, p]
        return new[None]

    return edit


def sides(contrast, direction):
    """(base, donor, sign): what is run, what is patched in, and the sign of the effect."""
    if direction == "denoise":
        return contrast.corrupted, contrast.clean, 1
    return contrast.clean, contrast.corrupted, -1


# ---------------------------------------------------------------------------------- the effects


def total(model, contrast, metric=logit_diff):
    """m(clean) - m(corrupted), ``[prompt]``."""
    clean, corrupted = contrast.clean, contrast.corrupted
    return torch.stack(
        [
            metric(run(model, tokens_of(clean, i)), clean, i)
            - metric(run(model, tokens_of(corrupted, i)), clean, i)
            for i in range(len(contrast))
        ]
    )


def patch_heads(
    model, contrast, sets, at, direction="denoise", metric=logit_diff, demo=None, shift=0
):
    """Effect of exchanging the outputs of each set of heads at one role, ``[prompt, set]``.

    A set is a list of (layer, head). ``shift`` takes the donor's values from the prompt so many
    rows further: a wrong donor.
    """
    base, donor, sign = sides(contrast, direction)
    effects = torch.zeros(len(contrast), len(sets), dtype=torch.float64)
    for i in range(len(contrast)):
        tokens, other = tokens_of(base, i), (i + shift) % len(contrast)
        here, there = last_tokens(base, i, at, demo), last_tokens(donor, other, at, demo)
        plain = metric(run(model, tokens), contrast.clean, i)
        z = read_z(model, tokens_of(donor, other))
        for n, heads in enumerate(sets):
            edits = [(z_name(la), put(here, head, z[la][there, head])) for la, head in heads]
            patched = metric(run(model, tokens, edits), contrast.clean, i)
            effects[i, n] = sign * (patched - plain)
    return effects


def patch_local_paths(model, contrast, heads, at, direction="denoise", metric=logit_diff):
    """As `patch_heads`, but all tokens other than those of the role and the last are held."""
    base, donor, sign = sides(contrast, direction)
    effects = torch.zeros(len(contrast), len(heads), dtype=torch.float64)
    names = [f"blocks.{la}.hook_resid_post" for la in range(model.cfg.n_layers)]
    for i in range(len(contrast)):
        tokens = tokens_of(base, i)
        here = last_tokens(base, i, at)
        plain = metric(run(model, tokens), contrast.clean, i)
        z = read_z(model, tokens_of(donor, i))
        free = [*here, tokens.shape[1] - 1]
        held = [hold(value, free) for value in read(model, tokens, names)]
        for n, (la, head) in enumerate(heads):
            edits = [(z_name(la), put(here, head, z[la][here, head]))]
            edits += list(zip(names, held, strict=True))
            effects[i, n] = sign * (metric(run(model, tokens, edits), contrast.clean, i) - plain)
    return effects


def knock_out(model, prompts, sets, dest, src, demos=None, metric=logit_diff):
    """Metric lost when a set of heads cannot look from one role to another, ``[prompt, set]``."""
    effects = torch.zeros(len(prompts), len(sets), dtype=torch.float64)
    for i in range(len(prompts)):
        tokens = tokens_of(prompts, i)
        rows, columns = tokens_with(prompts, i, dest), tokens_with(prompts, i, src)
        if demos is not None:
            columns = [p for p in columns if prompts.demo_ids[i, p] in demos]
        plain = metric(run(model, tokens), prompts, i)
        for n, heads in enumerate(sets):
            edits = []
            for layer, head in heads:

                def cut(scores, head=head, rows=rows, columns=columns):
                    for row in rows:
                        scores[0, head, row, columns] = float("-inf")
                    return scores

                edits.append((f"blocks.{layer}.attn.hook_attn_scores", cut))
            effects[i, n] = plain - metric(run(model, tokens, edits), prompts, i)
    return effects


def sources_of(prompts, i, role, dest):
    """The tokens that a source role means, as seen from token ``dest``."""
    found = []
    for src in range(dest + 1):
        name = ROLES[prompts.role_ids[i, src]]
        own, demo = int(prompts.demo_ids[i, dest]), int(prompts.demo_ids[i, src])
        if role == "all":
            meant = True
        elif own < 0 or role == "bos":
            meant = name == role
        elif role == "earlier":
            meant = 0 <= demo < own
        elif role == "carried":
            meant = not (name == "answer" and demo == own)
        else:
            meant = name == role and demo == own
        if meant:
            found.append(src)
    return found


def patch_sources(model, contrast, cells, at, direction="denoise", metric=logit_diff):
    """Effect of each cell, a ((layer, head), source role, part), ``[prompt, cell]``."""
    base, donor, sign = sides(contrast, direction)
    effects = torch.zeros(len(contrast), len(cells), dtype=torch.float64)
    for i in range(len(contrast)):
        tokens, donor_tokens = tokens_of(base, i), tokens_of(donor, i)
        plain = metric(run(model, tokens), contrast.clean, i)
        layers = sorted({layer for (layer, _), _, _ in cells})
        names = [f"blocks.{la}.attn.hook_{w}" for la in layers for w in INPUTS]
        ours = dict(zip(names, read(model, tokens, names), strict=True))
        theirs = dict(zip(names, read(model, donor_tokens, names), strict=True))
        for n, ((layer, head), role, part) in enumerate(cells):
            change = {
                p: change_of_z(
                    model, tokens, ours, theirs, layer, head, p, sources_of(base, i, role, p), part
                )
                for p in last_tokens(base, i, at)
            }

            def add(z, head=head, change=change):
                for p in change:
                    z[0, p, head] += change[p]
                return z

            patched = metric(run(model, tokens, [(z_name(layer), add)]), contrast.clean, i)
            effects[i, n] = sign * (patched - plain)
    return effects


def change_of_z(model, tokens, ours, theirs, layer, head, dest, sources, part):
    """Change of a head's z at ``dest`` when ``part`` of what it takes from ``sources`` changes.

    ``ours`` and ``theirs`` are what base and donor have at hooks, by name.
    """
    names = [f"blocks.{layer}.attn.hook_{what}" for what in INPUTS]
    _, _, v, A, z = (ours[name] for name in names)
    q_donor, k_donor, v_donor, A_donor, _ = (theirs[name] for name in names)
    group = head // (model.cfg.n_heads // v.shape[1])  # the key and value head that it uses
    put_k = (names[1], put(sources, group, k_donor[sources, group]))
    put_v = (names[2], put(sources, group, v_donor[sources, group]))
    if part in ("k", "kv"):
        (new,) = read(model, tokens, names[4:], [put_k] if part == "k" else [put_k, put_v])
        return new[dest, head] - z[dest, head]
    if part == "q":
        put_q = (names[0], put([dest], head, q_donor[dest, head]))
        (A_donor,) = read(model, tokens, names[3:4], [put_q])
    change = torch.zeros_like(z[dest, head])
    for j in sources:
        old, new = A[head, dest, j], A_donor[head, dest, j]
        change += {
            "pattern": (new - old) * v[j, group],
            "q": (new - old) * v[j, group],
            "value": old * (v_donor[j, group] - v[j, group]),
            "interaction": (new - old) * (v_donor[j, group] - v[j, group]),
            "both": new * v_donor[j, group] - old * v[j, group],
        }[part]
    return change


def patch_paths(
    model,
    contrast,
    paths,
    sender_at="answer",
    receiver_at="query_is",
    direction="denoise",
    metric=logit_diff,
    through="direct",
):
    """Effect of each path, a (sender, receiver, via), ``[prompt, path]``.

    Path patching:

    1. Run the base with the sender's z from the donor, and what does not respond held at what it
       was: the outputs of all later attention and MLP layers below the receiver ("direct"), those
       of attention ("mlp"), or all tokens but those of the sender ("position").
    2. Put the inputs named by ``via`` into a base run and read the receiver's z.
    3. Put that z into a base run, where all that follows is free.
    """
    base, donor, sign = sides(contrast, direction)
    effects = torch.zeros(len(contrast), len(paths), dtype=torch.float64)
    for i in range(len(contrast)):
        tokens = tokens_of(base, i)
        plain = metric(run(model, tokens), contrast.clean, i)
        z = read_z(model, tokens_of(donor, i))
        here, last = last_tokens(base, i, sender_at), last_tokens(base, i, receiver_at)
        for n, ((w_layer, w_head), (r_layer, r_head), via) in enumerate(paths):
            frozen = [f"blocks.{la}.hook_attn_out" for la in range(w_layer + 1, r_layer)]
            if through == "direct":
                frozen += [f"blocks.{la}.hook_mlp_out" for la in range(w_layer, r_layer)]
            if through == "position":
                frozen = [f"blocks.{la}.hook_resid_post" for la in range(w_layer, r_layer)]
            free = here if through == "position" else []
            held = [hold(value, free) for value in read(model, tokens, frozen)]
            sent = (z_name(w_layer), put(here, w_head, z[w_layer][here, w_head]))
            inputs = [f"blocks.{r_layer}.attn.hook_{what}" for what in via]
            seen = read(model, tokens, inputs, [sent, *zip(frozen, held, strict=True)])
            edits = [(name, hold(value)) for name, value in zip(inputs, seen, strict=True)]
            (new,) = read(model, tokens, [z_name(r_layer)], edits)
            edit = (z_name(r_layer), put(last, r_head, new[last, r_head]))
            patched = metric(run(model, tokens, [edit]), contrast.clean, i)
            effects[i, n] = sign * (patched - plain)
    return effects
