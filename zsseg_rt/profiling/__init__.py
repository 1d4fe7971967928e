"""Where the time goes: candidates that take turns, percentiles, verdicts, reports."""
