"""Completions of an amortlm policy, drawn by vLLM: `python -m amortlm_vllm MODEL`."""
