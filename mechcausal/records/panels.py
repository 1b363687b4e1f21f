"""Log the pictures, tables and page of a finished run to W&B."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pandas as pd
import plotly.graph_objects as go

from mechcausal.support.messages import first_line

if TYPE_CHECKING:
    from wandb.sdk.data_types.base_types.wb_value import WBValue
    from wandb.sdk.wandb_run import Run

Panel: TypeAlias = go.Figure | pd.DataFrame | Path


def log_panels(
    run: "Run",
    step: int,
    panels: Mapping[str, Panel],
    warn: Callable[[str], None],
    *,
    tables: bool = True,
) -> None:
    """Add panels, one at a time, to the row of a step that is not committed yet.

    Args:
        run: the W&B run.
        step: step of the row.
        panels: panels by name.
        warn: called with a message for each panel that W&B refuses.
        tables: False skips tables: W&B uploads them as artifacts, which hang without a network.
    """
    for name, panel in panels.items():
        if isinstance(panel, pd.DataFrame) and not tables:
            continue
        try:
            run.log({name: as_media(panel)}, step=step, commit=False)
        except Exception as error:  # W&B may raise anything; the row must still be logged
            warn(f"W&B did not take {name}: {first_line(error)}")


def as_media(panel: Panel) -> "WBValue":
    """The panel as a W&B media object."""
    import wandb

    if isinstance(panel, Path):
        return wandb.Html(panel, inject=False)  # W&B's styles would have to be downloaded
    if isinstance(panel, pd.DataFrame):
        rows = panel.astype(object).where(panel.notna(), None)
        return wandb.Table(columns=list(rows.columns), data=rows.values.tolist())
    return wandb.Plotly(panel)
