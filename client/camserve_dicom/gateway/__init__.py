"""The gateway: takes images from a PACS, has them explained, and stores the results there.

What it has taken lies in a spool on disk until the PACS has its results, so it may be killed at any moment.
"""

from camserve_dicom.gateway.config import Config, ConfigError, read
from camserve_dicom.gateway.process import run

__all__ = ["Config", "ConfigError", "read", "run"]
