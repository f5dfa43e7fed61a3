"""Measurements of stored domains: held-out data, scores, and the retention report."""
