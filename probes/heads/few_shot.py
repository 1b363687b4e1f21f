"""Few-shot prompts: pairs of an item and its answer, and the same with answers shuffled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class FewShotTask:
    """A function from items to answers, as tokens.

    Attributes:
        name: what it is called in results.
        items: one token per item.
        answers: the right answer to each item, one token.

    Raises:
        ValueError: there are not as many answers as items, or fewer than four items, or an item
            occurs twice, or all answers are the same.
    """

    name: str
    items: tuple[int, ...]
    answers: tuple[int, ...]

    def __post_init__(self) -> None:
        n = len(self.items)
        if len(self.answers) != n or n < 4 or len(set(self.items)) < n:
            raise ValueError(
                f"task {self.name!r} has {n} items and {len(self.answers)} answers; at least four "
                "different items, each with its answer, are needed"
            )
        if len(set(self.answers)) < 2:
            raise ValueError(f"task {self.name!r} has the same answer to every item")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of one task; the answer to the last item is missing.

    Attributes:
        right: prompts with the right answers.
        shuffled: the same items in the same order, with the answers permuted among them.
        answers: the right answer to the last item.
    """

    right: Int[Tensor, "batch pos"]
    shuffled: Int[Tensor, "batch pos"]
    answers: Int[Tensor, "batch"]


def random_mappings(
    tokens: Sequence[int], *, n_items: int, n_tasks: int, generator: torch.Generator
) -> list[FewShotTask]:
    """Random one-to-one mappings of the same items to the same answers, one per task.

    For a model without words. No model can know such a mapping: it must read it off the prompt.
    All tasks share items and answers, so that only the mapping tells them apart.

    Args:
        tokens: the tokens to draw items and answers from.
        n_items: items, and as many answers.
        n_tasks: mappings.
        generator: the source of randomness.

    Raises:
        ValueError: there are fewer than `2 n_items` tokens.
    """
    if len(tokens) < 2 * n_items:
        raise ValueError(
            f"{n_items} items and as many answers need {2 * n_items} tokens, there are "
            f"{len(tokens)}"
        )
    order = torch.randperm(len(tokens), generator=generator)[: 2 * n_items].tolist()
    items, answers = [tokens[i] for i in order[:n_items]], [tokens[i] for i in order[n_items:]]
    tasks = []
    for number in range(n_tasks):
        permuted = torch.randperm(n_items, generator=generator).tolist()
        mapping = tuple(answers[i] for i in permuted)
        tasks.append(FewShotTask(f"mapping {number + 1}", tuple(items), mapping))
    return tasks


def draw_prompts(
    task: FewShotTask,
    queries: Sequence[int],
    *,
    n_prompts: int,
    n_shots: int,
    shows_query: bool,
    bos: int | None,
    between: tuple[int, ...] = (),
    after: tuple[int, ...] = (),
    generator: torch.Generator,
) -> Prompts:
    """Prompts `[bos] x1 y1 … xn yn x`, whose last item is one of the given ones.

    The shuffled answers are a cyclic shift of the demonstrations' answers, so that a demonstration
    has its own answer only where two answers are the same.

    Args:
        task: the task.
        queries: the indices of the items that come last, in turn.
        n_prompts: number of prompts.
        n_shots: demonstrations in a prompt.
        shows_query: whether the last item is also one of the demonstrations.
        bos: token at the start, if any.
        between: tokens between an item and its answer.
        after: tokens after an answer.
        generator: the source of randomness.

    >>> task = FewShotTask("plus ten", (1, 2, 3, 4), (11, 12, 13, 14))
    >>> source = torch.Generator().manual_seed(0)
    >>> prompts = draw_prompts(task, [0], n_prompts=1, n_shots=2, shows_query=False, bos=0,
    ...                        generator=source)
    >>> prompts.right.shape, int(prompts.right[0, -1]), int(prompts.answers[0])
    (torch.Size([1, 6]), 1, 11)
    """
    right: list[list[int]] = []
    shuffled: list[list[int]] = []
    answers: list[int] = []
    for number in range(n_prompts):
        query = queries[number % len(queries)]
        order = torch.randperm(len(task.items), generator=generator).tolist()
        demonstrations = [i for i in order if i != query][: n_shots - shows_query]
        if shows_query:
            at = int(torch.randint(len(demonstrations) + 1, (), generator=generator))
            demonstrations.insert(at, query)
        labels = [task.answers[i] for i in demonstrations]
        for prompts, given in ((right, labels), (shuffled, labels[1:] + labels[:1])):
            prompt = [] if bos is None else [bos]
            for i, label in zip(demonstrations, given, strict=True):
                prompt += [task.items[i], *between, label, *after]
            prompts.append([*prompt, task.items[query], *between])
        answers.append(task.answers[query])
    return Prompts(torch.tensor(right), torch.tensor(shuffled), torch.tensor(answers))
