"""Base models: finding, fingerprinting and loading them."""
