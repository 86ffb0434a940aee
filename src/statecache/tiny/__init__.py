"""The two small models that ship with the library: `story` and its draft model, `draft`."""
