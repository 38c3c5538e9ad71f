"""Text states: chunks joined, layers skipped, pooled rows."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.errors import ConfigError
from sdxl_train.model.architecture import SDXL
from sdxl_train.model.single_file import Checkpoint, load_text_encoders
from sdxl_train.model.text import check_clip_skip, encode_prompts, freeze_unused_layers, load_tokenizers

ORACLES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))
TEXTS = ["a cat", "a dog and " * 60, "one two three four five " * 20]

Encoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]


@pytest.fixture(scope="module")
def encoders(tiny: Checkpoint) -> Encoders:
    return load_text_encoders(tiny, torch.float32)


def ids_of(texts: list[str], max_token_length: int) -> tuple[Tensor, Tensor]:
    tokenizer = load_tokenizers(None, None)
    packed = [tokenizer.tokenize(text, max_token_length) for text in texts]
    return torch.tensor([te1 for te1, _, _ in packed]), torch.tensor([te2 for _, te2, _ in packed])


@pytest.mark.parametrize("max_token_length", [75, 150, 225])
def test_the_number_of_positions_is_75_a_chunk_and_2(encoders: Encoders, max_token_length: int) -> None:
    prompt_embeds, pooled = encode_prompts(*ids_of(TEXTS, max_token_length), *encoders, clip_skip=1)
    assert prompt_embeds.shape == (3, max_token_length + 2, 40) and pooled.shape == (3, 24)
    oracle = ORACLES["text_positions"]
    if oracle["inputs"][0]["max_token_length"] == max_token_length:
        assert oracle["expected"][0] == {"positions": prompt_embeds.shape[1], "chunks": max_token_length // 75}


@torch.no_grad()
def test_positions_and_pooled_rows_belong_to_their_sample_and_chunk(encoders: Encoders) -> None:
    te1, te2 = ids_of(TEXTS, 225)
    prompt_embeds, pooled = encode_prompts(te1, te2, *encoders, clip_skip=1)
    for sample in range(3):
        alone = [encoder(ids[sample], output_hidden_states=True) for encoder, ids in zip(encoders, (te1, te2), strict=True)]
        states = torch.cat([outputs.hidden_states[-2] for outputs in alone], dim=-1)  # [3, 77, 40]
        joined = torch.cat([states[0, :1], states[0, 1:76], states[1, 1:76], states[2, 1:76], states[2, 76:]])
        assert torch.allclose(prompt_embeds[sample], joined, atol=1e-5)
        assert torch.allclose(pooled[sample], alone[1].text_embeds[0], atol=1e-5)


@torch.no_grad()
def test_pooled_is_the_projected_normed_last_state_at_the_first_end_marker(encoders: Encoders) -> None:
    te1, te2 = ids_of(["a cat"], 75)
    _, pooled = encode_prompts(te1, te2, *encoders, clip_skip=1)
    last = encoders[1].text_model(te2[0]).last_hidden_state[0, 3]  # start, a, cat, end
    assert torch.allclose(pooled[0], encoders[1].text_projection.weight @ last, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("clip_skip", "layers_run"), [(0, 2), (1, 2), (2, 1), (3, 0)])
def test_clip_skip_takes_the_state_before_the_last_layers_without_the_final_norm(
    encoders: Encoders, clip_skip: int, layers_run: int
) -> None:
    ids = ids_of(["a cat"], 75)
    first = encoders[0]
    state = first.embeddings(ids[0][0])
    mask = torch.full((77, 77), float("-inf")).triu(1)[None, None]
    for layer in first.encoder.layers[:layers_run]:
        state = layer(state, attention_mask=mask)
    prompt_embeds, pooled = encode_prompts(*ids, *encoders, clip_skip=clip_skip)
    assert torch.allclose(prompt_embeds[..., :16], state, atol=1e-5)
    assert torch.equal(pooled, encode_prompts(*ids, *encoders, clip_skip=1)[1])


def test_a_clip_skip_beyond_the_layers_is_an_error(tiny: Checkpoint) -> None:
    check_clip_skip(12, SDXL)
    check_clip_skip(3, tiny.architecture)
    with pytest.raises(ConfigError, match=r"clip_skip = 4: .*first text encoder has 3 layers"):
        check_clip_skip(4, tiny.architecture)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_exactly_the_parameters_left_trainable_get_gradients(tiny: Checkpoint, clip_skip: int, checkpointing: bool) -> None:
    encoders = load_text_encoders(tiny, torch.float32)
    freeze_unused_layers(encoders[0], clip_skip)
    for encoder in encoders:
        encoder.train()
        if checkpointing:
            encoder.gradient_checkpointing_enable()
    prompt_embeds, pooled = encode_prompts(*ids_of(["a cat"], 75), *encoders, clip_skip=clip_skip)
    (prompt_embeds.square().sum() + pooled.square().sum()).backward()
    for encoder in encoders:
        assert {n for n, p in encoder.named_parameters() if p.requires_grad} == {
            n for n, p in encoder.named_parameters() if p.grad is not None
        }
    assert any(not parameter.requires_grad for parameter in encoders[0].parameters())
