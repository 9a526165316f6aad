"""The language head: logits for generation, and for training their cross-entropy without whole logits."""

from torch import Tensor, nn

from megafusion.objective.chunked_cross_entropy import summed_nats


class LanguageHead(nn.Linear):
    """Next-token logits [..., V] of hidden states [..., D]; or, with labels, the nats of these.

    first_token: that of the first logit. is_compiled: see `summed_nats`.
    """

    first_token, is_compiled = 0, False

    def __init__(self, hidden_size: int, vocab_size: int, device: object = None):
        super().__init__(hidden_size, vocab_size, bias=False, device=device)

    def forward(
        self,
        hidden: Tensor,
        labels_R: Tensor | None = None,
        index_R: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        if labels_R is None or index_R is None:
            return super().forward(hidden)
        return summed_nats(
            hidden, self.weight, labels_R, index_R, self.first_token, self.merge, self.is_compiled, z_loss
        )

    def merge(self, statistics_3R: Tensor) -> Tensor:
        """Figures of this head's logits as those of the whole vocabulary's; see `Merge`."""
        return statistics_3R
