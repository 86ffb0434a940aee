"""Where entries live. A store writes, reads and shows slots, and knows nothing of time."""
