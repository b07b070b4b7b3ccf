"""Training: encoder, heads, calibration, evaluation, promotion."""
