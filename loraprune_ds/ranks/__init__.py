"""The ranks of a job: their collectives, their devices, and which rank owns what."""
