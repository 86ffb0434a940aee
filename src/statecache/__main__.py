"""`python -m statecache`: the command line."""

from statecache.cli import main

main()
