"""`python -m polder` is the command `polder`."""

from polder.cli.main import main

main()
