"""A sweep: what is searched, what was found, and every event of it in one ledger."""
