"""The network: shapes, families, LoRA, losses, int8 and NF4."""
