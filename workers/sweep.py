"""`python -m workers.sweep`: takes away what the attempts of a canceled job have left, where their runner could not."""

import argparse
from pathlib import Path

from merger.staging import remove_staging


def main() -> None:
    """Removes the staging folder of a job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    remove_staging(arguments.output, arguments.job)


if __name__ == "__main__":
    main()
