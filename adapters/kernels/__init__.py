"""The arithmetic of the fused layer: the definition, the fast path in plain torch, Triton kernels, and the choice."""
