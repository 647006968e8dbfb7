"""Classifiers of token sequences that publications measure, and a loss for every token; all return logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testbed.problems.base import Positive, Samples, register_data, register_loss, register_model
from testbed.problems.forms import tokens

IGNORED = -100  # PyTorch's own mark of a target that does not count


class EmbeddingClassifier(nn.Module):
    """The mean of a sequence's embeddings, and a linear layer."""

    def __init__(self, vocabulary: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [N, outputs] of tokens [N, length]."""
        logits: Tensor = self.head(self.embedding(tokens).mean(1))
        return logits


class LSTMClassifier(nn.Module):
    """Embeddings, an LSTM, the mean of its outputs over the sequence, and a linear layer."""

    def __init__(self, vocabulary: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [N, outputs] of tokens [N, length]."""
        states, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(states.mean(1))
        return logits


@register_model("embedding_classifier")
def embedding_classifier(example: Samples, *, vocabulary: Positive = 10_000, width: Positive = 16) -> nn.Module:
    """The embedding network for IMDb of Subramani et al. 2020, arXiv:2010.09063: mean of embeddings, a linear layer.

    Options:
        vocabulary: How many tokens there are.
        width: Numbers a token.
    """
    tokens("embedding_classifier", example, vocabulary)
    return EmbeddingClassifier(vocabulary, width, example.outputs)


@register_model("lstm_classifier")
def lstm_classifier(example: Samples, *, vocabulary: Positive = 10_000, width: Positive = 100) -> nn.Module:
    """The LSTM for IMDb of Subramani et al. 2020, arXiv:2010.09063: mean over its outputs, a linear layer.

    Options:
        vocabulary: How many tokens there are.
        width: Numbers a token, and of the LSTM's state.
    """
    tokens("lstm_classifier", example, vocabulary)
    return LSTMClassifier(vocabulary, width, example.outputs)


@register_data("text")
def text(n: int, *, length: Positive = 256, vocabulary: Positive = 10_000, classes: Positive = 2) -> Samples:
    """Token sequences shaped like reviews: few tokens are frequent, lengths differ, token 0 fills up in front.

    Token k is drawn in proportion to 1 / k, Zipf's law; a sequence has from an eighth to all of `length` tokens.

    Options:
        length: Tokens a sample, those that fill up included.
        vocabulary: How many tokens there are.
        classes: How many classes there are.
    """
    frequency = 1 / torch.arange(1, vocabulary, dtype=torch.float64)
    drawn = 1 + torch.multinomial(frequency, n * length, replacement=True).view(n, length)
    filled = torch.randint(length - max(1, length // 8) + 1, (n, 1))
    return Samples(drawn.where(torch.arange(length) >= filled, 0), torch.randint(classes, (n,)), classes)


@register_data("language")
def language(n: int, *, length: Positive = 512, vocabulary: Positive = 50_257) -> Samples:
    """Uniform token sequences; the target of each token is the one after it.

    Options:
        length: Tokens a sample.
        vocabulary: How many tokens there are.
    """
    drawn = torch.randint(vocabulary, (n, length + 1))
    return Samples(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), vocabulary)


@register_loss("token_cross_entropy")
def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over a sample's own tokens of the cross-entropy of logits [N, T, C] and classes [N, T]; -100 is ignored."""
    if targets.dim() != 2 or outputs.shape[:-1] != targets.shape:
        found = f"{list(outputs.shape)} and {list(targets.shape)}"
        raise ValueError(f"token_cross_entropy takes logits [N, T, C] and classes [N, T], found {found}")
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)
