"""What `asyncloader verify` does: looks at everything, and lists all that is wrong."""

from ._findings import Finding, Findings, Verification
from ._verify import averify

__all__ = ["Finding", "Findings", "Verification", "averify"]
