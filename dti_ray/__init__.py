"""dti_ray: LLM click models trained by Dynamic Target Isolation on Ray and DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dti_ray.infer.model import CtrModel, Request, Text

__version__ = "0.1.0"
__all__ = ["CtrModel", "Request", "Text"]


def __getattr__(name: str) -> object:
    """Import scoring, and with it torch, once somebody asks for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dti_ray.infer import model

    return getattr(model, name)
