"""Models wired by hand to do few-shot tasks, with one head that carries the task, and decoys.

Tasks are y = x + t (mod N) over the same N items and answers, a prompt is x1 y1 … xn yn x. A
previous-token head and an MLP of AND gates recognise the task of every demonstration; one head
averages that over the demonstrations and writes it at the last item; the last MLP adds it.
"""

import random
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from mechcausal.models.adapter import HookedTransformer
from probes import FewShotTask

N, TASKS, CONTEXT = 6, 3, 12
VOCAB = 2 * N
TOKEN = slice(0, VOCAB)
POSITION = slice(TOKEN.stop, TOKEN.stop + CONTEXT)
PREVIOUS = slice(POSITION.stop, POSITION.stop + VOCAB)
EVIDENCE = slice(PREVIOUS.stop, PREVIOUS.stop + N)
VECTOR = slice(EVIDENCE.stop, EVIDENCE.stop + N)
OUTPUT = slice(VECTOR.stop, VECTOR.stop + VOCAB)
JUNK = slice(OUTPUT.stop, OUTPUT.stop + VOCAB)
D_HEAD = VOCAB + CONTEXT
SHARPNESS = 40.0

Head = tuple[int, int]


@dataclass(frozen=True)
class WiredTasks:
    """Where each head is.

    Attributes:
        model: the model.
        vector: the head that carries the task.
        decoys: one attends to the answers and writes evidence where nothing reads it; one copies
            the answers themselves, one the answer after the item asked for (induction), one writes
            the same everywhere.
        tasks: the tasks that it does.
    """

    model: HookedTransformer
    vector: Head
    decoys: tuple[Head, ...]
    tasks: list[FewShotTask]


def wired_tasks(seed: int) -> WiredTasks:
    """A model of three or four layers; the heads of the task lie anywhere in the middle layers."""
    source = random.Random(seed)
    n_layers, n_heads = source.randint(3, 4), source.randint(3, 5)
    model = _blank(n_layers, n_heads, seed, source.uniform(0.1, 0.3))
    heads = [(layer, head) for layer in range(1, n_layers - 1) for head in range(n_heads)]
    heads += [(n_layers - 1, head) for head in range(n_heads)]
    source.shuffle(heads)
    previous = (0, source.randrange(n_heads))
    vector, aside, labels, induction, constant = heads[:5]
    with torch.no_grad():
        _look_back(model, previous)
        _write(model, previous, TOKEN, PREVIOUS)
        _recognise(model)
        for head, into in ((vector, VECTOR), (aside, JUNK)):
            _attend_to_answers(model, head)
            _write(model, head, EVIDENCE, slice(into.start, into.start + N))
        _attend_to_answers(model, labels)
        _write(model, labels, TOKEN, OUTPUT, 0.3)
        _match_previous(model, induction)
        _write(model, induction, TOKEN, OUTPUT, 0.3)
        model.blocks[constant[0]].attn.b_V[constant[1]] = 0.3
        model.blocks[constant[0]].attn.W_O[constant[1], :, OUTPUT] = 0.05
        _apply(model)
    tasks = [
        FewShotTask(f"plus {t}", tuple(range(N)), tuple(N + (x + t) % N for x in range(N)))
        for t in range(TASKS)
    ]
    return WiredTasks(model, vector, (aside, labels, induction, constant), tasks)


def _blank(n_layers: int, n_heads: int, seed: int, noise: float) -> HookedTransformer:
    config = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_model": JUNK.stop,
        "d_head": D_HEAD,
        "d_mlp": N * N,
        "act_fn": "relu",
        "n_ctx": CONTEXT,
        "d_vocab": VOCAB,
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
            parameter.zero_()
            if name.endswith(("W_Q", "W_K")):
                parameter.normal_(std=noise, generator=generator)
            elif name.endswith(("W_V", "W_O")):
                parameter.normal_(std=0.01, generator=generator)
        model.embed.W_E[:, TOKEN] = torch.eye(VOCAB)
        model.pos_embed.W_pos[:, POSITION] = torch.eye(CONTEXT)
        model.unembed.W_U[OUTPUT] = 12 * torch.eye(VOCAB)
    return model


def _cleared(model: HookedTransformer, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    attention = model.blocks[head[0]].attn
    for weights in (attention.W_Q, attention.W_K):
        weights[head[1]] = 0
    return attention.W_Q[head[1]], attention.W_K[head[1]]


def _look_back(model: HookedTransformer, head: Head) -> None:
    query, key = _cleared(model, head)
    query[POSITION, :CONTEXT] = torch.eye(CONTEXT).roll(-1, dims=1).tril(-1)
    key[POSITION, :CONTEXT] = SHARPNESS * torch.eye(CONTEXT)


def _attend_to_answers(model: HookedTransformer, head: Head) -> None:
    query, key = _cleared(model, head)
    query[TOKEN, 0] = 1
    key[N:VOCAB, 0] = SHARPNESS


def _match_previous(model: HookedTransformer, head: Head) -> None:
    query, key = _cleared(model, head)
    query[TOKEN, :VOCAB] = torch.eye(VOCAB)
    key[PREVIOUS, :VOCAB] = SHARPNESS * torch.eye(VOCAB)


def _write(
    model: HookedTransformer, head: Head, read: slice, write: slice, strength: float = 1.0
) -> None:
    attention = model.blocks[head[0]].attn
    size = read.stop - read.start
    attention.W_V[head[1]] = 0
    attention.W_O[head[1]] = 0
    attention.W_V[head[1], read, :size] = torch.eye(size)
    attention.W_O[head[1], :size, write] = strength * torch.eye(size)


def _recognise(model: HookedTransformer) -> None:
    """The first MLP: item x before answer y is evidence for task y - x (mod N)."""
    mlp: Any = model.blocks[0].mlp
    for x in range(N):
        for y in range(N):
            neuron = N * x + y
            mlp.W_in[PREVIOUS.start + x, neuron] = 1
            mlp.W_in[N + y, neuron] = 1
            mlp.b_in[neuron] = -1
            mlp.W_out[neuron, EVIDENCE.start + (y - x) % N] = 1


def _apply(model: HookedTransformer) -> None:
    """The last MLP: item x and task t give answer x + t (mod N)."""
    mlp: Any = list(model.blocks)[-1].mlp
    for x in range(N):
        for t in range(N):
            neuron = N * x + t
            mlp.W_in[x, neuron] = 1
            mlp.W_in[VECTOR.start + t, neuron] = 1
            mlp.b_in[neuron] = -1.2
            mlp.W_out[neuron, OUTPUT.start + N + (x + t) % N] = 1
