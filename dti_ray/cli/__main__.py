"""`python -m dti_ray.cli`: the same as the installed `dti-ray`.

Stage: top.
"""

from dti_ray.cli import main

main()
