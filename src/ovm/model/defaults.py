"""Defaults that several rooms share: library, service, command line, and the files for systemd and launchd."""

from __future__ import annotations

MEMORY_MIB = 2048
DATA_DISK_MIB = 64 * 1024
STOP_TIMEOUT_S = 90.0
"""How long a guest may take to shut down before its power is cut."""
SUSPEND_TIMEOUT_S = 300.0
"""How long a suspend may take before the machine runs on."""
