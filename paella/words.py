"""A text encoder whose tokens are words and whose positions are absolute: made new, from a dataset's captions alone.

Bytes have to become words before a caption is more than a bag of letters, and a small model spends its run on that. An encoder
with absolute positions learns which colour belongs to which object sooner than one with T5's relative ones (arXiv 2601.06338);
`paella.layout` teaches it before there is a U-Net. Both parts are transformers' own classes, so that its Auto classes load them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from paella.config import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, RobertaPreLayerNormModel  # whose import takes seconds

PAD, END = "<pad>", "</s>"
NUM_BYTES = 256
"""Each is a token, so that any text can be written."""


@dataclass(frozen=True, kw_only=True)
class NewWords:
    """Size of a text encoder with words for tokens."""

    vocab_size: int = 1024
    """Tokens at most: 256 bytes, padding, the end, and what is frequent in the captions."""
    d_model: int = 128
    """Width of the states; the U-Net's byt5_embd."""
    d_ff: int = 256
    """Width of the feed-forward layers."""
    num_layers: int = 2
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    max_length: int = 128
    """Tokens kept of a caption; there are as many positions."""

    def __post_init__(self) -> None:
        least = NUM_BYTES + len((PAD, END))
        require(self.vocab_size >= least, "vocab_size", self.vocab_size, f"an integer of at least {least}")
        for name in ("d_model", "d_ff", "num_layers", "num_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        require(self.d_model % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of d_model, {self.d_model}")
        require(self.max_length >= 2, "max_length", self.max_length, "an integer of at least 2")


def learn_tokenizer(captions: Iterable[str], size: NewWords) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (arXiv 1508.07909) of captions: a word that is frequent in them is one token.

    It appends the end and pads on the right. Nothing in a text is taken for a special token, so that padding is padding only.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a first word is the same token as a later one
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab_size,
        min_frequency=2,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, bpe.token_to_id(END))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        model_max_length=size.max_length,
        padding_side="right",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def new_encoder(size: NewWords, tokenizer: PreTrainedTokenizerFast) -> RobertaPreLayerNormModel:
    """Return an untrained encoder for a tokenizer's ids: bidirectional, pre-norm, without dropout or pooling."""
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormModel

    config = RobertaPreLayerNormConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.d_model,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.d_ff,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=tokenizer.pad_token_id + 1 + size.max_length,  # the first position follows padding's id
        type_vocab_size=1,
        initializer_range=(3 * size.d_model) ** -0.5,  # as torch's own layers of this width
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = RobertaPreLayerNormModel(config, add_pooling_layer=False)
    for table in (encoder.embeddings.word_embeddings, encoder.embeddings.position_embeddings):
        nn.init.normal_(table.weight)  # as torch's own
    encoder.set_attn_implementation("eager")  # fused attention makes a training step half as long again on a CPU
    return encoder
