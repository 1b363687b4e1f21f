"""The tailored model of in-context graphs: closed form, hooks and formula are one function."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mechcausal.measures.strategies import divergence
from mechcausal.models.adapter import load_model, save_model
from mechcausal.models.base import ModelError
from mechcausal.models.in_context_graphs import InContextGraphTransformer
from mechcausal.models.wired_weights import load_plain_weights, plain_weights
from mechcausal.tasks.base import batch_loss, scored_rows
from mechcausal.tasks.in_context_graphs import InContextGraphTask
from mechcausal.tasks.priors import DirichletPrior, FixedTransition
from probes import AttentionPattern, attach
from tests.oracles import seeded

SIZES = [(2, 2, 1, 1), (3, 4, 2, 3), (5, 3, 4, 2), (4, 6, 3, 3)]  # S, H, L, K
every_size = pytest.mark.parametrize(("s", "h", "examples", "heads"), SIZES)


def task_of(s: int, h: int, examples: int) -> InContextGraphTask:
    (matrix,) = DirichletPrior.symmetric(0.8, s).sample(1, generator=seeded(1), dtype=torch.float64)
    return InContextGraphTask(FixedTransition.from_matrix(matrix), h, examples)


def random_model(s: int, h: int, examples: int, heads: int) -> InContextGraphTransformer:
    model = InContextGraphTransformer(s, n_positions=h, n_examples=examples, n_heads=heads)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters_by_name.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(number)))
    return model


def formula(named: dict[str, Tensor], context: Tensor, h: int) -> Tensor:
    """The last example's predictions of one context, word for word, column by column."""
    s, examples = len(named["V"]), context.view(-1, h)
    one_hot = F.one_hot(examples, s).to(named["V"].dtype)

    def copy(head: int, example: int, column: int) -> Tensor:
        """What a head copies for a column of the example counted from 0."""
        back = [example - other for other in range(len(examples))]
        n_back = named["w_L"].shape[1]
        seen = [e for e, o in enumerate(back) if 1 <= o <= n_back]
        scores = torch.stack(
            [
                named["w_L"][head, back[e] - 1] / 8 + named["w_H"][head, column - c + h - 1]
                for e in seen
                for c in range(h)
            ]
        )
        return torch.einsum("k,ks->s", scores.softmax(0), one_hot[seen].flatten(0, 1))

    last, rows = len(examples) - 1, []
    for position in range(h):
        example, column = divmod(last * h + position + 1, h)
        scores = torch.stack(
            [
                sum(
                    (
                        copy(k, last, key) @ named["W"][k] @ copy(k, example, column)
                        for k in range(len(named["W"]))
                    ),
                    torch.zeros((), dtype=one_hot.dtype),
                )
                for key in range(position + 1)
            ]
        )
        attended = scores.softmax(0) @ one_hot[last, : position + 1]
        rows.append((attended @ named["V"]).softmax(0))
    return torch.stack(rows)


@every_size
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_closed_form_hooked_transformer_and_formula_are_one_function(
    s: int, h: int, examples: int, heads: int, dtype: torch.dtype, bound: float
) -> None:
    model, task = random_model(s, h, examples, heads), task_of(s, h, examples)
    model.hooked.to(dtype)
    batch = task.sample(6, generator=seeded(2))
    gradients, outputs = [], []
    for compute in (
        lambda x: model.probabilities_by_position(model.hooked(x)),
        model.predict_positions,
    ):
        model.hooked.zero_grad()
        output = compute(batch.tokens)
        batch_loss(output, batch, epsilon=1e-3).backward()
        outputs.append(output.detach()[:, -h:])
        gradients.append([p.grad.clone() for p in model.parameters_by_name.values()])
    named = {n: p.detach().to(torch.float64) for n, p in model.parameters_by_name.items()}
    expected = torch.stack([formula(named, context, h) for context in batch.tokens])
    hooked, closed = outputs
    assert (hooked - closed).abs().max() < bound
    assert (closed.double() - expected).abs().max() < bound
    torch.testing.assert_close(model(batch.tokens), closed[:, -1])
    for name, wired, ours in zip(named, *gradients, strict=True):
        assert (wired - ours).norm() <= 10 * bound * ours.norm() + bound, name
        # Two positions have one candidate; softmax removes what all keys share.
        assert h == 2 or examples == 1 or ours.norm() > 0, name


@every_size
def test_no_prediction_reads_the_predicted_token(s: int, h: int, examples: int, heads: int) -> None:
    model, task = random_model(s, h, examples, heads), task_of(s, h, examples)
    tokens = task.sample(4, generator=seeded(3)).tokens
    before = model.predict_positions(tokens)
    for column in range(h):
        changed = tokens.clone()
        changed[:, -h + column :] = (changed[:, -h + column :] + 1) % s
        after = model.predict_positions(changed)
        assert torch.equal(after[:, -h : -h + column], before[:, -h : -h + column])
    assert not torch.equal(after[:, -1], before[:, -1])


def test_with_one_head_for_each_example_its_attention_is_the_posterior() -> None:
    task = task_of(3, 5, 4)
    model = InContextGraphTransformer(3, n_positions=5, n_examples=4, n_heads=6)
    model.hooked.double()
    kernel = torch.tensor(task.kernel.rows, dtype=torch.float64)
    model.set_ideal(kernel, strength=100.0)
    batch = task.sample(16, generator=seeded(4))
    posterior = task.parent_posterior(batch.tokens)[:, 1:]
    attention = model.parent_attention(batch.tokens)[:, :-1]
    assert (attention - posterior).abs().max() < 1e-12
    pattern = AttentionPattern(1)
    with torch.no_grad(), attach(model.hooked, pattern):
        model.hooked(batch.tokens, return_type=None)
    hooked = pattern.reading().sel(layer=1).values[:, 0, -5:-1]
    assert (hooked[..., -5:] - posterior).abs().max() < 1e-12
    assert hooked[..., :-5].abs().max() == 0  # the fixed score hides earlier examples exactly
    torch.testing.assert_close(model.comparison().detach(), kernel.log())
    predicted = scored_rows(model.predict_positions(batch.tokens), batch)
    bayes = scored_rows(task.predictions(batch)["bayes"], batch)
    assert 0 <= divergence(bayes, predicted) < 0.05  # logits are averaged, not probabilities
    with pytest.raises(ValueError, match="2 heads for 4 examples: at least one"):
        InContextGraphTransformer(3, n_positions=5, n_examples=4, n_heads=2).set_ideal(kernel)


def test_the_initial_model_attends_uniformly_in_layer_2() -> None:
    model = InContextGraphTransformer(3, n_positions=4, n_examples=2, n_heads=2)
    model.initialise(scale=0.1, own_column=3.0, generator=seeded(0))
    columns = model.attention_to_columns()
    weight = torch.e**3
    torch.testing.assert_close(columns[0, 1, 1].item(), weight / (weight + 3))
    torch.testing.assert_close(model.attention_to_examples().sum(1), torch.ones(2))
    attention = model.parent_attention(torch.zeros(1, 12, dtype=torch.int64))
    torch.testing.assert_close(attention[0, 2], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    with pytest.raises(ValueError, match="needs a generator"):
        model.initialise(scale=0.1)


def test_contexts_of_another_length_are_refused() -> None:
    model = InContextGraphTransformer(3, n_positions=4, n_examples=2, n_heads=2)
    with pytest.raises(ModelError, match="contexts of 8 tokens; the model reads 3 examples of 4"):
        model.predict_positions(torch.zeros(1, 8, dtype=torch.int64))


def test_files_hold_ordinary_weights_and_changed_wiring_is_refused(tmp_path: Path) -> None:
    model = random_model(3, 4, 2, 3)
    model.save(tmp_path)
    bare = load_model(tmp_path)
    assert set(dict(bare.named_parameters())) == set(plain_weights(model.hooked))
    other = InContextGraphTransformer(3, n_positions=4, n_examples=2, n_heads=3)
    load_plain_weights(other.hooked, plain_weights(bare))
    for name, parameter in other.parameters_by_name.items():
        assert torch.equal(parameter, model.parameters_by_name[name]), name
    for weight in ("blocks.0.attn.W_Q", "blocks.1.attn.W_Q", "unembed.W_U", "blocks.0.attn.W_K"):
        weights = plain_weights(load_model(tmp_path))
        changed = weights[weight].flatten().clone()
        changed[-1 if weight != "unembed.W_U" else 0] += 1.0
        weights[weight] = changed.view_as(weights[weight])
        bare.load_state_dict(weights, strict=False)
        broken = tmp_path / weight
        extra = {"kind": model.kind, "n_positions": 4, "n_examples": 2}
        save_model(bare, broken, extra=extra)
        with pytest.raises(ValueError, match=f"{weight} is not wired"):
            InContextGraphTransformer.load(broken)
