"""The state operators: what each kind of layer does to its state, in plain torch."""
