"""The loss of each token under a Hugging Face causal language model, in the cheapest way that is the model's own.

B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from cbtm_ray.errors import UserError

if TYPE_CHECKING:  # a run's controller imports this file, and has no use for what it takes seconds to import
    from transformers import PreTrainedModel

_LOSS_CHUNK = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
"""Rows of logits alive at once: of a 2,048 vocabulary they stay in a core's cache."""
_MOST_LOGITS_BYTES = 2**30
"""On a CPU chunks compute the logits twice for the gradient, which makes a step a tenth to a quarter longer than all logits at
once, where there is memory for these."""

_CHECKED_TOKENS = 32
"""Of a sequence, to find out on how a model computes its logits."""
_LARGEST_LOGIT = 1000.0
"""Far above all caps that transformers' models have: 15 to 50."""


class TokenLoss(torch.nn.Module):
    """The loss of each target of a batch (B, T + 1) in nats: (B * T,). A module, so that DDP and FSDP can do their part.

    Chunked over the vocabulary projection where that is cheaper and gives the model's own logits; models that do more to them,
    such as scale or cap them, get the plain path. Mixtral's load-balancing loss, weighted by its configuration's
    `router_aux_loss_coef`, adds its gradient and not its value: losses are those of tokens whatever the model.

    Args:
        example: a batch of one real sequence or more, to try the model on.
        border: token that begins a document; tokens then attend within their own only. None: to all before them.

    Raises:
        UserError: the model looks at later tokens, or does not keep documents apart.
    """

    def __init__(self, model: PreTrainedModel, example: torch.Tensor, *, border: int | None = None) -> None:
        super().__init__()
        self.model, self.border = model, border
        self.balanced = model.config.model_type == "mixtral" and model.config.router_aux_loss_coef > 0
        was_training = model.training
        model.eval()
        with torch.no_grad():
            check_causal(model, example[:1, :_CHECKED_TOKENS])
            if border is not None:
                _check_documents_stay_apart(model, example, border)
            self.chunkable = _ends_in_its_head(model, model_inputs(model, example[:1, :_CHECKED_TOKENS], border))
        model.train(was_training)
        assert self.chunkable or not self.balanced, "Mixtral neither scales nor caps its logits"

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        cheaper = self.chunkable and _chunks_are_cheaper(batch, self.model.config.get_text_config().vocab_size)
        return self.chunked(batch) if self.balanced or cheaper else self.plain(batch)

    def plain(self, batch: torch.Tensor) -> torch.Tensor:
        """From all logits at once."""
        logits_BTV = self.model(**model_inputs(self.model, batch[:, :-1], self.border)).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")

    def chunked(self, batch: torch.Tensor) -> torch.Tensor:
        """From the hidden states, a chunk of logits after the other; with Mixtral's balance."""
        routers = {"output_router_logits": True} if self.balanced else {}
        outputs = self.model.base_model(**model_inputs(self.model, batch[:, :-1], self.border), **routers)
        head = self.model.get_output_embeddings()
        losses = F.linear_cross_entropy(
            outputs.last_hidden_state.flatten(0, 1),
            head.weight,
            batch[:, 1:].flatten(),
            linear_bias=head.bias,
            reduction="none",
            options=_LOSS_CHUNK,
        )
        return losses + _balance(self.model, outputs.router_logits) if self.balanced else losses


def _ends_in_its_head(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the logits are the output of a linear head on the base model's last states, and nothing is done to either.

    The head's output is replaced by large numbers on the way. They come out unchanged only where no scale, cap or mask
    follows, however small the weights still are.
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    large_V = torch.linspace(-_LARGEST_LOGIT, _LARGEST_LOGIT, head.out_features, device=model.device)

    def replace(_: Any, states: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        seen.append((states[0], logits))
        return large_V.to(logits.dtype).expand(logits.shape)

    with head.register_forward_hook(replace):
        given = model(**inputs).logits
    states = getattr(model.base_model(**inputs), "last_hidden_state", None)
    if len(seen) != 1 or states is None:
        return False
    [(head_states, logits)] = seen
    pairs = [
        (given, large_V.expand(given.shape)),
        (head_states, states),
        (logits, F.linear(states, head.weight, head.bias)),
    ]
    return all(found.shape == expected.shape and _agree(found, expected) for found, expected in pairs)


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to rounding. Zeros, as of the embedding of a padding token, tell nothing."""
    largest = expected.abs().max()
    return bool(largest > 0 and (found - expected).abs().max() <= 1e-4 * largest)


def check_causal(model: PreTrainedModel, tokens_BT: torch.Tensor) -> None:
    """UserError if later tokens change the logits of earlier ones. The model is in its evaluation mode."""
    half = tokens_BT.shape[1] // 2
    changed_BT = tokens_BT.clone()
    changed_BT[:, half:] = torch.where(tokens_BT[:, half:] == 1, 2, 1)
    logits, changed = (model(**model_inputs(model, tokens, None)).logits for tokens in (tokens_BT, changed_BT))
    difference_BTV = (logits - changed).abs()
    if half and difference_BTV[:, :half].max() > 1e-3 * difference_BTV[:, half:].max():
        raise UserError(
            f"{type(model).__name__} of {model.name_or_path!r} is no causal language model as it is configured: a token's "
            "logits depend on the tokens after it. Give a causal one as seed_model.name_or_path, or correct its config.json "
            "(is_decoder, is_causal)."
        )


def _chunks_are_cheaper(batch: torch.Tensor, vocab_size: int) -> bool:
    """By shape and device alone, so that a resumed run takes the same path."""
    if batch.device.type != "cpu" or not torch.is_grad_enabled():
        return True
    return 4 * batch[:, 1:].numel() * vocab_size > _MOST_LOGITS_BYTES


def _balance(model: PreTrainedModel, router_logits: Any) -> torch.Tensor:
    """Zero, with the gradient of Mixtral's load-balancing loss of a batch from its layers' router logits."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # seconds, and only here

    config: Any = model.config
    balance: Any = load_balancing_loss_func(router_logits, config.num_local_experts, config.num_experts_per_tok)
    return config.router_aux_loss_coef * (balance - balance.detach())


def model_inputs(model: PreTrainedModel, tokens_BT: torch.Tensor, border: int | None) -> dict[str, Any]:
    """Arguments of a forward pass; with a border, each document's positions start at 0 and its tokens see no other."""
    inputs = {"input_ids": tokens_BT, "use_cache": False}
    if border is None:
        return inputs
    from transformers.masking_utils import create_causal_mask  # seconds, and only here

    positions_BT = positions_in_document(tokens_BT, border)
    mask = create_causal_mask(
        config=model.config.get_text_config(),
        inputs_embeds=torch.empty(*tokens_BT.shape, 0, dtype=model.dtype, device=tokens_BT.device),  # for its shape
        attention_mask=None,
        past_key_values=None,
        position_ids=positions_BT,
    )
    return {**inputs, "position_ids": positions_BT, "attention_mask": mask}


def positions_in_document(tokens_BT: torch.Tensor, border: int) -> torch.Tensor:
    """Distance (B, T) of every token to the last border at or before it, or to the start of its sequence."""
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    starts_BT = torch.where(tokens_BT == border, index_T, 0).cummax(1).values
    return index_T - starts_BT


def _check_documents_stay_apart(model: PreTrainedModel, example: torch.Tensor, border: int) -> None:
    """Two documents in a sequence against the second alone, beside what the first does to it where it may."""
    half = example.shape[1] // 2
    second = example[:1, :half].clone()
    second[second == border] = 1 if border == 0 else 0
    second[:, 0] = border
    both = torch.cat([second.roll(1), second], dim=1)

    def logits(tokens: torch.Tensor, border: int | None) -> torch.Tensor:
        return model(**model_inputs(model, tokens, border)).logits[:, -half:]

    reason = None
    try:
        apart, alone = logits(both, border), logits(second, None)
    except (RuntimeError, TypeError, ValueError) as error:  # what architectures without such a mask do with one
        reason = error
    else:
        influence = (logits(both, None) - alone).abs().max()
        if (apart - alone).abs().max() <= 0.01 * influence + 1e-5 * alone.abs().max():
            return
    raise UserError(
        f"train.cross_documents=False does not work with {type(model).__name__}, whose layers do not keep the documents of "
        "a sequence apart. Set train.cross_documents=true."
    ) from reason
