"""Read, check, split, and tokenize a domain's data."""
