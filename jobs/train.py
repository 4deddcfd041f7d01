"""What a cluster runs to train a run, or go on with it: `python -m jobs.train -c FILE [overrides] [--json]`.

Stage: top. In: the arguments of `dti-ray train`, read by the same parser. Out: its results and exit codes.
"""

import sys

from dti_ray import cli


def main() -> None:
    """Run `dti-ray train` with this process's arguments."""
    cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
