"""Domains: their text, statistics, prototypes and scores."""
