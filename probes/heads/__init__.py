"""Measure what an attention head does: stimuli, scores, composition, formation."""
