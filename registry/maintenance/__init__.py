"""Diagnose an installation, verify a store, and compare versions."""
