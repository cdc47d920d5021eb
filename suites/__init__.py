"""The test suites of others, run against a machine by ``make clients``, for the table in docs/clients.md."""
