"""Additive statistics and prototypes of a domain's text, and confidence intervals."""
