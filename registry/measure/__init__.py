"""Held-out data, scores, and the retention report."""
