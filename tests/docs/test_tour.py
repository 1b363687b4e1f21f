"""The notebook runs from its first cell to its last, and finds what its text says."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

PLACE = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    assert PLACE.stat().st_size < 300_000
    notebook = nbformat.read(PLACE, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_the_notebook_walks_from_a_graph_to_an_induction_head(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(PLACE, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "edges that the predicted gradient names: True" in text
    assert "the very first gradient names: 100%" in text
    assert "edges recovered by the attention at the end:     100%" in text
    assert "induction head found: True, head 1." in text
    assert "it reads head 0." in text
    figures = [
        output.data["application/vnd.plotly.v1+json"]
        for output in outputs
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    drawn = [cell for cell in notebook.cells if "plot." in cell.source or "px." in cell.source]
    assert len(figures) == sum(cell.cell_type == "code" for cell in drawn) >= 8
    assert all(figure["data"] for figure in figures)
