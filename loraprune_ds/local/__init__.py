"""The engine of a model that every process holds whole: one process, or the replicas of DDP."""
