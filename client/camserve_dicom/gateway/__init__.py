"""A service that receives images from a PACS, explains them and stores the results in the PACS.

Received images stay in a spool on disk until the PACS has their results, so the process may be killed at any time.
"""

from camserve_dicom.gateway.config import Config, ConfigError, read
from camserve_dicom.gateway.process import run

__all__ = ["Config", "ConfigError", "read", "run"]
