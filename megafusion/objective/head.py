"""The language head: logits for generation, and for training their cross-entropy without whole logits."""

from torch import Tensor, nn

from megafusion.objective.chunked_cross_entropy import summed_nats
from megafusion.objective.config import positions_in_chunk


class LanguageHead(nn.Linear):
    """Next-token logits [..., V] of hidden states [..., D]; or, with labels, the nats of these.

    first_token: that of the first logit. most_columns: logits of the rank with most. is_compiled: see
    `summed_nats`.
    """

    first_token, is_compiled = 0, False

    def __init__(self, hidden_size: int, vocab_size: int, device: object = None):
        super().__init__(hidden_size, vocab_size, bias=False, device=device)
        self.most_columns = vocab_size

    def forward(
        self,
        hidden: Tensor,
        labels_R: Tensor | None = None,
        index_R: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        if labels_R is None or index_R is None:
            return super().forward(hidden)
        # Ranks exchange figures of each chunk, so all must take the same.
        chunk_size = positions_in_chunk(self.most_columns, self.weight.element_size())
        return summed_nats(
            hidden,
            self.weight,
            labels_R,
            index_R,
            chunk_size,
            self.first_token,
            self.merge,
            self.is_compiled,
            z_loss,
        )

    def merge(self, statistics_3R: Tensor) -> Tensor:
        """Figures of this head's logits as those of the whole vocabulary's; see `Merge`."""
        return statistics_3R
