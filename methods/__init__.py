"""Pretext methods: one file a method; the file name is what `--method` takes."""
