"""A run on the Hugging Face Hub: its checkpoints as revisions, and a card made from its record."""

from mechcausal.studies.publishing.publication import (
    Publication,
    PublishedRevision,
    plan_publication,
)
from mechcausal.studies.publishing.upload import publish

__all__ = ["Publication", "PublishedRevision", "plan_publication", "publish"]
