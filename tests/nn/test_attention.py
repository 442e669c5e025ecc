"""`KVCache`: decoding token by token equals attention over the whole sequence."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf
from statefun import nn

SIZE = 8
ATTENTION = eqx.nn.MultiheadAttention(
    2, SIZE, qk_size=3, vo_size=5, use_key_bias=True, key=jax.random.key(0)
)
XS = jax.random.normal(jax.random.key(1), (3, 6, SIZE))


def whole(x, **options):
    n = x.shape[0]
    return ATTENTION(x, x, x, mask=jnp.tril(jnp.ones((n, n), bool)), **options)


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_decoding_equals_attention_over_the_whole_sequence():
    cached = nn.KVCache(ATTENTION, 8)
    run = sf.filter_jit(cached)
    out = [run(XS[0, :3]), run(XS[0, 3:4]), run(XS[0, 4:5]), run(XS[0, 5:])]
    assert_close(jnp.concatenate(out), whole(XS[0]))
    assert int(cached.position.value) == 6


def test_decoding_inside_scan_equals_attention_over_the_whole_sequence():
    cached = nn.KVCache(ATTENTION, 6)
    _, out = sf.scan(lambda _, x: (None, cached(x[None])[0]), None, XS[0])
    assert_close(out, whole(XS[0]))


def test_examples_of_a_batch_have_positions_of_their_own():
    lengths = jnp.array([1, 4, 2])
    for batch_shape in ((3,), (3, 1)):
        cached = nn.KVCache(ATTENTION, 6, batch_shape)
        shaped = lambda x: x.reshape(*batch_shape, *x.shape[1:])  # noqa: E731, B023
        cached(shaped(XS[:, :4]), shaped(lengths))
        step = jnp.stack([XS[i, n] for i, n in enumerate([1, 4, 2])])[:, None]
        out = cached(shaped(step)).reshape(3, SIZE)
        assert_close(out, jnp.stack([whole(XS[i])[n] for i, n in enumerate([1, 4, 2])]))
        assert cached.position.value.reshape(-1).tolist() == [2, 5, 3]


def test_caches_may_be_mapped():
    cached = nn.KVCache(ATTENTION, 6)
    for state in (cached.keys, cached.values, cached.position):
        state.value = jnp.stack([state.value] * 3)
    run = sf.filter_jit(sf.filter_vmap(cached, state_axes=[(nn.Cache, 0)]))
    out = jnp.concatenate([run(XS[:, :2]), run(XS[:, 2:])], 1)
    assert_close(out, jax.vmap(whole)(XS))


def test_heads_are_processed_with_their_positions():
    rope = eqx.nn.RotaryPositionalEmbedding(4)
    attention = eqx.nn.MultiheadAttention(2, SIZE, key=jax.random.key(0))

    def process(q, k, v):
        return jax.vmap(rope, 1, 1)(q), jax.vmap(rope, 1, 1)(k), v

    def rotate(x, places):
        table = jax.vmap(rope, 1, 1)
        # Rotates as if the tokens stood at the end of a sequence of six.
        padded = jnp.zeros((6, *x.shape[1:])).at[places].set(x)
        return table(padded)[places]

    cached = nn.KVCache(
        attention,
        6,
        process_heads=lambda q, k, v, at: (rotate(q, at), rotate(k, at), v),
    )
    out = jnp.concatenate([cached(XS[0, :2]), cached(XS[0, 2:])])
    mask = jnp.tril(jnp.ones((6, 6), bool))
    assert_close(out, attention(XS[0], XS[0], XS[0], mask=mask, process_heads=process))


def test_reset_forgets_some_or_all():
    cached = nn.KVCache(ATTENTION, 6, 3)
    cached(XS)
    cached.reset(jnp.array([True, False, True]))
    assert cached.position.value.tolist() == [0, 6, 0]
    cached.reset()
    assert_close(cached(XS), jax.vmap(whole)(XS))


@pytest.mark.parametrize("jit", [False, True])
def test_a_full_cache_raises_and_stays_as_it_was(jit):
    cached = nn.KVCache(ATTENTION, 4)
    cached(XS[0, :3])
    before = [s.value for s in (cached.keys, cached.values, cached.position)]
    run = sf.filter_jit(cached) if jit else cached
    with pytest.raises(RuntimeError, match="a KVCache with room for 4 tokens is full"):
        run(XS[0, 3:5])
    for old, state in zip(
        before, (cached.keys, cached.values, cached.position), strict=True
    ):
        assert (old == state.value).all()
    assert_close(run(XS[0, 3:4]), whole(XS[0, :4])[3:])


@pytest.mark.parametrize("jit", [False, True])
def test_a_cache_that_fills_up_in_a_scan_stays_as_it_was(jit):
    cached = nn.KVCache(ATTENTION, 4)
    cached(XS[0, :1])
    before = cached.keys.value

    def run(xs):
        sf.scan(lambda _, x: (None, cached(x[None])), None, xs)

    run = sf.filter_jit(run) if jit else run
    with pytest.raises(RuntimeError, match="a KVCache with room for 4 tokens is full"):
        run(XS[0, 1:])
    assert int(cached.position.value) == 1
    assert (cached.keys.value == before).all()
    run(XS[0, 1:4])
    assert int(cached.position.value) == 4


def test_a_cache_is_full_when_it_is_for_one_example():
    cached = nn.KVCache(ATTENTION, 4, 3)
    cached(XS[:, :3], jnp.array([3, 1, 2]))
    with pytest.raises(RuntimeError, match="a KVCache with room for 4 tokens is full"):
        cached(XS[:, 3:5])
    assert cached.position.value.tolist() == [3, 1, 2]
    cached(XS[:, 3:5], jnp.array([1, 2, 2]))
    assert cached.position.value.tolist() == [4, 3, 4]


def test_an_unchecked_cache_drops_what_does_not_fit():
    cached = nn.KVCache(ATTENTION, 4, checked=False)
    cached(XS[0, :3])
    out = cached(XS[0, 3:5])
    assert_close(out[0], whole(XS[0, :4])[3])
    assert int(cached.position.value) == 4
    assert sf.filter_jit(cached).trace(XS[0, :1]).jaxpr is not None
    assert "callback" not in str(sf.filter_jit(cached).trace(XS[0, :1]).jaxpr)


def test_arrays_that_do_not_fit_are_errors():
    cached = nn.KVCache(ATTENTION, 4, 3)
    with pytest.raises(
        ValueError, match=r"array of shape \(4, 8\), but takes \(3, tokens"
    ):
        cached(XS[0, :4])
    with pytest.raises(ValueError, match="given 6 tokens, and has room for 4"):
        cached(XS)
