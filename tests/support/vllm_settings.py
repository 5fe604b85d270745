"""Settings under which vLLM serves tiny models on a CPU."""

# vLLM's CPU attention has no heads narrower than 32.
WIDE = {"hidden_size": 192, "head_dim": 32, "max_position_embeddings": 128}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
ENVIRONMENT |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
