"""Writing tokens with a model: sampling, speculation, `generate`."""
