"""Where the time goes: candidates that take turns, percentiles, verdicts, reports.

Nothing here imports torch. The command is ``zsseg-rt profile``; benchmark scripts use
:func:`zsseg_rt.profiling.turns.take_turns_locally`.
"""
