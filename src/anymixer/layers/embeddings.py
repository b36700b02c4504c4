"""Token embeddings of an encoder."""

import torch
from torch import Tensor, nn

from anymixer.layers.packing import Packing


class EncoderEmbeddings(nn.Module):
    """Word + token type (+ learned position) embeddings, LayerNorm, dropout, as BERT has them."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        type_vocab_size: int,
        max_positions: int | None,
        pad_token_id: int,
        norm_eps: float,
        dropout: float,
    ) -> None:
        """max_positions: number of learned positions; None for a model without them. type_vocab_size 0: none."""
        super().__init__()
        self.word = nn.Embedding(vocab_size, d_model, padding_idx=pad_token_id)
        self.token_type = nn.Embedding(type_vocab_size, d_model) if type_vocab_size else None
        self.position = nn.Embedding(max_positions, d_model) if max_positions else None
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        packing: Packing | None,
    ) -> Tensor:
        """input_ids, token_type_ids: [batch, length]; inputs_embeds: [batch, length, d_model] in place of input_ids.

        Positions count from each sequence's own start. Raises ValueError when a row is longer than the
        learned positions.
        """
        embedded = self.word(input_ids) if inputs_embeds is None else inputs_embeds
        if self.token_type is not None:
            types = self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids)
            embedded = embedded + types
        if self.position is not None:
            embedded = embedded + self._learned_positions(embedded.shape[1], embedded.device, packing)
        return self.dropout(self.norm(embedded))

    def _learned_positions(self, length: int, device: torch.device, packing: Packing | None) -> Tensor:
        assert self.position is not None
        if length > self.position.num_embeddings:
            raise ValueError(f"{length} tokens, but max_position_embeddings is {self.position.num_embeddings}")
        places = torch.arange(length, device=device)[None] if packing is None else packing.positions()
        return self.position(places)
