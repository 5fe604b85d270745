"""The network: shapes, families, files on disk, LoRA, int8."""
