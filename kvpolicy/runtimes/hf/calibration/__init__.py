"""Measures on a model what table-driven methods must know beforehand (`kvpolicy calibrate`)."""

from kvpolicy.runtimes.hf.calibration.running import METHODS, Settings, calibrate, check_request

__all__ = ["METHODS", "Settings", "calibrate", "check_request"]
