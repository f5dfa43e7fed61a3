"""Packs on the Hugging Face Hub: push, pull, search, and model cards."""
