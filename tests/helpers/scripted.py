"""A model that says what a table says, and a tokenizer of whole words: completions are known beforehand."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .models import tiny_llama


def words(vocabulary, **special):
    """A tokenizer whose tokens are these texts; a prompt is split at the character |, which is no part of it."""
    ids = {word: i for i, word in enumerate(["<unk>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def scripted(following):
    """A Llama whose layers add nothing: after token i comes following[i], whatever stood before."""
    size = len(following)
    model = tiny_llama(heads=4, vocab_size=size, tied=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.eye(size, embedding.shape[1]))
        head.zero_()
        head[following, torch.arange(size)] = 1.0
        model.model.norm.weight.fill_(1.0)
    return model
