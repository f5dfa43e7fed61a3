"""Import PEFT adapters; export to PEFT, vLLM, and transformers."""
