"""Additive statistics, prototypes, and confidence intervals of a domain's text."""
