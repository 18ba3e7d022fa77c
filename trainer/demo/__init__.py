"""A demonstration that needs no download: bundled clips, a codec fitted to them, and a small untrained checkpoint."""
