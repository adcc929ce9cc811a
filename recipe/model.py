"""GPT2Config -> GPT2LMHeadModel, attending with causal SDPA without a mask, and its loss over all targets."""

from __future__ import annotations

import functools
import types

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recipe.block import hidden_states
from recipe.config import Config
from recipe.kernels import Kernels
from recipe.loss import head_losses
from recipe.plan import padded_vocab_size

ATTENTION = "sdpa_causal"
"""SDPA with is_causal and no mask. Under torch.compile transformers' own `sdpa` builds the causal mask, and SDPA then
loses its causal kernel: 40 ms instead of 18 of a 124M micro-step on an H100 (docs/results.md)."""

AttentionInterface.register(ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def gpt2_config(config: Config, vocab_size: int, end_of_text: int) -> GPT2Config:
    """The architecture of the run: GPT-2 without dropout, which a model that sees each text once does not need."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=config.n_positions,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=True,
    )


def build_model(config: Config, vocab_size: int, end_of_text: int) -> PretrainingModel:
    """A freshly initialised model in fp32: normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer), as GPT-2, or zero
    with `zero_init_projections`.

    The weights are a function of `config.seed` and the shapes alone; the other matrices do not depend on how projections start.
    """
    torch.manual_seed(config.seed)
    gpt2 = GPT2LMHeadModel._from_config(
        gpt2_config(config, padded_vocab_size(vocab_size), end_of_text), attn_implementation=ATTENTION, dtype=torch.float32
    )
    with torch.no_grad():
        gpt2.transformer.wte.weight[vocab_size:] = 0
        if config.zero_init_projections:
            for block in gpt2.transformer.h:
                block.attn.c_proj.weight.zero_()
                block.mlp.c_proj.weight.zero_()
    if config.activation_checkpointing:
        checkpoint_blocks(gpt2)
    return PretrainingModel(gpt2, vocab_size, config.z_loss, config.activation_checkpointing)


def checkpoint_blocks(gpt2: GPT2LMHeadModel) -> None:
    """Keep of each block its input alone, and compute the rest again in the backward. The gradients are the same: there is no
    dropout. (transformers' own switch for it has another name from release to release.)"""
    for block in gpt2.transformer.h:
        block.forward = types.MethodType(_checkpointed_forward, block)


def _checkpointed_forward(self: nn.Module, *args, **kwargs) -> torch.Tensor:
    forward = functools.partial(type(self).forward, self)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class PretrainingModel(nn.Module):
    """A GPT2LMHeadModel and its training loss.

    The columns that pad the vocabulary take no part in the softmax, so their rows get no gradient and stay zero: the
    unpadded export is the same function. `z_loss` shows in the gradients alone (recipe/loss.py).
    """

    def __init__(
        self, gpt2: GPT2LMHeadModel, vocab_size: int, z_loss: float = 0.0, activation_checkpointing: bool | None = False
    ):
        super().__init__()
        self.gpt2 = gpt2
        self.vocab_size, self.z_loss, self.activation_checkpointing = vocab_size, z_loss, bool(activation_checkpointing)
        self.kernels = Kernels()

    def use(self, kernels: Kernels) -> None:
        """Compute by these kernels from now on."""
        self.kernels = kernels

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of every target, in nats.

        Args:
            rows: token ids [batch, sequence + 1]; the first `sequence` are read, the last `sequence` predicted.
        Returns:
            fp32 losses [batch, sequence].
        """
        # Slices of [batch, sequence + 1] are not contiguous, which compiled embedding and loss kernels would pay for.
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.kernels.blocks and torch.is_grad_enabled():
            hidden = hidden_states(self.gpt2.transformer, inputs, self.activation_checkpointing)
        else:
            hidden = self.gpt2.transformer(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        weight = self.gpt2.lm_head.weight
        losses = head_losses(hidden, weight, targets.flatten(), self.vocab_size, self.kernels.head, self.z_loss)
        return losses.view_as(targets)


def cut_rows(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows as shorter sequences with the same targets, in the same order.

    Args:
        rows: token ids [batch, sequence + 1].
        length: targets of a piece; it divides `sequence`.
    Returns:
        [batch * sequence / length, length + 1]: a piece's last token is the next one's first, as it is from row to row. `rows`
        itself if they are that short already.
    """
    if rows.shape[1] == length + 1:
        return rows
    return rows.unfold(1, length + 1, length).flatten(0, 1)


@torch.no_grad()
def continue_text(
    gpt2: GPT2LMHeadModel,
    vocab_size: int,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = 50,
    seed: int = 0,
) -> list[int]:
    """Sampled continuation of `prompt`; padded columns are never sampled, the global RNG is left alone.

    Args:
        prompt: token ids, at least one.
        temperature: 0 takes the likeliest token.
    Returns:
        the new token ids, up to but without the end-of-text token.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    window = gpt2.config.n_positions
    sequence, new = list(prompt[-window:]), []
    cache, cached = None, 0
    while len(new) < max_new_tokens:
        if len(sequence) > window:
            # The learned positions are used up: go on from the last half, read anew.
            sequence, cache, cached = sequence[-(window // 2) :], None, 0
        inputs = torch.tensor([sequence[cached:]], device=gpt2.device)
        output = gpt2(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache, cached = output.past_key_values, len(sequence)
        logits = output.logits[0, -1, :vocab_size].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            # Only what may be drawn comes to the host, whose generator draws.
            likeliest, ids = logits.topk(min(top_k or vocab_size, vocab_size))
            drawn = torch.multinomial((likeliest.cpu() / temperature).softmax(-1), 1, generator=generator)
            token = int(ids[drawn])
        if token == gpt2.config.eos_token_id:
            break
        sequence.append(token)
        new.append(token)
    return new
