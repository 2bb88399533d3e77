"""`python -m asyncloader`: the command line."""

from .cli import main

main()
