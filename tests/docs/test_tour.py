"""The notebook runs from its first cell to its last, and shows what its text claims."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code_cells)


@pytest.mark.slow
def test_the_notebook_walks_from_a_graph_to_an_induction_head(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code_cells for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "edges that the predicted gradient names: True" in text
    assert "the very first gradient names: 100%" in text
    assert "edges recovered by the attention at the end:     100%" in text
    assert re.search(r"head 1\.\d is an induction head: True", text)
    assert "it reads head 0." in text
    figures = [
        output.data["application/vnd.plotly.v1+json"]
        for output in outputs
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    calls = ("plot.", "px.", "pictures[")
    drawn = [cell for cell in code_cells if any(call in cell.source for call in calls)]
    assert len(figures) == len(drawn) >= 10
    assert all(figure["data"] for figure in figures)
    (table,) = [
        output.data["text/plain"]
        for output in outputs
        if "edge_hits" in output.get("data", {}).get("text/plain", "")
    ]
    rows = {line.split()[0]: line.split() for line in table.splitlines()[2:]}
    assert rows["0"][-1] == "NaN"  # lost in noise
    assert rows["16"][-1] == "1.00"
    assert float(rows["16"][-2]) > 0.9
