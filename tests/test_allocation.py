"""Allocation frames against loops over eager patterns, and against frames small enough to work out by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from ctxlib.allocation import (
    at_heads,
    attention_allocation,
    attention_shift,
    mean_over_heads,
    renormalise,
    retrieval_head,
    retrieval_head_of_others,
    role_shift,
)
from ctxlib.params import InputError
from ctxlib.roles import ROLES, Groups, Role, RoleMap


def random_maps(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for length in lengths:
        ids = torch.randint(3, 250, (length,), generator=generator)
        roles = torch.cat([torch.arange(len(ROLES)), torch.randint(1, len(ROLES), (length - 5,), generator=generator)])
        maps.append(RoleMap(ids=ids, roles=roles, turns=torch.ones(length, dtype=torch.long)))
    return maps


@torch.no_grad()
def eager_frame(model, maps):
    """One example at a time, from the eager patterns."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    rows = []
    for example, role_map in enumerate(maps):
        for layer, pattern in enumerate(model(role_map.ids[None], output_attentions=True).attentions):
            for head in range(pattern.shape[1]):
                for role, name in enumerate(ROLES):
                    share = float(pattern[0, head, -1][role_map.roles == role].sum())
                    rows.append((example, layer, head, name, share))
    model.set_attn_implementation(backend)
    return pd.DataFrame(rows, columns=["example", "layer", "head", "role", "attention_allocation"])


def frame_of(shares, example=0, layer=0):
    """shares: head -> role -> share."""
    rows = [(example, layer, head, role, share) for head, of in shares.items() for role, share in of.items()]
    return pd.DataFrame(rows, columns=["example", "layer", "head", "role", "attention_allocation"])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_frame_matches_eager_patterns_one_by_one(model: PreTrainedModel, batch_size):
    maps = random_maps([12, 7, 20, 9])
    found = attention_allocation(model, maps, batch_size=batch_size, pad_token_id=0)
    pd.testing.assert_frame_equal(found, eager_frame(model, maps), atol=5e-6, rtol=0, check_dtype=False)


def test_any_grouping_is_recorded_as_the_sum_over_its_tokens(model: PreTrainedModel):
    maps = random_maps([12, 7])
    names = tuple(f"token {position}" for position in range(12))
    by_token = [Groups(names, torch.arange(len(one))) for one in maps]
    options = {"batch_size": 2, "pad_token_id": 0}
    single = attention_allocation(model, maps, groups=by_token, **options).set_index(["example", "layer", "head"])
    halves = [Groups(("even", "odd"), torch.arange(len(one)) % 2) for one in maps]
    found = attention_allocation(model, maps, groups=halves, **options)
    for row in found.itertuples():
        tokens = single.loc[(row.example, row.layer, row.head)].set_index("role").attention_allocation
        assert row.attention_allocation == pytest.approx(
            tokens.iloc[["even", "odd"].index(row.role) :: 2].sum(), abs=1e-6
        )
    assert set(found.role) == {"even", "odd"} and len(found) * 6 == len(single)
    with pytest.raises(InputError, match="one grouping per example"):
        attention_allocation(model, maps, groups=halves[:1], **options)


def test_steering_goes_to_the_users_tokens_whatever_the_grouping(model: PreTrainedModel):
    maps = random_maps([12, 7])
    options = {"batch_size": 2, "pad_token_id": 0, "steering_alpha": 0.3}
    plain = attention_allocation(model, maps, **options)
    by_name = [Groups(ROLES[::-1], 4 - one.roles) for one in maps]
    turned = attention_allocation(model, maps, groups=by_name, **options)
    keys = ["example", "layer", "head", "role"]
    both = plain.merge(turned, on=keys, validate="1:1")
    assert len(both) == len(plain)
    np.testing.assert_allclose(both.attention_allocation_x, both.attention_allocation_y, atol=1e-6)


def test_chosen_layers_are_those_of_the_whole_frame(model: PreTrainedModel):
    maps = random_maps([12, 7])
    every = attention_allocation(model, maps, batch_size=2, pad_token_id=0)
    first = attention_allocation(model, maps, batch_size=2, pad_token_id=0, layers=[0])
    pd.testing.assert_frame_equal(first, every[every.layer == 0].reset_index(drop=True))


def test_steering_moves_the_first_layer_by_the_formula(model: PreTrainedModel):
    maps = random_maps([12, 7])
    plain = attention_allocation(model, maps, batch_size=2, pad_token_id=0, layers=[0])
    steered = attention_allocation(model, maps, batch_size=2, pad_token_id=0, layers=[0], steering_alpha=0.5)
    weighted = plain.attention_allocation.where(plain.role == "user", 0.5 * plain.attention_allocation)
    total = weighted.groupby([plain["example"], plain["head"]]).transform("sum")
    pd.testing.assert_series_equal(steered.attention_allocation, weighted / total, check_names=False, atol=2e-6, rtol=0)


def test_paper_reading_steers_the_second_layer_harder(model: PreTrainedModel):
    options = {"batch_size": 2, "pad_token_id": 0, "steering_alpha": 0.5}
    maps = random_maps([12, 7])
    for one in maps:  # the user's text is the end: there is no further token that theirs would keep
        one.roles[:] = one.roles.where(one.roles != Role.USER, Role.TEMPLATE)
        one.roles[-3:] = Role.USER
    clean, paper = (attention_allocation(model, maps, variant=r, **options) for r in ("standard", "authors_code"))
    user = [frame[frame.role == "user"].groupby("layer").attention_allocation.mean() for frame in (clean, paper)]
    assert user[1][0] == pytest.approx(user[0][0])
    assert user[1][1] > user[0][1]


def test_renormalised_roles_sum_to_one_without_the_template():
    frame = frame_of({0: {"bos": 0.2, "system": 0.0, "user": 0.2, "assistant": 0.1, "template": 0.5}})
    found = renormalise(frame)
    assert dict(zip(found.role, found.attention_allocation, strict=True)) == pytest.approx(
        {"bos": 0.4, "system": 0.0, "user": 0.4, "assistant": 0.2}
    )
    pd.testing.assert_frame_equal(renormalise(found), found)


def test_shift_is_template_minus_plain_after_renormalising():
    template = frame_of({0: {"bos": 0.2, "user": 0.2, "assistant": 0.1, "template": 0.5}})
    plain = frame_of({0: {"bos": 0.1, "user": 0.6, "assistant": 0.1, "template": 0.2}})
    found = attention_shift(template, plain.sample(frac=1, random_state=0)).set_index("role")
    assert found.attention_shift.to_dict() == pytest.approx({"bos": 0.275, "user": -0.35, "assistant": 0.075})
    assert found.attention_shift.sum() == pytest.approx(0)


def test_shift_of_different_examples_is_refused():
    shares = {0: {"bos": 0.5, "user": 0.5}}
    with pytest.raises(InputError, match="differ"):
        attention_shift(frame_of(shares), frame_of(shares, example=1))


def test_retrieval_head_is_the_head_with_most_attention_to_the_user():
    shares = {0: {"user": 0.3, "bos": 0.7}, 1: {"user": 0.6, "bos": 0.4}, 2: {"user": 0.1, "bos": 0.9}}
    swapped = {0: shares[1], 1: shares[0], 2: shares[2]}
    frame = pd.concat([frame_of(shares), frame_of(shares, layer=1), frame_of(swapped, example=1)], ignore_index=True)
    heads = retrieval_head(frame)
    assert heads.to_numpy().tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 0]]
    chosen = at_heads(frame, heads)
    assert len(chosen) == 6
    assert (chosen[chosen.role == "user"].attention_allocation == 0.6).all()


def test_a_head_chosen_on_other_prompts_is_that_of_the_other_half_by_a_loop():
    rng = np.random.default_rng(0)
    parts = []
    for example, layer in itertools.product((3, 5, 6, 8, 9), (0, 1)):
        shares = {head: (user := rng.uniform(), 1 - user) for head in range(4)}
        shares = {head: dict(zip(("user", "bos"), pair, strict=True)) for head, pair in shares.items()}
        parts.append(frame_of(shares, layer=layer, example=example))
    frame = pd.concat(parts, ignore_index=True)
    halves = [(3, 6, 9), (5, 8)]
    expected = []
    for mine, others in (halves, halves[::-1]):
        for example, layer in itertools.product(mine, (0, 1)):
            of_layer = frame[(frame.layer == layer) & (frame.role == "user") & frame.example.isin(others)]
            means = {head: part.attention_allocation.mean() for head, part in of_layer.groupby("head")}
            expected.append([example, layer, max(means, key=means.get)])
    heads = retrieval_head_of_others(frame)
    assert heads[["example", "layer", "head"]].to_numpy().tolist() == sorted(expected)
    with pytest.raises(InputError, match="at least two"):
        retrieval_head_of_others(frame[frame.example == 3])


def test_mean_over_heads_keeps_examples_layers_and_roles():
    frame = frame_of({0: {"user": 0.2, "bos": 0.8}, 1: {"user": 0.6, "bos": 0.4}})
    found = mean_over_heads(attention_shift(frame, frame))
    numbers = ["with_template", "without_template", "attention_shift"]
    assert found.columns.tolist() == ["example", "layer", "role", *numbers]
    assert found.set_index("role").with_template.to_dict() == pytest.approx({"user": 0.4, "bos": 0.6})


def test_role_shift_is_that_of_the_layer_and_the_mean_over_all_of_them():
    rows = [(1, 0, 0.1), (1, 1, 0.3), (1, 2, -0.1), (0, 0, -0.2), (0, 1, 0.0), (0, 2, -0.4)]
    shift = pd.DataFrame(rows, columns=["example", "layer", "attention_shift"]).assign(role="user")
    shift = pd.concat([shift, shift.assign(role="bos", attention_shift=9.0)])
    found = role_shift(shift, "user", [2, 1])
    assert list(found) == ["layer 2", "layer 1", "mean over layers"]
    assert {name: values.to_dict() for name, values in found.items()} == {
        "layer 2": {0: -0.4, 1: -0.1},
        "layer 1": {0: 0.0, 1: 0.3},
        "mean over layers": pytest.approx({0: -0.2, 1: 0.1}),
    }
    with pytest.raises(InputError, match=r"layer 7 was not measured; choose of \[0, 1, 2\]"):
        role_shift(shift, "user", [7])


def test_nothing_to_measure_is_refused(model: PreTrainedModel):
    with pytest.raises(InputError, match="at least one example"):
        attention_allocation(model, [], batch_size=2, pad_token_id=0)


def test_where_memory_runs_out_the_batch_size_is_named(model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(model.model.layers[1], "forward", full)
    with pytest.raises(InputError, match=r"out of memory \(CUDA out of memory.*: set models\.batch_size down"):
        attention_allocation(model, random_maps([9, 12]), batch_size=2, pad_token_id=0)
    monkeypatch.undo()
    assert len(attention_allocation(model, random_maps([9, 12]), batch_size=2, pad_token_id=0))
