import sys

import pytest
import torch

from probes import LabelledTensor, ProbeError

VALUES = torch.arange(12.0).reshape(2, 3, 2)


def labelled() -> LabelledTensor:
    return LabelledTensor("scores", VALUES, ("layer", "head", "key"), {"layer": (3, 5)})


def test_selects_by_label_where_there_are_labels_and_else_by_index():
    assert torch.equal(labelled().sel(layer=5, key=-1).values, VALUES[1, :, -1])
    assert labelled().sel(head=0).shape == {"layer": 2, "key": 2}
    assert labelled().sel(head=0).coords == {"layer": (3, 5)}
    assert labelled().sel(layer=3).coords == {}


def test_holds_no_graph():
    assert not LabelledTensor(
        "x", VALUES.clone().requires_grad_() * 2, ("a", "b", "c")
    ).values.grad_fn


def test_mean_and_standard_error_leave_out_nan():
    x = LabelledTensor(
        "x", torch.tensor([[1.0, 3.0, torch.nan], [4.0, *[torch.nan] * 2]]), ("a", "b")
    )
    assert x.mean("b").values.tolist() == [2.0, 4.0]
    assert x.stderr("b").values[0].item() == 1.0  # s² = 2, n = 2
    assert x.stderr("b").values[1].isnan()


def test_a_frame_has_a_row_for_every_number():
    frame = labelled().to_frame()
    assert list(frame.columns) == ["layer", "head", "key", "value"]
    assert list(frame["value"]) == VALUES.flatten().tolist()
    for row in frame.itertuples():
        index = ((3, 5).index(row.layer), row.head, row.key)
        assert VALUES[index] == row.value


def test_a_frame_without_pandas_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ProbeError, match="pip install pandas"):
        labelled().to_frame()
