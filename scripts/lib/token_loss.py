"""The loss of a batch without its logits ever being whole: they are a training step's largest tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lib.samples import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn

# Logits computed at a time: 2^26 in float32 are 268 MB. A 152k vocabulary gives 441 tokens.
LOGITS_AT_ONCE = 1 << 26


class TokenLoss:
    """
    Sum of the negative log likelihoods of all labelled tokens.

    Only labelled tokens get logits, a few hundred at a time, and none are kept for the backward pass, which
    computes them again. Where a model does more to its logits than its output head says (a cap, a scale), the
    model's own are taken.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: a causal language model of transformers, adapters attached or not.
        """
        self._model = model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder, self._head = causal.get_decoder(), causal.get_output_embeddings()
        self.by_head = self._head_gives_the_logits()

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """
        Compute the loss of one batch.

        Args:
            batch: input_ids, labels, position_ids, each (batch, length); attention_mask. Labels may be on the CPU.

        Returns:
            The sum over labelled tokens, a float32 scalar with gradient; in nats.
        """
        labels = batch["labels"][:, 1:].flatten()
        # On the CPU where the labels are there: on a GPU this would wait for all that was launched before.
        learned = (labels != IGNORED).nonzero().squeeze(1)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        if self.by_head:
            hidden = self._decoder(**inputs, use_cache=False).last_hidden_state
            return self._sum_by_chunks(_rows(hidden, learned), labels[learned].to(hidden.device))
        logits = self._model(**inputs, use_cache=False).logits
        return _negative_log_likelihood(_rows(logits, learned), labels[learned].to(logits.device))

    def _sum_by_chunks(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The loss of (tokens, hidden_size) states, a few hundred of them at a time."""
        from torch.utils.checkpoint import checkpoint

        def chunk_loss(states: Tensor, targets: Tensor) -> Tensor:
            logits = self._head(states)
            return _negative_log_likelihood(logits, targets.to(logits.device))

        size = max(1, LOGITS_AT_ONCE // self._head.out_features)
        chunks = list(zip(hidden.split(size), labels.split(size), strict=True))
        if len(chunks) == 1:
            return chunk_loss(*chunks[0])
        losses = [checkpoint(chunk_loss, states, targets, use_reentrant=False) for states, targets in chunks]
        return sum(losses[1:], start=losses[0])

    def _head_gives_the_logits(self) -> bool:
        """Whether decoder and output head alone give what the model gives, tried on a few tokens."""
        import torch

        if not hasattr(self._head, "out_features"):
            return False
        probe = torch.arange(1, 9, device=self._model.get_input_embeddings().weight.device)[None]
        training = self._model.training
        self._model.eval()
        # Not compiled for this one call: a block has few compiled variants before torch gives up on it.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            whole = self._model(input_ids=probe, use_cache=False).logits
            parts = self._head(self._decoder(input_ids=probe, use_cache=False).last_hidden_state)
        self._model.train(training)
        return bool(torch.equal(whole, parts.to(whole)))


def _rows(values: Tensor, wanted: Tensor) -> Tensor:
    """Rows of (batch, length, width) values; each sample's last token predicts nothing and is not counted."""
    return values[:, :-1].reshape(-1, values.shape[-1])[wanted.to(values.device)]


def _negative_log_likelihood(logits: Any, labels: Any) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), labels, reduction="sum")
