"""Encoders: one file an architecture. `build(name, ...)` finds the file by the name."""
