"""Knowing, checking and converting InternVL checkpoints of every layout."""
