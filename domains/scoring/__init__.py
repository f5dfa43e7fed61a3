"""Scores of a model on text and on multiple-choice questions."""
