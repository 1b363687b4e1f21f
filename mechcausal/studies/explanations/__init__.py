"""Uses of explanations: recommendation, sentiment, and the bridge between the two papers."""
