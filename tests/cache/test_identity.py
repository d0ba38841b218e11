import pytest

from relish.cache.errors import CacheError
from relish.cache.identity import Identity, refuse_differences

CHANGES = {
    "revision": "def",
    "weights": "x" * 64,
    "config": "x" * 64,
    "tokenizer": "x" * 64,
    "prompt": "Review: {text}",
    "chat_template": True,
    "max_length": 128,
    "truncate": True,
    "layers": (1, 3),
    "hidden_size": 8,
    "trust_remote_code": True,
    "dtype": "float16",
    "compute_dtype": "bfloat16",
    "transformers": "5.1.0",
    "adapter": "a" * 64,
    "model": "org/other",
}


def refuse(have, want):
    refuse_differences(have, want, what="the cache c", advice="Use another folder.")


def test_json_brings_back_the_same_identity(make):
    identity = make.identity(layers=(0, 2), revision=None)
    assert Identity.from_json(identity.to_json()) == identity


def test_an_identity_from_before_there_were_adapters_has_none(make):
    value = make.identity().to_json()
    assert value.pop("adapter") is None
    assert Identity.from_json(value) == make.identity()


def test_an_adapter_that_is_no_hash_is_refused(make):
    with pytest.raises(ValueError, match="identity.adapter is 5"):
        Identity.from_json({**make.identity().to_json(), "adapter": 5})


def test_equal_identities_pass(make):
    refuse(make.identity(), make.identity())


@pytest.mark.parametrize("field", CHANGES)
def test_a_difference_is_named_with_both_values_and_the_way_out(make, field):
    have, want = make.identity(), make.identity(**{field: CHANGES[field]})
    text = (
        f"the cache c was made with something else: {field} is {getattr(have, field)!r} there and {CHANGES[field]!r} "
        "here. Use another folder."
    )
    with pytest.raises(CacheError) as caught:
        refuse(have, want)
    assert str(caught.value) == text


def test_every_field_is_compared(make):
    assert set(CHANGES) == set(make.identity().to_json())
    assert [name for name, _, _ in make.identity().differences(make.identity(**CHANGES))] == list(
        make.identity().to_json()
    )


def test_all_differences_are_named_at_once(make):
    with pytest.raises(
        CacheError, match=r"max_length is 64 there and 8 here; layers is \(3,\) there and \(1,\) here\."
    ):
        refuse(make.identity(), make.identity(max_length=8, layers=(1,)))


def test_local_files_may_be_renamed_since_their_hashes_tell(make):
    refuse(make.identity(revision=None, model="a"), make.identity(revision=None, model="b"))
    with pytest.raises(CacheError, match="weights is"):
        refuse(make.identity(revision=None, model="a"), make.identity(revision=None, model="b", weights="z" * 64))


def test_a_long_value_is_shortened(make):
    with pytest.raises(CacheError) as caught:
        refuse(make.identity(prompt="a" * 500), make.identity(prompt="b" * 500))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("change", [{"more": 1}, {"prompt": None}])
def test_fields_of_another_version_are_refused_by_name(make, change):
    value = make.identity().to_json()
    if "more" in change:
        value["more"] = 1
    else:
        del value["prompt"]
    with pytest.raises(
        CacheError,
        match=rf"identity has other fields than this version of relish knows, \['{next(iter(change))}'\]; install",
    ):
        Identity.from_json(value)
