"""What all other tests rely on: annotations are checked, shapes included."""

from dataclasses import dataclass

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from mechcausal.graphs import chain
from mechcausal.tasks import cross_entropies
from probes import LabelledTensor
from tests.type_checks import checked


@checked
def product(
    left: Float[Tensor, "row inner"], right: Float[Tensor, "inner column"]
) -> Float[Tensor, "row column"]:
    return left @ right if len(left) > 1 else left


@checked
@dataclass
class Pair:
    left: Float[Tensor, " pos"]
    right: Float[Tensor, " pos"]


@checked
def repeated(word: str, times: int = 2) -> str:
    return word * times


@checked
def last(values: list[int]) -> Float[Tensor, "row column"] | int:
    return values[-1]


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def test_axes_of_one_name_have_one_size_in_a_call_and_any_size_in_the_next() -> None:
    for inner in (2, 3):
        assert product(ones(2, inner), ones(inner, 4)).shape == (2, 4)
        assert Pair(ones(inner), ones(inner)).right.shape == (inner,)
    with pytest.raises(BeartypeCallHintViolation):
        product(ones(2, 3), ones(2, 4))
    with pytest.raises(BeartypeCallHintViolation):
        product(ones(1, 3), ones(3, 4))  # returns one row and three columns
    with pytest.raises(BeartypeCallHintViolation):
        Pair(ones(2), ones(3))


def test_arguments_and_results_of_all_kinds_are_checked() -> None:
    assert (repeated("a"), last([3])) == ("aa", 3)
    for call in (lambda: repeated(2), lambda: repeated("a", 2.0), lambda: last("b")):
        with pytest.raises(BeartypeCallHintViolation):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: chain("3"),
        lambda: cross_entropies(ones(2, 3), ones(2, 4)),
        lambda: LabelledTensor("a", ones(2), "pos"),
    ],
)
def test_both_packages_are_checked(call) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        call()
