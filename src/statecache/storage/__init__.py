"""Where entries live: stores, which write, read, clear and move, and know nothing of time."""
