"""`python -m merger` is the `merger` command."""

from merger.cli.main import main

main()
