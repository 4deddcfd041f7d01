"""What a cluster runs to score a trained run: `python -m jobs.evaluate -c FILE [overrides] [--json]`.

Stage: top. In: the arguments of `dti-ray evaluate`, read by the same parser. Out: its results and exit codes.
"""

import sys

from dti_ray import cli


def main() -> None:
    """Run `dti-ray evaluate` with this process's arguments."""
    cli.main(["evaluate", *sys.argv[1:]])


if __name__ == "__main__":
    main()
