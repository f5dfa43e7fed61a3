"""Score a model on text and on multiple-choice questions."""
