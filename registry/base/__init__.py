"""The base model of a registry: its fingerprint, and the model loaded once per process."""
