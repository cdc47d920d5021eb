"""Runs before the app's own code: the app may have been started to be a guard."""

from ovm.process.guard import freeze_support

freeze_support()
