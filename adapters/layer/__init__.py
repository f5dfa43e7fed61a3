"""The fused layer: experts and gates attached to a frozen base model."""
