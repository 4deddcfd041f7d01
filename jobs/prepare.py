"""What a cluster runs to prepare a data set: `python -m jobs.prepare -c FILE [overrides] [--json]`.

Stage: top. In: the arguments of `dti-ray prepare`, read by the same parser. Out: its results and exit codes.
"""

import sys

from dti_ray import cli


def main() -> None:
    """Run `dti-ray prepare` with this process's arguments."""
    cli.main(["prepare", *sys.argv[1:]])


if __name__ == "__main__":
    main()
