"""What a cluster runs to score requests, or go on with them: `python -m jobs.score -c FILE [overrides] [--json]`.

Stage: top. In: the arguments of `dti-ray score`, read by the same parser. Out: its results and exit codes.
"""

import sys

from dti_ray import cli


def main() -> None:
    """Run `dti-ray score` with this process's arguments."""
    cli.main(["score", *sys.argv[1:]])


if __name__ == "__main__":
    main()
