"""The same app, which makes the call that ovm's hook makes in the others."""

import ovm

ovm.freeze_support()

import app  # noqa: E402 - first things first

app.main()
