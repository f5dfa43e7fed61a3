"""The files of one domain version: written, read, checked, and signed."""
