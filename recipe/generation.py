"""Text from a trained model, printed as it is written."""

from __future__ import annotations

import torch
from transformers import TextStreamer, set_seed

from recipe.config import ConfigError
from recipe.evaluation.suite import load_model
from recipe.run_folder import model_of


class Writer:
    """A model and how it is sampled from.

    Raises:
        ConfigError: if there is no such model, or for an option out of its range.
    """

    def __init__(
        self,
        model_or_run: str,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ):
        if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
            raise ConfigError(
                "max_new_tokens must be at least 1, temperature and top_k at least 0, top_p in (0, 1] and repetition_penalty "
                "above 0"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._tokenizer = load_model(model_of(model_or_run), device)
        self._options = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
        if temperature > 0:
            self._options |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        else:
            self._options |= {"do_sample": False}
        self._seed = seed

    def write(self, prompt: str) -> str:
        """Print the prompt and its continuation, word by word, up to the end of text or the model's last position.

        Returns:
            both, as text.
        Raises:
            ConfigError: for a prompt that leaves no room.
        """
        text = prompt or self._tokenizer.bos_token  # of nothing: how documents begin
        inputs = self._tokenizer(text, return_tensors="pt").to(self._model.device)
        room = self._model.config.max_position_embeddings - inputs["input_ids"].shape[1]
        if room < 1:
            raise ConfigError(f"prompt: {inputs['input_ids'].shape[1]} tokens fill the model's positions; shorten it")
        if self._seed is not None:
            set_seed(self._seed)
        options = self._options | {"max_new_tokens": min(room, self._options["max_new_tokens"])}
        streamer = TextStreamer(self._tokenizer, skip_special_tokens=True)
        with torch.no_grad():
            output = self._model.generate(**inputs, **options, streamer=streamer, pad_token_id=self._tokenizer.eos_token_id)
        return self._tokenizer.decode(output[0], skip_special_tokens=True)
