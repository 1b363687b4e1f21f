from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mechcausal.records.run_data import RunData
from tests.run_folders import heads_recipe, run_of, write_run


def test_a_folder_with_older_names_of_head_scores_reads_as_one_of_today(tmp_path: Path) -> None:
    written = run_of(heads_recipe())
    folder = write_run(tmp_path, written)
    rows = folder / "metrics.jsonl"
    rows.write_text(rows.read_text().replace("prefix_matching", "induction"))
    matrices = folder / "matrices.safetensors"
    tensors = load_file(matrices)
    save_file({n.replace("prefix_matching", "induction"): m for n, m in tensors.items()}, matrices)
    read = RunData.load(folder)
    assert read.history == written.history
    for step, frame in written.frames.items():
        assert read.frames[step].keys() == frame.keys()
        name = "heads/prefix_matching"
        assert np.array_equal(read.frames[step][name], frame[name])
