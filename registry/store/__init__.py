"""Bytes on disk: blobs, manifests, immutable versions, aliases, and garbage collection."""
