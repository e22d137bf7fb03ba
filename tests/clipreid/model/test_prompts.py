"""The text side: against the reference figures, and against open_clip's own tower over all 77 positions."""

import itertools

import open_clip
import pytest
import torch

from clipreid.errors import ModelError
from clipreid.model.arch import check_arch
from clipreid.model.prompts import template_ids
from clipreid.weights.initial import build_models
from tests.helpers.golden_models import ROOT_CONFIGS, case_models, case_spec, clip_state, read_case, scaled_error
from tests.helpers.settings import model_spec
from tests.helpers.tolerances import close, within

TINY = str(ROOT_CONFIGS / "tiny_vit.json")
TEXT_CASES = {"text_person_512": "vit", "text_vehicle_512": "vit", "text_person_1024": "rn50"}


def tiny_text(**changes):
    fields = {"image_size": (32, 32), "identities": 6, **changes}
    spec = model_spec(TINY, **fields)
    models = build_models(spec, seed=2)
    return models.text, models.tables.tokens.block, spec


def whole_tower(text, spec, tokens, labels):
    """Features as open_clip computes them: 77 positions through its CLIP, the tower's weights trained as well."""
    clip = open_clip.CLIP(**spec.arch_config).to(tokens.dtype)
    clip.load_state_dict(text.text_encoder.state_dict(), strict=False)
    ids, end = template_ids(spec.noun, spec.prompt_tokens, clip.context_length)
    assert ids[end] == 49407 and not any(ids[end + 1 :])
    prefix, suffix = text.prompt_learner.token_prefix[0], text.prompt_learner.token_suffix[0]
    x = torch.stack([torch.cat([prefix, tokens[label], suffix]) for label in labels])
    x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
    return clip.ln_final(x)[:, end] @ clip.text_projection


@pytest.fixture(scope="module")
def golden_texts():
    """Text side and specification of each case."""
    built = {}
    for name, net in TEXT_CASES.items():
        _, case = read_case(name)
        spec = case_spec(case, net, noun=case["template"])
        models = case_models(spec, net)
        built[name] = (models.text, models.tables.tokens.block, spec)
    return built


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_CASES)
def test_text_features_match_the_reference_figures(name, golden_texts):
    golden, case = read_case(name)
    text, tokens, spec = golden_texts[name]
    ids, end = template_ids(spec.noun, spec.prompt_tokens, 77)
    assert ids[: end + 1] == golden["word_ids"].tolist() and end == 11
    with torch.no_grad():
        features = text(tokens[case["labels"]])
    within(scaled_error(features, golden["text_features"]), 2e-5)


@pytest.mark.slow
def test_the_cut_prompt_gives_the_features_and_gradients_of_all_77_positions(golden_texts):
    """Contract C6 at full size: values to 1e-5, token gradients to 2e-5 scaled."""
    text, tokens, spec = golden_texts["text_vehicle_512"]
    assert_equal_to_whole_tower(text, tokens, spec, torch.tensor([3, 0, 3, 11]), 1e-5, 2e-5)


@pytest.mark.parametrize("tokens", [1, 4, 8])
@pytest.mark.parametrize("noun", ["person", "vehicle", "small Greek letter", "naïve 3-wheeler"])
def test_any_noun_and_number_of_tokens_equals_the_whole_tower(noun, tokens):
    """In float64, where nothing but the arithmetic itself could differ."""
    text, rows, spec = tiny_text(noun=noun, prompt_tokens=tokens)
    assert_equal_to_whole_tower(text.double(), rows.double(), spec, torch.tensor([5, 2, 2, 0]), 1e-12, 1e-12)


def assert_equal_to_whole_tower(text, rows, spec, labels, value_tolerance, gradient_tolerance):
    tokens, ours = (rows.detach().clone().requires_grad_() for _ in range(2))
    weights = torch.randn(len(labels), spec.arch_config["embed_dim"], generator=torch.Generator().manual_seed(0))
    expected = whole_tower(text, spec, tokens, labels)
    (expected * weights).sum().backward()
    features = text(ours[labels])
    (features * weights).sum().backward()
    within(scaled_error(features, expected.detach().numpy()), value_tolerance)
    within(scaled_error(ours.grad, tokens.grad.numpy()), gradient_tolerance)


def test_only_the_tokens_learn_and_no_gradient_is_computed_for_the_tower():
    text, tokens, _ = tiny_text()
    text(tokens[torch.tensor([1, 4])]).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in text.parameters())
    assert tokens.grad.any(dim=(1, 2)).tolist() == [False, True, False, False, True, False]


def test_the_prefix_passes_through_the_tower_once():
    """64 prompts of 12 positions: 5 + 64 * 7 rows enter an inner MLP, and 64 the last one."""
    text, tokens, _ = tiny_text(identities=64)
    rows = {0: [], 1: []}
    for index, block in enumerate(text.text_encoder.transformer.resblocks):
        hook = lambda _, inputs, seen=rows[index]: seen.append(inputs[0].shape[0] * inputs[0].shape[1])  # noqa: E731
        block.mlp.register_forward_pre_hook(hook)
    text(tokens)
    assert (sorted(rows[0]), rows[1]) == ([5, 64 * 7], [64])


def test_text_features_depend_only_on_their_own_identity():
    """In float64: kernels need not round two rows of one product alike."""
    text, tokens, _ = tiny_text()
    text, tokens = text.double(), tokens.double()
    features = text(tokens)
    close(*text(tokens[[3, 3]]), atol=1e-12)
    close(text(tokens[[4]]), features[4:5], atol=1e-12)
    distances = torch.cdist(features, features)
    assert all(distances[a, b] > 1e-4 for a, b in itertools.combinations(range(6), 2))


def test_text_features_survive_bf16_autocast():
    text, tokens, _ = tiny_text()
    exact = text(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = text(tokens)
    within(scaled_error(rounded, exact.detach().numpy()), 0.03)


def test_text_side_compiles_as_one_graph():
    text, tokens, _ = tiny_text()
    compiled = torch.compile(text, fullgraph=True, backend="eager")
    close(compiled(tokens), text(tokens), rtol=1.3e-6, atol=1e-5)


def test_template_ids_are_the_published_ones():
    person, end = template_ids("person", 4, 77)
    assert person[: end + 1] == [49406, 320, 1125, 539, 320, 343, 343, 343, 343, 2533, 269, 49407]
    assert len(person) == 77 and not any(person[end + 1 :])
    assert template_ids("vehicle", 1, 77)[0][5:7] == [343, 5299]


def test_an_impossible_prompt_is_refused():
    with pytest.raises(ModelError, match="noun of the prompt is empty"):
        template_ids(" ", 4, 77)
    with pytest.raises(ModelError, match="takes 78 positions, the text tower has 77"):
        template_ids("person", 70, 77)


def test_words_around_the_tokens_are_the_towers_own_embeddings(tmp_path):
    state = clip_state(check_arch(TINY))
    torch.save(state, tmp_path / "clip.pt")
    spec = model_spec(TINY, image_size=(32, 32), noun="red car")
    _, text, tables = build_models(spec, str(tmp_path / "clip.pt"))
    ids, _ = template_ids("red car", 4, 77)
    uncut = text.prompt_learner.uncut(tables.tokens.block[:1])[0]
    places = [*range(5), *range(9, 77)]
    assert torch.equal(uncut[places], state["token_embedding.weight"][ids][places])
    assert torch.equal(uncut[5:9], tables.tokens.block[0])
