"""LoRA experts, the routers that gate them, and the fused layer that applies them."""
