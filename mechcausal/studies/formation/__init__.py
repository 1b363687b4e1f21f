"""When the heads of a model formed: their scores along its checkpoints, public or our own."""

from mechcausal.studies.formation.driver import follow_formation
from mechcausal.studies.formation.opening import open_series
from mechcausal.studies.formation.result import FormationResult, HeadFormation
from mechcausal.studies.formation.series import Revision, Series

__all__ = [
    "FormationResult",
    "HeadFormation",
    "Revision",
    "Series",
    "follow_formation",
    "open_series",
]
