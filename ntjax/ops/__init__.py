"""Numerics that models are made of: functions of arrays."""
