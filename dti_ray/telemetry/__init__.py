"""What a run tells the world while it runs: files below its folder, series to scrape, trackers, log records."""

from dti_ray.telemetry.files import MetricSink, read_lines, write_json
from dti_ray.telemetry.sinks import Line, Sinks

__all__ = ["Line", "MetricSink", "Sinks", "read_lines", "write_json"]
