"""`python -m relish`."""

from .cli import main

main()
