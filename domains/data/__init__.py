"""Data of a domain: read, checked, split and tokenized."""
