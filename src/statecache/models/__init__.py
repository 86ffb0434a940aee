"""What knows transformers: the table of layer kinds, and the cache behind transformers' interface."""
