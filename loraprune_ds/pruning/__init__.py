"""The method, on tensors. It knows no DeepSpeed. Read step.py first."""
