"""Implementations of the fused layer: reference, plain torch (eager) and Triton, with dispatch by device."""
