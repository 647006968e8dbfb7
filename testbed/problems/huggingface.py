"""Architectures of Hugging Face's `transformers`, an optional library, with random weights and no dropout."""

from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from backends.base import first_line
from testbed.problems.base import Positive, ProblemError, Samples, register_model
from testbed.problems.forms import tokens


class Logits(nn.Module):
    """A model of the library whose output is a structure, reduced to its logits.

    Args:
        model: The model.
        masked: Whether tokens 0 fill up sequences, and are masked.
        options: What else its call takes.
    """

    def __init__(self, model: nn.Module, *, masked: bool = False, **options: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.model, self.masked, self.options = model, masked, options

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [N, outputs], or [N, length, vocabulary], of tokens [N, length]."""
        mask = {"attention_mask": (tokens != 0).long()} if self.masked else {}
        logits: Tensor = self.model(tokens, **mask, **self.options).logits
        return logits


@register_model("bert")
def bert(
    example: Samples,
    *,
    vocabulary: Positive = 30_522,
    width: Positive = 768,
    depth: Positive = 12,
    heads: Positive = 12,
    frozen: Annotated[int, Field(ge=0)] = 0,
    masked: bool = False,
) -> nn.Module:
    """A BERT classifier of token sequences, BERT-base by default; needs `transformers`.

    Devlin et al. 2019, arXiv:1810.04805.

    Options:
        vocabulary: How many tokens there are.
        width: Numbers a token; the MLPs are four times as wide.
        depth: Blocks.
        heads: Attention heads.
        frozen: Blocks from below that are not trained, and with them the embeddings; 0 trains everything.
        masked: Whether token 0 only fills up, as in data `text`, and is masked.
    """
    library = _transformers("bert")
    length = tokens("bert", example, vocabulary).shape[1]
    config = library.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max(512, length),
        num_labels=example.outputs,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = library.BertForSequenceClassification(config)
    if frozen:
        for part in (model.bert.embeddings, *model.bert.encoder.layer[:frozen]):
            part.requires_grad_(False)
    return Logits(model, masked=masked)


@register_model("gpt2")
def gpt2(
    example: Samples,
    *,
    vocabulary: Positive = 50_257,
    width: Positive = 768,
    depth: Positive = 12,
    heads: Positive = 12,
) -> nn.Module:
    """GPT-2 with the head tied to the embedding, small by default, for data `language`; needs `transformers`.

    Radford et al. 2019, "Language models are unsupervised multitask learners".

    Options:
        vocabulary: How many tokens there are.
        width: Numbers a token; the MLPs are four times as wide.
        depth: Blocks.
        heads: Attention heads.
    """
    library = _transformers("gpt2")
    length = tokens("gpt2", example, vocabulary).shape[1]
    if example.targets.dim() != 2:
        raise ProblemError("model 'gpt2' takes a target for each token, such as data 'language' has")
    config = library.GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        n_positions=max(1024, length),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Logits(library.GPT2LMHeadModel(config), use_cache=False)  # a cache is of no use in training


def _transformers(model: str) -> ModuleType:
    try:
        return import_module("transformers")  # takes seconds, and is optional
    except ImportError as error:
        raise ProblemError(
            f"model '{model}' needs the library transformers ({first_line(error)}): pip install transformers"
        ) from None
