"""From files to batches: sources, decoding, sampling, views, the loader."""
