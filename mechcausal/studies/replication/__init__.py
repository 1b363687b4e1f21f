"""The paper, figure by figure: what it reports, what we measure, what theory says.

`replicate` trains (or reuses) the recipes that a figure needs and measures them; every figure has a
module with its runs, its rows and its picture. Source: Nichani, Damian, Lee, ICML 2024 (arXiv
2402.14735); numbers that the paper only plots were read off the plot.
"""

from mechcausal.studies.replication.driver import Replication, replicate
from mechcausal.studies.replication.figures import FIGURES
from mechcausal.studies.replication.rows import Row

__all__ = ["FIGURES", "Replication", "Row", "replicate"]
