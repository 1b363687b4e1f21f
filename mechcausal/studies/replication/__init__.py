"""Reproduce the paper, figure by figure: its values, our measurements, the theory's predictions.

`replicate` trains (or reuses) the recipes that a figure needs and measures them; `figures/` defines
each figure's runs, rows and pictures. Source: Nichani, Damian, Lee, ICML 2024 (arXiv 2402.14735);
numbers that the paper only plots were read off the plot.
"""

from mechcausal.studies.replication.driver import replicate
from mechcausal.studies.replication.figures import FIGURES
from mechcausal.studies.replication.result import Replication, Row

__all__ = ["FIGURES", "Replication", "Row", "replicate"]
