"""What a cluster runs to search, or go on with a sweep: `python -m jobs.tune -c FILE [overrides] [--json]`.

Stage: top. In: the arguments of `dti-ray tune`, read by the same parser. Out: its results and exit codes.
"""

import sys

from dti_ray import cli


def main() -> None:
    """Run `dti-ray tune` with this process's arguments."""
    cli.main(["tune", *sys.argv[1:]])


if __name__ == "__main__":
    main()
