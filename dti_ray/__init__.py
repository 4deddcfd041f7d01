"""dti_ray: LLM click models trained by Dynamic Target Isolation on Ray and DeepSpeed."""

__version__ = "0.1.0"
