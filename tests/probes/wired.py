"""Models wired by hand: attention heads whose behaviour is known, among random ones.

No LayerNorm, no scale; the residual stream holds [token | position | previous token | output]
as one-hot subspaces, and planted heads have scores so large that their attention is one-hot.
Subspaces do not overlap, so a head reads what it is meant to read.
"""

import random
import warnings
from dataclasses import dataclass

import torch

from mechcausal.models.adapter import HookedTransformer

VOCAB, CONTEXT = 20, 16
TOKEN = slice(0, VOCAB)
POSITION = slice(VOCAB, VOCAB + CONTEXT)
PREVIOUS = slice(POSITION.stop, POSITION.stop + VOCAB)
OUTPUT = slice(PREVIOUS.stop, PREVIOUS.stop + VOCAB)
RELAY = slice(OUTPUT.stop, OUTPUT.stop + VOCAB)
JUNK = slice(RELAY.stop, RELAY.stop + VOCAB)
D_HEAD = VOCAB + CONTEXT
SHARPNESS = 40.0

Head = tuple[int, int]


@dataclass(frozen=True)
class Planted:
    """Where each head is."""

    model: HookedTransformer
    partner: Head
    induction: Head
    useless: Head
    previous: Head
    duplicate: Head
    positional: Head
    offset: int

    @property
    def verdicts(self) -> dict[Head, tuple[str, ...]]:
        """What each planted head has to be called."""
        return {
            self.partner: ("previous_token",),
            self.previous: ("previous_token",),
            self.induction: ("induction",),
            self.useless: ("induction",),
            self.duplicate: ("duplicate_token",),
            self.positional: ("positional",),
        }


def planted(seed: int, *, n_layers: int | None = None, n_heads: int | None = None) -> Planted:
    """An induction circuit, a useless induction head, and one head of each other kind."""
    source = random.Random(seed)
    n_layers = n_layers or source.randint(2, 6)
    n_heads = n_heads or source.randint(4, 12)
    model = blank(n_layers, n_heads, seed=seed, noise=source.uniform(0.1, 0.35))
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    source.shuffle(heads)

    def take(first: int = 0, last: int = n_layers - 1) -> Head:
        head = next(head for head in heads if first <= head[0] <= last)
        heads.remove(head)
        return head

    partner = take(last=n_layers - 2)
    induction, useless = take(first=partner[0] + 1), take(first=partner[0] + 1)
    offset = source.choice((2, 3, 5, 6, 7, 8))
    wiring = Planted(model, partner, induction, useless, take(), take(), take(), offset)
    look_back(model, partner, 1)
    copy(model, partner, PREVIOUS)
    match(model, induction, PREVIOUS)
    copy(model, induction, OUTPUT)
    match(model, useless, PREVIOUS)
    look_back(model, wiring.previous, 1)
    match(model, wiring.duplicate, TOKEN)
    look_back(model, wiring.positional, offset)
    return wiring


@dataclass(frozen=True)
class WiredCircuit:
    """A two-step circuit among decoys, and the paths that it consists of.

    Attributes:
        model: the model.
        induction: the induction head that writes the prediction.
        decoys: heads that do the same as those of the circuit, but whose output is of no use.
        paths: (sender, input of the induction head).
    """

    model: HookedTransformer
    induction: Head
    decoys: tuple[Head, ...]
    paths: frozenset[tuple[Head, str]]


def wired_circuit(seed: int) -> WiredCircuit:
    """A previous-token head feeds keys; in two of three models another feeds queries or values.

    Decoys: previous-token heads that write beside the keys, one of them after the induction head or
    in its layer; an induction head that reads the same keys and writes nothing, one that reads the
    decoy's; heads that look at the token itself and write it where nothing reads it.
    """
    source = random.Random(seed)
    n_layers, n_heads = source.randint(3, 4), source.randint(4, 6)
    model = blank(n_layers, n_heads, seed=seed, noise=source.uniform(0.1, 0.35), n_relays=2)
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    source.shuffle(heads)

    def take(first: int = 0, last: int = n_layers - 1) -> Head:
        head = next(head for head in heads if first <= head[0] <= last)
        heads.remove(head)
        return head

    induction = take(first=1)
    sender = take(last=induction[0] - 1)
    useless, misled = take(first=1), take(first=1)
    aside, after, relay_decoy = take(), take(first=induction[0]), take()
    paths = {(sender, "k")}
    look_back(model, sender, 1)
    copy(model, sender, PREVIOUS)
    match(model, induction, PREVIOUS)
    copy(model, induction, OUTPUT)
    match(model, useless, PREVIOUS)
    for decoy in (aside, after):
        look_back(model, decoy, 1)
        copy(model, decoy, JUNK)
    match(model, misled, JUNK)
    look_back(model, relay_decoy, 0)
    copy(model, relay_decoy, JUNK)
    if (composition := seed % 3) and (relay := _relay(model, heads, induction, composition == 2)):
        paths.add((relay, "v" if composition == 2 else "q"))
    decoys = (useless, misled, aside, after, relay_decoy)
    return WiredCircuit(model, induction, decoys, frozenset(paths))


@torch.no_grad()
def _relay(
    model: HookedTransformer, heads: list[Head], induction: Head, to_values: bool
) -> Head | None:
    """A head that copies each token, from which the induction head reads values or queries."""
    relay = next((head for head in heads if head[0] < induction[0]), None)
    if relay is None:
        return None
    look_back(model, relay, 0)
    copy(model, relay, RELAY)
    attention = model.blocks[induction[0]].attn
    weights = attention.W_V if to_values else attention.W_Q
    weights[induction[1], RELAY] = weights[induction[1], TOKEN]
    weights[induction[1], TOKEN] = 0
    return relay


def blank(
    n_layers: int, n_heads: int, *, seed: int = 0, noise: float = 0.2, n_relays: int = 0
) -> HookedTransformer:
    """Random heads that write next to nothing; `noise` is the spread of W_Q and W_K.

    The residual stream has `n_relays` more subspaces (RELAY, JUNK).
    """
    config = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_model": OUTPUT.stop + n_relays * VOCAB,
        "d_head": D_HEAD,
        "n_ctx": CONTEXT,
        "d_vocab": VOCAB,
        "attn_only": True,
        "normalization_type": None,
        "use_attn_scale": False,
        "device": "cpu",
        "init_weights": False,
    }
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = noise if name.endswith(("W_Q", "W_K")) else 0.02
            if name.endswith(("W_Q", "W_K", "W_V", "W_O")):
                parameter.normal_(std=spread, generator=generator)
            else:
                parameter.zero_()
        model.embed.W_E[:, TOKEN] = torch.eye(VOCAB)
        model.pos_embed.W_pos[:, POSITION] = torch.eye(CONTEXT)
        model.unembed.W_U[OUTPUT] = 12 * torch.eye(VOCAB)
    return model


@torch.no_grad()
def look_back(model: HookedTransformer, head: Head, offset: int) -> None:
    """Attend `offset` positions back, where there are as many."""
    query, key = _cleared(model, head)
    query[POSITION, :CONTEXT] = torch.eye(CONTEXT).roll(-offset, dims=1).tril(-bool(offset))
    key[POSITION, :CONTEXT] = SHARPNESS * torch.eye(CONTEXT)


@torch.no_grad()
def match(model: HookedTransformer, head: Head, subspace: slice) -> None:
    """Attend to the keys that hold the query's token in a subspace, the query itself left out."""
    query, key = _cleared(model, head)
    query[TOKEN, :VOCAB] = torch.eye(VOCAB)
    key[subspace, :VOCAB] = SHARPNESS * torch.eye(VOCAB)
    if subspace == TOKEN:
        query[POSITION, VOCAB:] = torch.eye(CONTEXT)
        key[POSITION, VOCAB:] = -2 * SHARPNESS * torch.eye(CONTEXT)


@torch.no_grad()
def copy(model: HookedTransformer, head: Head, subspace: slice) -> None:
    """Write the tokens attended to into a subspace."""
    attention = model.blocks[head[0]].attn
    attention.W_V[head[1]].zero_()
    attention.W_O[head[1]].zero_()
    attention.W_V[head[1], TOKEN, :VOCAB] = torch.eye(VOCAB)
    attention.W_O[head[1], :VOCAB, subspace] = torch.eye(VOCAB)


def _cleared(model: HookedTransformer, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    attention = model.blocks[head[0]].attn
    query, key = attention.W_Q[head[1]], attention.W_K[head[1]]
    query.zero_()
    key.zero_()
    return query, key
