"""Defaults shared by the library, the service, the command line, and the files for systemd and launchd."""

from __future__ import annotations

MEMORY_MIB = 2048
DATA_DISK_MIB = 64 * 1024
STOP_TIMEOUT_S = 90.0
"""Time a guest may take to shut down before its power is cut."""
SUSPEND_TIMEOUT_S = 300.0
"""Time a suspend may take before it is given up and the machine runs again."""
