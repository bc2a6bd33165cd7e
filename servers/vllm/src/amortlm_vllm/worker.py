"""What the workers of vLLM, which hold its model, can do for the server of merged weights."""

from __future__ import annotations

from typing import Any

from safetensors import safe_open


class Loading:
    """Mixed into vLLM's Worker (`worker_extension_cls`)."""

    def load_merged(self: Any, file: str) -> None:
        """Put the weights in a file, those of a whole model as checkpoints name them, in the place of the model's."""
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            UnquantizedEmbeddingMethod,
        )

        with safe_open(file, framework="pt") as weights:
            self.reload_weights(
                weights_iterator=((name, weights.get_tensor(name)) for name in weights.offset_keys())
            )
        # A head that shares its tensor with the embeddings is not loaded, but on a CPU has a packed copy of it.
        for module in self.get_model().modules():
            if isinstance(module, ParallelLMHead) and isinstance(
                module.quant_method, UnquantizedEmbeddingMethod
            ):
                module.quant_method.process_weights_after_loading(module)
