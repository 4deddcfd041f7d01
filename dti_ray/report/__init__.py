"""A run's report: one self-contained HTML page that a colleague can open, print or mail.

Stage: after training and evaluation. In: the artefacts below `runs/<run>/`. Out: `report/index.html`.
Invariant: every number on the page is read from an artefact or computed from one; what is missing is
named, together with the command that makes it.
"""

from dti_ray.report.mask import MaskPicture
from dti_ray.report.page import write_report

__all__ = ["MaskPicture", "write_report"]
