"""Losses: functions of per-token log-probabilities and masks to metrics. Arrays in, sums and counts out.

Every loss returns `Metrics` with "loss", whose total is differentiated and divided by its weight once all microbatches
are summed, so accumulation is exact under any mask.
"""
