"""Training: data, loss and loop of LLaVA's two stages and of LoRA."""
