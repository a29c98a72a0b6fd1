"""Readers of public weights. Nothing here is imported by `import cascade`."""
