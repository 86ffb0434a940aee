"""The most that options may ask for. No torch, so that the command line can check them before it starts."""

LONGEST_RUN = 64  # tokens in a run that is looked up: a row of T tokens keeps T runs of every length, T n**2 / 2 tokens
MOST_DRAFTS = 9  # drafted tokens in one round, where the cache is made for the call
