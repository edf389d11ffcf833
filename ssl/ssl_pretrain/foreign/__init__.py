"""Encoders and checkpoints of other libraries."""
