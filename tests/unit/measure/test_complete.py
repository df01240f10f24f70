"""Completions: of a model whose words are known, and of random ones against generate on one prompt at a time."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pp_fx.errors import InputError
from pp_fx.measure.complete import complete, cut
from tests.helpers.models import tiny_llama
from tests.helpers.scripted import scripted, words

# a chain: a -> b -> stop, c -> d -> e -> f -> stop -> g -> ..
WORDS = ["a", " b", "c", " d", " e", " f", "\ndef", " g", "</s>", "h"]
TOKENIZER = words(WORDS)
NEXT = {"a": " b", " b": "\ndef", "c": " d", " d": " e", " e": " f", " f": "\ndef", "\ndef": " g", " g": " g"}
NEXT |= {"h": "</s>", "</s>": "a"}


@pytest.fixture
def chain():
    return scripted([0, *(1 + WORDS.index(NEXT[word]) for word in WORDS)])


def steps_of(model):
    steps = []
    model.register_forward_hook(lambda *given: steps.append(1))
    return steps


def test_texts_are_cut_and_generation_ends_with_the_last_of_a_batch(chain):
    steps = steps_of(chain)
    done = complete(chain, TOKENIZER, ["a", "c"], batch=2, new_tokens=40, stops=("\ndef ", "\nclass "))
    assert done.texts == (" b", " d e f")
    assert len(steps) == 5  # d e f def g: the stop string ends within the word after it
    assert done.seconds > 0
    steps.clear()
    assert complete(chain, TOKENIZER, ["a", "c", "a"], batch=1, new_tokens=40, stops=("\ndef ",)).texts[2] == " b"
    assert len(steps) == 3 + 5 + 3


def test_without_a_stop_the_number_of_tokens_ends_it(chain):
    assert complete(chain, TOKENIZER, ["c"], batch=4, new_tokens=2).texts == (" d e",)
    assert complete(chain, TOKENIZER, [], batch=4, new_tokens=2).texts == ()


@pytest.mark.parametrize("ends", [9, [4, 9]])
def test_an_end_token_ends_a_text(chain, ends):
    """Of one row alone; the other goes on. A list of ends ends with any of them."""
    chain.generation_config.eos_token_id = ends
    done = complete(chain, TOKENIZER, ["h", "c"], batch=2, new_tokens=4, stops=("\ndef",))
    assert done.texts == ("", " d e f" if ends == 9 else "")


def test_greedy_whatever_the_models_own_settings_say(chain):
    own = chain.generation_config
    own.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=1, num_beams=2)
    assert complete(chain, TOKENIZER, [" g"], batch=1, new_tokens=5).texts == (" g" * 5,)
    assert chain.generation_config is own


def test_a_stop_in_the_prompt_is_no_stop(chain):
    assert complete(chain, TOKENIZER, ["a|\ndef"], batch=1, new_tokens=3, stops=("\ndef g",)).texts == (" g g g",)


def test_a_tokenizer_that_takes_the_first_blank_away():
    class Stripping:
        pad_token_id = None

        def __call__(self, text):
            return TOKENIZER(text)

        def decode(self, ids, **given):
            return TOKENIZER.decode(ids, **given).removeprefix(" ")

    model = scripted([0, *(1 + WORDS.index(NEXT[word]) for word in WORDS)])
    assert complete(model, Stripping(), ["a"], batch=1, new_tokens=9, stops=("\ndef",)).texts == (" b",)


def test_a_batch_gives_what_each_prompt_gives_alone():
    vocabulary = [chr(c) for c in range(33, 124) if chr(c) != "|"]
    tokenizer, model = words(vocabulary), tiny_llama(vocab_size=len(vocabulary) + 1)
    prompts = ["|".join("abcdefgh"[: 1 + i]) for i in range(7)]
    together, alone = (complete(model, tokenizer, prompts, batch=b, new_tokens=12) for b in (4, 1))
    assert together.texts == alone.texts
    ids = tokenizer(prompts[3], return_tensors="pt").input_ids
    own = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert alone.texts[3] == tokenizer.decode(own[0, ids.shape[1] :])
    assert len(set(alone.texts)) > 1


def test_cut():
    assert cut("ab\n#c\ndef d", ("\ndef ", "\n#")) == "ab"
    assert cut("ab", ("\ndef ",)) == "ab"
    assert cut("ab", ()) == "ab"
    assert cut("\n#", ("\n#",)) == ""


def test_learned_positions_are_a_limit():
    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=9)
    model = GPT2LMHeadModel(config).eval()
    complete(model, TOKENIZER, ["a|c"], batch=1, new_tokens=14)
    with pytest.raises(InputError, match=r"new_tokens=15 after prompts of up to 2 tokens .* at most 14"):
        complete(model, TOKENIZER, ["a|c"], batch=1, new_tokens=15)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"new_tokens": 0}])
def test_numbers_are_checked(chain, wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}=0"):
        complete(chain, TOKENIZER, ["a"], **{"batch": 1, "new_tokens": 1, **wrong})


def test_a_bar_counts_prompts(chain, capsys):
    complete(chain, TOKENIZER, ["a", "c", "a"], batch=2, new_tokens=2, progress="dense")
    assert torch.is_grad_enabled()
    assert capsys.readouterr().out == ""
